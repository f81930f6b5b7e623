"""Choosing tokens: temperature, top-k, top-p, min-p, each row by its own settings and seed, without a sort.

A filter keeps the logits from some threshold on. Which one, is found by bisection over the bits of a float: 32 sums
over the vocabulary give the exact threshold, where a sort would move it all.

B rows, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32


class RowSampling(NamedTuple):
    """Each row's settings, as `SamplingParams` has them."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    seed: UInt32[Array, "B"]


def idle(rows: int) -> RowSampling:
    """Settings of rows that take the most likely token, in numpy."""
    return RowSampling(
        np.zeros(rows, np.float32),
        np.zeros(rows, np.int32),
        np.ones(rows, np.float32),
        np.zeros(rows, np.float32),
        np.zeros(rows, np.uint32),
    )


def choose(logits: Float[Array, "B V"], sampling: RowSampling, index: Int[Array, "B"]) -> Int[Array, "B"]:
    """A token of each row: the most likely one, or drawn by the row's seed and `index`, its place in the text."""
    return jax.lax.cond(
        jnp.any(sampling.temperature > 0),
        lambda: _drawn(logits, sampling, index),
        lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )


def _drawn(logits, sampling, index):
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys(sampling.seed, index))
    scaled = filtered(logits, sampling)
    drawn = jnp.argmax(scaled + noise, axis=-1)
    return jnp.where(sampling.temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def keys(seed: UInt32[Array, "B"], index: Int[Array, "B"]) -> Array:
    """A key for each row's token at a place in its text."""
    return jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(seed, index)


def filtered(logits: Float[Array, "B V"], sampling: RowSampling) -> Float[Array, "B V"]:
    """Logits over temperature, -inf for tokens that the row's filters leave out. Rows of temperature 0 count as 1."""
    logits = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]

    def cut(logits):
        logits = jnp.where(logits >= kth_largest(logits, sampling.top_k), logits, -jnp.inf)
        probabilities = jax.nn.softmax(logits, axis=-1)
        least = nucleus_threshold(probabilities, sampling.top_p)
        least = jnp.maximum(least, jnp.max(probabilities, axis=-1, keepdims=True) * sampling.min_p[:, None])
        return jnp.where(probabilities >= least, logits, -jnp.inf)

    used = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    return jax.lax.cond(jnp.any(used & (sampling.temperature > 0)), cut, lambda logits: logits, logits)


def kth_largest(logits: Float[Array, "B V"], k: Int[Array, "B"]) -> Float[Array, "B 1"]:
    """The k-th largest number of each row; -inf where k is 0 or the row is no longer than k."""
    bits = _ordered_bits(logits)
    k = jnp.where((k <= 0) | (k >= logits.shape[1]), logits.shape[1], k)
    found = _largest(lambda bound: jnp.sum(bits >= bound, axis=-1) >= k, len(logits))
    return jnp.where(k == logits.shape[1], -jnp.inf, _from_ordered_bits(found))[:, None]


def nucleus_threshold(probabilities: Float[Array, "B V"], top_p: Float[Array, "B"]) -> Float[Array, "B 1"]:
    """The greatest threshold such that the probabilities from it on add up to `top_p`; 0 where top_p is 1."""
    bits = _ordered_bits(probabilities)
    enough = lambda bound: jnp.sum(jnp.where(bits >= bound, probabilities, 0), axis=-1) >= top_p  # noqa: E731
    found = _from_ordered_bits(_largest(enough, len(probabilities)))
    return jnp.where(top_p >= 1, 0, found)[:, None]


def _largest(holds, rows: int) -> UInt32[Array, "B"]:
    """The largest number for which `holds`, a function that is true up to some number, from the highest bit down."""

    def bit(i, found):
        trial = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(trial[:, None]), trial, found)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(rows, jnp.uint32))


def _ordered_bits(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Floats as whole numbers of the same order."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _from_ordered_bits(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    back = jnp.where(bits >> 31, bits & jnp.uint32((1 << 31) - 1), ~bits)
    return jax.lax.bitcast_convert_type(back, jnp.float32)
