"""The one way to multiply activations by a weight."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.fp8_matmul import fp8_matmul
from kernels_pallas.target import widened


def project(
    x: Float[Array, "B L ..."], kernel: Float[Array, "..."], inputs: int = 1, precision: str = "default"
) -> Float[Array, "B L ..."]:
    """Contracts the last `inputs` axes of x with the first of the kernel, cast to x's dtype.

    As one plain matrix product of all positions: with several axes on a side, the CPU backend copies operands of
    the weights' gradients into another order first.

    Args:
        precision: `fp8` multiplies in E4M3, forward and both gradients, with V3's scales for each 128 numbers of a row
            and each 128 x 128 of the kernel (section 3.3), cut where the flattened axes lie.
    """
    positions, outputs = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
    width = math.prod(kernel.shape[:inputs])
    factors = x.reshape(-1, width), kernel.astype(x.dtype).reshape(width, -1)
    out = fp8_matmul(*factors) if precision == "fp8" else jnp.matmul(*widened(*factors)).astype(x.dtype)
    return out.reshape(*positions, *outputs)
