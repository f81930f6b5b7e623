"""The one way to multiply activations by a weight."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def project(x: Float[Array, "B L ..."], kernel: Float[Array, "..."], inputs: int = 1) -> Float[Array, "B L ..."]:
    """Contracts the last `inputs` axes of x with the first of the kernel, cast to x's dtype.

    As one plain matrix product of all positions: with several axes on a side, the CPU backend copies operands of
    the weights' gradients into another order first.
    """
    positions, outputs = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
    width = math.prod(kernel.shape[:inputs])
    out = jnp.matmul(x.reshape(-1, width), kernel.astype(x.dtype).reshape(width, -1))
    return out.reshape(*positions, *outputs)
