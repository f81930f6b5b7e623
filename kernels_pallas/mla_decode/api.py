"""Decoding with multi-head latent attention over a paged cache, with the up-projections absorbed (DeepSeek-V2, 2.1.2).

The cache holds of each position the latent and the rotated part of its key, which all heads share. The key
up-projection is absorbed into the query and the value up-projection into the output, so attention reads latents as
keys and as values, and no head's own keys or values are made.

B rows, H heads, C latent size, R rotated size, P pages of the cache.
"""

from jaxtyping import Array, Float, Int

from kernels_pallas.mla_decode import gpu, reference, tpu
from kernels_pallas.target import run

IMPLEMENTATIONS = {
    "mosaic": (tpu.mla_decode, ("tpu",)),
    "triton": (gpu.mla_decode, ("gpu",)),
    "reference": (reference.mla_decode, ("cpu", "tpu", "gpu")),
}
"""Each implementation and the platforms that have it, the preferred first."""


def mla_decode(
    query_latent: Float[Array, "B H C"],
    query_rope: Float[Array, "B H R"],
    cache: Float[Array, "P page columns"],
    page_table: Int[Array, "B pages"],
    lengths: Int[Array, "B"],
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B H C"]:
    """Softmax attention of one token of each row to the latents in its cache; softmax in float32.

    Args:
        query_latent: the unrotated queries times the key up-projection.
        cache: pages of latents and rotated keys; pages and places that no row names may hold anything, NaN too. There
            may be more columns, of finite numbers: if they are a multiple of 128, a TPU keeps an argument of a
            compiled function in the layout that the kernel reads, and else copies the whole cache at each call.
        page_table: int32 pages of each row in order; entries beyond a row's length must be valid pages all the same.
        lengths: int32 positions in each row's cache, its own token's included; a row of length 0 gives zeros.
        scale: factor on the scores.
        implementation: a name in IMPLEMENTATIONS; None takes the first that the platform has and that takes these
            sizes.
    Raises:
        ValueError: for an implementation of another name, or shapes that don't fit each other.
        NotImplementedError: for a named implementation that the platform lacks, or that can't take these sizes.
    """
    if query_latent.shape[-1] + query_rope.shape[-1] > cache.shape[-1]:
        raise ValueError(
            f"mla_decode: a cache of {cache.shape[-1]} columns for queries of {query_latent.shape[-1]} + "
            f"{query_rope.shape[-1]}: must hold a latent and a rotated key of the queries' sizes."
        )
    arguments = query_latent, query_rope, cache, page_table, lengths, scale
    return run("mla_decode", IMPLEMENTATIONS, implementation, *arguments)
