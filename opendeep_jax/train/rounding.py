"""Stochastic rounding: float32 into bfloat16 without losing what is smaller than half of its last place.

A weight or a moment of 8 bits moves by steps of 1/256 of itself or more. Rounding to nearest takes a smaller change
back, every time, so that a second moment with a decay of 0.99 never falls and weights at a small rate never move.
Here a number becomes one of its two neighbors, the nearer the likelier, so that its mean is what it was.

The chance is a hash of the run's seed, a count, the array's name and the element's index in the whole array. So a run
is the same when it is resumed or done again, and on any number of devices however they divide the array.
"""

import zlib

import jax
import jax.numpy as jnp

from opendeep_jax.checkpoint.digests import mix


def round_stochastically(x: jax.Array, dtype, seed: int, count: jax.Array, name: str) -> jax.Array:
    """A float32 array in `dtype`, float32 or bfloat16, its mean over `count` as it was; what is not finite stays so.

    Args:
        seed: of the run.
        count: uint32 or int32, another one each time that this array is rounded.
        name: of the array, so that no two have the same chances.
    """
    if jnp.dtype(dtype) == x.dtype:
        return x
    # The lower half of a float32 is what bfloat16 leaves out: adding 16 random bits carries as often as it should.
    key = mix(count.astype("uint32"), jnp.uint32) ^ jnp.uint32(zlib.crc32(f"{seed} {name}".encode()))
    for dimension, size in enumerate(x.shape):
        line = mix(jnp.arange(size, dtype="uint32") + jnp.uint32(0x9E3779B9 * (dimension + 1) & 0xFFFFFFFF), jnp.uint32)
        key = key + line.reshape([-1 if other == dimension else 1 for other in range(x.ndim)])
    chance = mix(key, jnp.uint32) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    carried = jax.lax.bitcast_convert_type((bits + chance) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), carried, x).astype(dtype)
