"""Sampling tokens: temperature, top-k, top-p, min-p, each row by its own settings and seed, without a sort.

A filter keeps the logits from some threshold on. Which one, is found by bisection over the bits of a float: 32 sums
over the vocabulary give the exact threshold, where a sort would move it all.

Changes to the logits of single tokens (penalties for what was said already, biases, ends that come too soon) are few
beside a vocabulary, so they reach the device as a short list for each row. Its length grows eightfold at a time, for
each of which one program is compiled when it first occurs; a step without such requests runs none of it.

B rows, V vocabulary, K places in the lists.
"""

import collections
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8, UInt32

from opendeep_jax.generation.requests import MOST_LOGPROBS, Request, TokenLogprob

FEW_CHANGES = 1024


class RowSampling(NamedTuple):
    """Each row's settings, as `SamplingParams` has them."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    seed: UInt32[Array, "B"]


def idle(rows: int) -> RowSampling:
    """Return the settings of greedy rows, in numpy."""
    return RowSampling(
        np.zeros(rows, np.float32),
        np.zeros(rows, np.int32),
        np.ones(rows, np.float32),
        np.zeros(rows, np.float32),
        np.zeros(rows, np.uint32),
    )


class Outputs(NamedTuple):
    """Optional outputs of sampling; each combination is a program."""

    top: bool = False
    """The model's log-probabilities, of the most likely tokens too."""
    drawn: bool = False
    """Log-probabilities of the distribution that was drawn from, and the model's own."""
    kept: bool = False
    """The tokens that were drawn among."""


class Sampled(NamedTuple):
    """Results of a step for each row, or each of a row's positions, as far as requested."""

    tokens: Int[Array, "*B"]
    logprobs: Float[Array, "*B"] | None = None
    top_tokens: Int[Array, "*B 20"] | None = None
    top_logprobs: Float[Array, "*B 20"] | None = None
    drawn: Float[Array, "*B"] | None = None
    kept: UInt8[Array, "*B V/8"] | None = None
    """A bit for each token, the lowest first."""


def settings_of(requests: Sequence[Request | None], kept: bool) -> tuple[RowSampling, Int[np.ndarray, "B"], Outputs]:
    """Return the rows' settings, their places in their outputs, and the union of requested outputs, in numpy.

    Args:
        kept: whether the tokens that were drawn among are wanted.
    """
    settings, index = idle(len(requests)), np.zeros(len(requests), np.int32)
    top = drawn = False
    for row, request in enumerate(requests):
        if request:
            params = request.params
            own = params.temperature, params.top_k, params.top_p, params.min_p, params.seed
            for array, value in zip(settings, own, strict=True):
                array[row] = value
            # What is drawn from comes with the model's own, but not with the most likely tokens.
            index[row], drawn = len(request.tokens), drawn or params.drawn_logprobs
            top = top or params.logprobs >= params.drawn_logprobs
    return settings, index, Outputs(top, drawn, kept)


def sample(
    vocab_size: int,
    wanted: Outputs,
    logits: Float[Array, "B V"],
    settings: RowSampling,
    index: Int[Array, "B"],
    changes: "Adjustments | None",
) -> Sampled:
    """Sample a token of each row.

    Args:
        vocab_size: tokens from here on are never sampled: the model's table may be longer than the tokenizer's.
        index: each row's place in its output, which its draw depends on.
        changes: to the logits that are drawn by; the model's own log-probabilities are without them.
    """
    logits = limited(logits, vocab_size)
    changed = logits if changes is None else adjusted(logits, changes)
    return describe(wanted, draw(changed, settings, index), logits, changed, settings)


def describe(
    wanted: Outputs, tokens: Int[Array, "B"], logits: Float[Array, "B V"], changed: Float[Array, "B V"], settings
) -> Sampled:
    """Return sampled tokens with what is wanted of them.

    Args:
        logits: the model's.
        changed: those that were drawn by, before temperature and filters.
    """

    def own(logprobs):
        return jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]

    out = Sampled(tokens)
    if wanted.top or wanted.drawn:
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        out = out._replace(logprobs=own(logprobs))
    if wanted.top:
        top, top_tokens = jax.lax.top_k(logprobs, min(MOST_LOGPROBS, logits.shape[-1]))
        out = out._replace(top_tokens=top_tokens, top_logprobs=top)
    if wanted.drawn or wanted.kept:
        cut = filtered(changed, settings)
    if wanted.drawn:
        drawn = own(jax.nn.log_softmax(cut, axis=-1))
        out = out._replace(drawn=jnp.where(settings.temperature > 0, drawn, 0))
    if wanted.kept:
        out = out._replace(kept=jnp.packbits(cut > -jnp.inf, axis=-1, bitorder="little"))
    return out


