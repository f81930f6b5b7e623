"""Cross-entropy through the head, without the logits of all tokens ever existing.

Two ways, and what each costs for T tokens, D model width and V vocabulary, gradients included:

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
    """Sums `-log softmax(hidden @ head)[target] + z_loss_weight * logsumexp²` over the tokens in `mask`, in nats.

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
    if chunk < 1:
        raise ValueError(f"fused_cross_entropy: chunk = {chunk}: must be at least 1 token.")
    targets = jnp.where(mask, targets, 0)
    operands = hidden, head, targets, mask, z_loss_weight, chunk, softcap
    total, each = run("cross_entropy", IMPLEMENTATIONS, implementation, *operands)
    return total, lax.stop_gradient(each)
