"""Changes to the logits of single tokens: penalties for what was said already, biases, ends that come too soon.

They are few beside a vocabulary, so they reach the device as a short list for each row. Its length grows eightfold at a
time, for each of which one program is compiled when it first occurs; a step without such requests runs none of it.

B rows, V vocabulary, K places in the lists.
"""

import collections
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from opendeep_jax.generation.requests import Request

FEW_CHANGES = 1024


class Adjustments(NamedTuple):
    """For each row the tokens whose logits change, each once; a token beyond the vocabulary stands for none."""

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
