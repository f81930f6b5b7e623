"""The one way to multiply activations by a weight."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.fp8_matmul import fp8_matmul
from kernels_pallas.target import platform, widened


def project(
    x: Float[Array, "B L ..."], kernel: Float[Array, "..."], inputs: int = 1, precision: str = "default"
) -> Float[Array, "B L ..."]:
    """Contract the last `inputs` axes of x with the first of the kernel, cast to x's dtype.

    As one plain matrix product of all positions: with several axes on a side, the CPU backend copies operands of
    the weights' gradients into another order first.

    Args:
        precision: `fp8` multiplies in E4M3, forward and both gradients, with V3's scales for each 128 numbers of a row
            and each 128 x 128 of the kernel (section 3.3), cut where the flattened axes lie.
    """
    positions, outputs = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
    width = math.prod(kernel.shape[:inputs])
    factors = x.reshape(-1, width), kernel.astype(x.dtype).reshape(width, -1)
    if precision == "fp8":
        return fp8_matmul(*factors).reshape(*positions, *outputs)
    return matmul(*factors).astype(x.dtype).reshape(*positions, *outputs)


def matmul(x: Float[Array, "M K"], kernel: Float[Array, "K N"], dtype=None) -> Float[Array, "M N"]:
    """Multiply, accumulating and returning in `dtype`; None leaves it to the platform.

    A CPU's XLA multiplies bfloat16 twice as fast as float32 where it may give the float32 sums, and ten times slower
    than that where it may not, or where there is a single row.
    """
    if x.dtype != jnp.bfloat16 or platform() != "cpu":
        return jnp.matmul(*widened(x, kernel), preferred_element_type=dtype)
    rows = jnp.concatenate([x, x]) if len(x) == 1 else x
    return jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)[: len(x)]
