"""Log-probabilities of given texts, by the engine's cache and weights: what evaluation asks of a model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.requests import Request, SamplingParams, cut_out

if TYPE_CHECKING:
    from opendeep_jax.generation.engine import Engine


class Scored(NamedTuple):
    """Scores of each token of a text from some position on."""

    logprobs: list[float]
    """Natural logarithms of the probabilities that the model gave them."""
    greedy: list[bool]
    """True where a token was the most likely one."""
    top: Sequence[tuple[tuple[int, float], ...]] = ()
    """The most likely tokens at each place and theirs, as many as were asked for."""


def score(engine: "Engine", texts: Sequence[Sequence[int]], first: Sequence[int], top: int = 0) -> list[Scored]:
    """The tokens of each text from the place `first` on, given all before them.

    Args:
        engine: requests may be running; they wait for a moment.
        texts: token ids, at most engine.max_length of each.
        first: the place of the first token to be scored, at least 1: nothing foretells a text's first token.
        top: the most likely tokens to give at each place, `MOST_LOGPROBS` at most.
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
        results += _together(engine, texts[begin : begin + engine.shards], first[begin : begin + engine.shards], top)
    return results


def _together(engine: "Engine", texts, first, top) -> list[Scored]:
    """One text of each group of devices."""
    needed = [-(-len(text) // engine.page_size) for text in texts]
    if any(count > pool.free for count, pool in zip(needed, engine.pools, strict=False)):
        raise ConfigError(
            f"Scoring {max(map(len, texts))} tokens takes {max(needed)} pages of the cache, and running requests leave "
            f"{min(pool.free for pool in engine.pools)}. Ask again later, or start with greater cache_tokens."
        )
    idle = engine.shards - len(texts)
    requests = [Request(list(map(int, text)), SamplingParams(max_tokens=1)) for text in texts] + [None] * idle
    texts, first = [*texts, *[()] * idle], [*first, *[1] * idle]
    for request, pool, count in zip(requests, engine.pools, [*needed, *[0] * idle], strict=True):
        if request:
            request.pages = pool.take(count)
    most, found = engine.config.prefill_tokens, [Scored([], [], []) for _ in needed]
    try:
        for start in range(0, max(map(len, texts)), most):
            counts = [max(min(len(text) - start, most), 0) for text in texts]
            starts = [start if count else 0 for count in counts]
            tokens, targets = cut_out(texts, starts, counts)
            rows = engine.rows(requests, tokens, starts, counts)
            with jax.set_mesh(engine.mesh):
                out, engine.cache = engine.programs.score[top > 0](engine.weights, engine.cache, rows, targets)
            logprobs, greedy, *best = jax.device_get(out)
            for row, scored in enumerate(found):
                # The model's output at place i is of the token at i + 1.
                wanted = slice(max(first[row] - 1 - start, 0), min(counts[row], len(texts[row]) - 1 - start))
                if wanted.stop > wanted.start:
                    scored.logprobs.extend(logprobs[row, wanted].tolist())
                    scored.greedy.extend(greedy[row, wanted].tolist())
                    for place in range(wanted.start, wanted.stop) if top else ():
                        pairs = (array[row, place, :top].tolist() for array in best)
                        scored.top.append(tuple(zip(*pairs, strict=True)))
    finally:
        for request, pool in zip(requests, engine.pools, strict=True):
            if request:
                pool.give_back(request.pages)
    return found
