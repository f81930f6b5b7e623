"""Cross-entropy and log-probabilities through the head, without the logits of all tokens ever existing.

`fused_cross_entropy` has two ways. What each costs for T tokens, D model width and V vocabulary, with gradients:

  - `chunks` makes each chunk's gradients while its logits are there: 3 matmuls of 2 T D V FLOPs, the least there is.
    It holds `chunk` x V float32 logits and a float32 gradient of the head, and moves both through HBM.
  - `mosaic_tpu` holds no logits outside VMEM and no float32 gradient of the head, and pays with recomputing the logits
    for each of the two gradients: 5 matmuls.

At DeepSeek-V3's size (T = 16,384 of a chip, D = 7168, V = 129,280) a matmul is 3.0e13 FLOPs, 66 ms of a v5p at its
peak: the two further ones cost 132 ms. `chunks` moves the logits (38 GB in all) and, with each of 16 chunks of 1024,
the head twice and its gradient in and out: 216 GB, 78 ms at 2.77 TB/s if nothing of it is hidden; with chunks of 4096,
83 GB and 30 ms. By this arithmetic it is the faster one, and it is the default everywhere. Compiled for a v5p it has
3.7 GB (jax 0.10.2) or 4.2 GB (0.12.0) of temporaries with chunks of 1024, where `mosaic_tpu` has 0.03 GB: choose that
where a model would not fit by so much.

`token_logprobs` has gradients that depend on what is made of its results, so `chunks` makes the logits a second time
in its backward pass: 4 matmuls.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.cross_entropy import chunks, reference, tpu
from kernels_pallas.target import run

Implementation = Literal["chunks", "mosaic_tpu", "reference"]

IMPLEMENTATIONS = {
    "chunks": (chunks.loss, ("cpu", "tpu", "gpu")),
    "mosaic_tpu": (tpu.loss, ("tpu",)),
    "reference": (reference.loss, ("cpu", "tpu", "gpu")),
}

LOGPROB_IMPLEMENTATIONS = {
    "chunks": (chunks.token_logprobs, ("cpu", "tpu", "gpu")),
    "reference": (reference.token_logprobs, ("cpu", "tpu", "gpu")),
}


def fused_cross_entropy(
    hidden: Float[Array, "T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "T"],
    mask: Bool[Array, "T"],
    z_loss_weight: float = 0.0,
    chunk: int = 1024,
    implementation: Implementation | None = None,
    softcap: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, "T"]]:
    """Sum `-log softmax(hidden @ head)[target] + z_loss_weight * logsumexp²` over the tokens in `mask`, in nats.

    Args:
        hidden: what the head sees; gradients come back in its type.
        head: of any vocabulary, in the type it is multiplied in.
        targets: int32 below V where `mask` is set; anything elsewhere.
        z_loss_weight: of the squared log-sum-exp (PaLM).
        chunk: most tokens whose logits exist at a time; read by `chunks` alone.
        implementation: a name in IMPLEMENTATIONS; None takes the first that the platform has.
        softcap: c of `c tanh(logit / c)`, Gemma 2's bound of the logits; 0 leaves them as they are.
    Returns:
        The float32 sum (divide by the global count of targets for a mean), and each token's cross-entropy without the
        z-loss, float32, 0 outside the mask; only the first carries a gradient, for hidden and head.
    Raises:
        ValueError: for an implementation of another name, or a chunk below 1.
        NotImplementedError: for a named implementation that this platform lacks, or that has no soft cap.
    """
    _check_chunk("fused_cross_entropy", chunk)
    targets = jnp.where(mask, targets, 0)
    operands = hidden, head, targets, mask, z_loss_weight, chunk, softcap
    total, each = run("cross_entropy", IMPLEMENTATIONS, implementation, *operands)
    return total, lax.stop_gradient(each)


def token_logprobs(
    hidden: Float[Array, "*B D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "*B"],
    temperature: float | Float[Array, ""] = 1.0,
    mask: Bool[Array, "*B"] | None = None,
    chunk: int = 1024,
    implementation: Literal["chunks", "reference"] | None = None,
    softcap: float = 0.0,
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Return `log p[target]` and the entropy `-sum p log p` of `p = softmax(hidden @ head / temperature)`, in nats.

    Both are float32, 0 outside the mask, and differentiable in hidden and head.

    Args:
        hidden, head: as for `fused_cross_entropy`, of tokens of any shape.
        targets: int32 below V where `mask` is set; anything elsewhere.
        temperature: above 0, the same for all tokens; it gets no gradient.
        mask: None for all tokens.
        chunk, softcap: as for `fused_cross_entropy`; logits are capped before the temperature divides them.
        implementation: a name in LOGPROB_IMPLEMENTATIONS; None takes the first.
    Raises:
        ValueError: for an implementation of another name, or a chunk below 1.
    """
    _check_chunk("token_logprobs", chunk)
    mask = jnp.ones(targets.shape, bool) if mask is None else mask
    flat = hidden.reshape(-1, hidden.shape[-1]), head, jnp.where(mask, targets, 0).reshape(-1), mask.reshape(-1)
    results = run("token_logprobs", LOGPROB_IMPLEMENTATIONS, implementation, *flat, temperature, chunk, softcap)
    return tuple(result.reshape(targets.shape) for result in results)


def _check_chunk(kernel: str, chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"{kernel}: chunk = {chunk}: must be at least 1 token.")
