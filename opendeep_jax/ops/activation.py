"""Nonlinearities of the feed-forward."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def activated(name: str, x: Float[Array, "... M"], alpha: float = 1.702, limit: float = 7.0) -> Float[Array, "... M"]:
    """`silu`, `gelu_tanh`, `relu2` (Primer's squared ReLU, So et al. 2021), or the gate of gpt-oss's clamped SwiGLU:
    `g sigmoid(alpha g)` with g bounded from above by `limit`.
    """
    if name == "clamped_swiglu":
        gate = jnp.minimum(x, limit)
        return gate * jax.nn.sigmoid(alpha * gate)
    functions = {
        "silu": jax.nn.silu,
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    }
    return functions[name](x)


def gated(
    name: str, gate: Float[Array, "... M"], up: Float[Array, "... M"], alpha: float = 1.702, limit: float = 7.0
) -> Float[Array, "... M"]:
    """The activated gate times `up`; gpt-oss bounds `up` to +-limit and adds 1 first."""
    if name == "clamped_swiglu":
        up = jnp.clip(up, -limit, limit) + 1
    return activated(name, gate, alpha, limit) * up
