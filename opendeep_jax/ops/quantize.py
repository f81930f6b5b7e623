"""The matrix products of a model in DeepSeek-V3's FP8 (`execution.precision = "fp8"`), in the shapes that models use.

In FP8 are the projections of attention, of the dense feed-forward, of the shared and routed experts and of multi-token
prediction, forward and both gradients. Embedding, output head, router, norms and the attention core stay as they are
(report, section 3.3.1), and so do master weights and optimizer.

T tokens, K experts chosen per token, D model width, F expert width, M rows sorted by expert, e experts.
"""

import math

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.fp8_matmul import fp8_grouped_matmul, fp8_matmul


def fp8_project(x: Float[Array, "B L ..."], kernel: Float[Array, "..."], inputs: int = 1) -> Float[Array, "B L ..."]:
    """As `linear.project`, through FP8: contracts the last `inputs` axes of x with the first of the kernel.

    Tiles are cut where the flattened inputs and outputs lie: 128 consecutive numbers may belong to several heads.
    """
    positions, outputs = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
    width = math.prod(kernel.shape[:inputs])
    out = fp8_matmul(x.reshape(-1, width), kernel.reshape(width, -1))
    return out.reshape(*positions, *outputs)


def fp8_grouped_swiglu(
    rows: Float[Array, "M D"],
    gate: Float[Array, "e D F"],
    up: Float[Array, "e D F"],
    group_sizes: Int[Array, "e"],
    row_weights: Float[Array, "M"] | None,
) -> Float[Array, "M F"]:
    """As `grouped_swiglu`, both products through FP8; between them and the next product nothing is in 8 bits."""
    gated = checkpoint_name(fp8_grouped_matmul(rows, gate, group_sizes), "expert_gate")
    upped = checkpoint_name(fp8_grouped_matmul(rows, up, group_sizes), "expert_up")
    hidden = jax.nn.silu(gated) * upped
    return hidden if row_weights is None else hidden * row_weights[:, None].astype(hidden.dtype)
