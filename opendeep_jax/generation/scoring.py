"""Log-probabilities of given texts, by the engine's cache and weights: what evaluation asks of a model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.params import SamplingParams
from opendeep_jax.generation.requests import SMALLEST_CHUNK, Request, bucket

if TYPE_CHECKING:
    from opendeep_jax.generation.engine import Engine


class Scored(NamedTuple):
    """Of each token of a text from some place on."""

    logprobs: list[float]
    """Natural logarithms of the probabilities that the model gave them."""
    greedy: list[bool]
    """Whether each was the most likely one."""


def score(engine: "Engine", texts: Sequence[Sequence[int]], first: Sequence[int]) -> list[Scored]:
    """The tokens of each text from the place `first` on, given all before them.

    Args:
        engine: requests may be running; they wait for a moment.
        texts: token ids, at most engine.max_length of each.
        first: the place of the first token to be scored, at least 1: nothing foretells a text's first token.
    Raises:
        ConfigError: for a text that is too long, a place outside its text, or where running requests have the pages.
    """
    for text, place in zip(texts, first, strict=True):
        if len(text) > engine.max_length:
            raise ConfigError(
                f"A text of {len(text)} tokens: at most {engine.max_length} can be scored at a time. Cut it."
            )
        if not 1 <= place <= len(text):
            raise ConfigError(
                f"A text of {len(text)} tokens cannot be scored from place {place} on: from 1 to its length."
            )
    results: list[Scored] = []
    for begin in range(0, len(texts), engine.shards):
        results += _together(engine, texts[begin : begin + engine.shards], first[begin : begin + engine.shards])
    return results


def _together(engine: "Engine", texts, first) -> list[Scored]:
    """One text of each group of devices."""
    requests: list[Request | None] = [None] * engine.shards
    needed = [-(-len(text) // engine.config.page_size) for text in texts]
    if any(count > pool.free for count, pool in zip(needed, engine.pools, strict=False)):
        raise ConfigError(
            f"Scoring {max(map(len, texts))} tokens takes {max(needed)} pages of the cache, and running requests leave "
            f"{min(pool.free for pool in engine.pools)}. Ask again later, or start with greater cache_tokens."
        )
    for shard, text in enumerate(texts):
        requests[shard] = Request(list(map(int, text)), SamplingParams(max_tokens=1))
        requests[shard].pages = engine.pools[shard].take(needed[shard])
    try:
        found = [([], []) for _ in texts]
        for start in range(0, max(map(len, texts)), engine.config.prefill_tokens):
            counts = [max(min(len(text) - start, engine.config.prefill_tokens), 0) for text in texts]
            width = bucket(max(counts), SMALLEST_CHUNK)
            tokens, targets = np.zeros((2, engine.shards, width), np.int32)
            for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
                tokens[row, :count] = text[start : start + count]
                after = text[start + 1 : start + count + 1]
                targets[row, : len(after)] = after
            starts = [start if count else 0 for count in counts]
            for row, (logprobs, greedy) in enumerate(engine.scored(requests, tokens, starts, counts, targets)):
                # The model's output at place i is of the token at i + 1.
                wanted = slice(max(first[row] - 1 - start, 0), min(counts[row], len(texts[row]) - 1 - start))
                if wanted.stop > wanted.start:
                    found[row][0].extend(logprobs[wanted].tolist())
                    found[row][1].extend(greedy[wanted].tolist())
    finally:
        for shard, request in enumerate(requests):
            if request:
                engine.pools[shard].give_back(request.pages)
    return [Scored(*one) for one in found]
