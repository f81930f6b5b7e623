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
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies others, of tokens in prompt or output (Keskar et al. 2019)."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit as often as the output has it."""
    presence_penalty: float = 0.0
    """Taken off a token's logit if the output has it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, and what is put on their logits."""
    min_tokens: int = 0
    """None of `end_ids` is chosen before the output has so many."""
    logprobs: int = -1
    """Alternatives whose log-probabilities come with each token; 0 the token's own alone, -1 none."""

    def __post_init__(self):
        rules = [
            ("max_tokens", lambda x: x >= 1, "must be at least 1"),
            ("temperature", lambda x: 0 <= x <= 100, "must be from 0 to 100"),
            ("top_k", lambda x: x >= 0, "must be at least 0"),
            ("top_p", lambda x: 0 < x <= 1, "must be above 0 and at most 1"),
            ("min_p", lambda x: 0 <= x <= 1, "must be from 0 to 1"),
            ("repetition_penalty", lambda x: 0 < x <= 10, "must be above 0 and at most 10"),
            ("frequency_penalty", lambda x: -2 <= x <= 2, "must be from -2 to 2"),
            ("presence_penalty", lambda x: -2 <= x <= 2, "must be from -2 to 2"),
            ("min_tokens", lambda x: x >= 0, "must be at least 0"),
            ("seed", lambda x: 0 <= x < 2**32, "must be from 0 to 2**32 - 1"),
            ("logprobs", lambda x: -1 <= x <= MOST_LOGPROBS, f"must be from -1 to {MOST_LOGPROBS}"),
        ]
        for name, holds, rule in rules:
            value = getattr(self, name)
            whole = name in ("max_tokens", "min_tokens", "top_k", "seed", "logprobs")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ConfigError(problem(name, value, f"must be a {'whole ' * whole}number", ""))
            if math.isnan(value) or not holds(value):
                raise ConfigError(problem(name, value, rule, ""))

    @property
    def adjusts(self) -> bool:
        """Whether logits of single tokens are changed."""
        penalties = self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty
        return bool(penalties or self.logit_bias or (self.min_tokens and self.end_ids))


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