def describe_drafted(wanted: Outputs, tokens, logits, settings) -> Sampled:
    """`describe` of the tokens [B, T] that a speculating step has sampled by logits [B, T, V]."""
    rows, new = tokens.shape
    flat = logits.reshape(rows * new, -1)
    settings = RowSampling(*(jnp.repeat(setting, new) for setting in settings))
    out = describe(wanted, tokens.reshape(-1), flat, flat, settings)
    return jax.tree.map(lambda x: x.reshape(rows, new, *x.shape[1:]), out)


def kept_tokens(bits: UInt8[np.ndarray, "V/8"], vocab_size: int) -> Int[np.ndarray, "n"] | None:
    """Return the ids of a row's kept tokens; None for all."""
    found = np.flatnonzero(np.unpackbits(bits, bitorder="little")).astype(np.int32)
    return None if len(found) >= vocab_size else found


def token_logprobs(sampled: Sampled, count: int, top: int) -> list[TokenLogprob]:
    """Return the log-probabilities of a row's first `count` tokens with so many alternatives; none where top is -1."""
    if top < 0:
        return []
    best = [()] * count
    if top:
        both = sampled.top_tokens[:count, :top].tolist(), sampled.top_logprobs[:count, :top].tolist()
        best = [tuple(zip(*pair, strict=True)) for pair in zip(*both, strict=True)]
    return list(map(TokenLogprob, sampled.tokens[:count].tolist(), sampled.logprobs[:count].tolist(), best))


def limited(logits: Float[Array, "... V"], vocab_size: int) -> Float[Array, "... V"]:
    """Return logits with -inf for tokens that the tokenizer does not have."""
    if vocab_size >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def draw(logits: Float[Array, "B V"], sampling: RowSampling, index: Int[Array, "B"]) -> Int[Array, "B"]:
    """Return a token of each row: the most likely, or drawn by the row's seed and `index`, its place in the text."""
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


class Adjustments(NamedTuple):
    """Tokens of each row whose logits change, each once; a token id beyond the vocabulary is padding."""

    tokens: Int[Array, "B K"]
    factors: Float[Array, "B K"]
    """Divides positive logits, and multiplies others; then"""
    added: Float[Array, "B K"]


def adjustments(requests: Sequence[Request | None]) -> Adjustments | None:
    """Return what the next tokens of these requests ask for, in numpy; None where none asks for any."""
    if not any(request and request.params.adjusts for request in requests):
        return None
    changes = [_changes(request) if request and request.params.adjusts else {} for request in requests]
    longest = max(map(len, changes))
    places = FEW_CHANGES * 8 ** max(math.ceil(math.log(max(longest, 1) / FEW_CHANGES, 8)), 0)
    tokens = np.full((len(requests), places), np.iinfo(np.int32).max, np.int32)
    factors, added = np.ones(tokens.shape, np.float32), np.zeros(tokens.shape, np.float32)
    for row, found in enumerate(changes):
        if found:
            tokens[row, : len(found)] = list(found)
            factors[row, : len(found)], added[row, : len(found)] = zip(*found.values(), strict=True)
    return Adjustments(tokens, factors, added)


def _changes(request: Request) -> dict[int, tuple[float, float]]:
    """(factor, addend) of each token whose logit changes."""
    params, said = request.params, collections.Counter(request.tokens)
    factors: dict[int, float] = {}
    added: collections.defaultdict[int, float] = collections.defaultdict(float)
    if params.repetition_penalty != 1:
        factors = dict.fromkeys((*request.distinct, *said), params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        for token, count in said.items():
            added[token] -= params.frequency_penalty * count + params.presence_penalty
    for token, value in params.logit_bias:
        added[token] += value
    if len(request.tokens) < params.min_tokens:
        added.update(dict.fromkeys(params.end_ids, -math.inf))
    return {token: (factors.get(token, 1.0), added.get(token, 0.0)) for token in (*factors, *added)}


def adjusted(logits: Float[Array, "B V"], changes: Adjustments) -> Float[Array, "B V"]:
    """Logits with the rows' changes; those of other rows and tokens stay as they are, to the bit."""
    rows = jnp.arange(len(logits))[:, None]
    before = jnp.take_along_axis(logits, jnp.minimum(changes.tokens, logits.shape[1] - 1), axis=1)
    after = jnp.where(before > 0, before / changes.factors, before * changes.factors) + changes.added
    return logits.at[rows, changes.tokens].set(after, mode="drop")
