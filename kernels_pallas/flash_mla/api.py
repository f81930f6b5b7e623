"""Training attention of multi-head latent attention (DeepSeek-V2 report, section 2.1.2): causal, over packed documents.

A head's queries and keys have an unrotated part and a rotated part that carries the positions; the rotated part of the
keys is shared by the heads. Heads lie side by side in the last axis, as the projections write them, so that nothing is
transposed or broadcast in memory.

B rows, L query length, S key length, H heads, N unrotated size, R rotated size, V value size.
"""

from jaxtyping import Array, Float, Int

from kernels_pallas.flash_mla import blocks, gpu, reference, tpu
from kernels_pallas.target import run

IMPLEMENTATIONS = {
    "mosaic": (tpu.flash_mla, ("tpu",)),
    "triton": (gpu.flash_mla, ("gpu",)),
    "blocks": (blocks.flash_mla, ("cpu", "tpu", "gpu")),
    "reference": (reference.flash_mla, ("cpu", "tpu", "gpu")),
}
"""Each implementation and the platforms that have it, the preferred first."""


def flash_mla(
    query_nope: Float[Array, "B L HN"],
    query_rope: Float[Array, "B L HR"],
    key_nope: Float[Array, "B S HN"],
    key_rope: Float[Array, "B S R"],
    value: Float[Array, "B S HV"],
    query_segments: Int[Array, "B L"],
    key_segments: Int[Array, "B S"],
    query_order: Int[Array, "B L"] | None = None,
    key_order: Int[Array, "B S"] | None = None,
    *,
    num_heads: int,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B L HV"]:
    """Softmax attention of each query to the keys of its own segment whose order is at most its own.

    Softmax is in float32; differentiable in the first five. A query that sees no key gives zeros. The output and each
    query's log-sum-exp are named "attention_output" (`jax.ad_checkpoint.checkpoint_name`), so that remat can keep them.

    Args:
        key_rope: rotated part of the keys, one for all heads.
        query_segments, key_segments: document of each position in its row, at least 0.
        query_order, key_order: index of each position in its whole row, at least 0 (parts of rows lie on several
            devices under context parallelism, in another order); None: index within L, which is then S.
        scale: factor on the scores, positive.
        implementation: a name in IMPLEMENTATIONS; None takes the first that the platform has and that takes these
            sizes.
    Raises:
        ValueError: for an implementation of another name, or shapes that don't fit each other.
        NotImplementedError: for a named implementation that the platform lacks, or that can't take these sizes.
    """
    _check(query_nope, query_rope, key_nope, key_rope, value, query_order, key_order, num_heads)
    arguments = query_nope, query_rope, key_nope, key_rope, value, query_segments, key_segments, query_order, key_order
    return run("flash_mla", IMPLEMENTATIONS, implementation, *arguments, num_heads=num_heads, scale=scale)


def _check(query_nope, query_rope, key_nope, key_rope, value, query_order, key_order, num_heads):
    """Raise ValueError for shapes that don't fit each other."""
    if any(x.shape[-1] % num_heads for x in (query_nope, query_rope, value)) or key_nope.shape[-1] % num_heads:
        raise ValueError(f"flash_mla: num_heads = {num_heads}: must divide the last axis of queries, keys and values.")
    if query_nope.shape[-1] != key_nope.shape[-1] or query_rope.shape[-1] != num_heads * key_rope.shape[-1]:
        raise ValueError(
            f"flash_mla: keys of {key_nope.shape[-1]} + {key_rope.shape[-1]} columns for queries of "
            f"{query_nope.shape[-1]} + {query_rope.shape[-1]}: the unrotated parts must have the same size, and the "
            f"queries' rotated part {num_heads} times the keys'."
        )
    if (query_order is None) != (key_order is None):
        raise ValueError("flash_mla: query_order and key_order: must be given both or neither.")
    if query_order is None and query_nope.shape[1] != key_nope.shape[1]:
        raise ValueError(
            f"flash_mla: {query_nope.shape[1]} queries and {key_nope.shape[1]} keys need query_order and key_order."
        )
