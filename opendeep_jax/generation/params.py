"""What a request asks of the generator, and what it gets. Standard library only."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.sentences import problem

MOST_LOGPROBS = 20
"""Alternatives whose log-probabilities a request may ask for."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. The filters apply together: top_k first, then top_p and min_p of what it leaves.

    Raises ConfigError for a value that makes no sense.
    """

    max_tokens: int = 256
    """Longest output; it ends sooner at one of `end_ids` or where the model's length is full."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token every time."""
    top_k: int = 0
    """Choose among this many most likely tokens; 0 among all."""
    top_p: float = 1.0
    """Choose among the fewest most likely tokens that together have this probability (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Choose among tokens with at least this share of the most likely one's probability (Nguyen et al. 2024)."""
    seed: int = 0
    """Decides the draws, whatever other requests are running."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end the output and are no part of it."""
    logprobs: int = -1
    """Alternatives whose log-probabilities come with each token; 0 the token's own alone, -1 none."""

    def __post_init__(self):
        rules = [
            ("max_tokens", lambda x: x >= 1, "must be at least 1"),
            ("temperature", lambda x: 0 <= x <= 100, "must be from 0 to 100"),
            ("top_k", lambda x: x >= 0, "must be at least 0"),
            ("top_p", lambda x: 0 < x <= 1, "must be above 0 and at most 1"),
            ("min_p", lambda x: 0 <= x <= 1, "must be from 0 to 1"),
            ("seed", lambda x: 0 <= x < 2**32, "must be from 0 to 2**32 - 1"),
            ("logprobs", lambda x: -1 <= x <= MOST_LOGPROBS, f"must be from -1 to {MOST_LOGPROBS}"),
        ]
        for name, holds, rule in rules:
            value = getattr(self, name)
            whole = name in ("max_tokens", "top_k", "seed", "logprobs")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ConfigError(problem(name, value, f"must be a {'whole ' * whole}number", ""))
            if math.isnan(value) or not holds(value):
                raise ConfigError(problem(name, value, rule, ""))


class TokenLogprob(NamedTuple):
    """A token's log-probability under the model, before temperature and filters, in nats."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens and theirs, as many as the request asked for."""


class Completion(NamedTuple):
    """A finished request's output."""

    tokens: list[int]
    logprobs: list[TokenLogprob]
    """One for each token where the request asked for them."""
    finish: str
    """`stop` at one of `end_ids`, `length`, or `aborted`."""
