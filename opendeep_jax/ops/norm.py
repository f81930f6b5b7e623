"""Root-mean-square normalization (Zhang and Sennrich 2019), and layer normalization (Ba et al. 2016)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "... D"], epsilon: float) -> Float[Array, "... D"]:
    """`x / rms(x) * scale`, computed in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(
    x: Float[Array, "... D"], scale: Float[Array, "D"], bias: Float[Array, "D"], epsilon: float
) -> Float[Array, "... D"]:
    """`(x - mean(x)) / std(x) * scale + bias`, computed in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + epsilon)
    return (centered * inverse * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
