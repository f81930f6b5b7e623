"""A request on its way, what the engine reports of it, and the engine's settings."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.model_rules import hybrid_mesh_problems
from opendeep_jax.config.rules import MESH_AXES, ROW_AXES, width_problems
from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.generation.attention import FEW
from opendeep_jax.generation.params import SamplingParams, TokenLogprob

SMALLEST_CHUNK = 16
DEFAULT_LENGTH = 4096


@dataclass(frozen=True)
class EngineConfig:
    """How many requests run together, and in how much memory."""

    slots: int = 8
    """Requests that run at a time. Each step computes all of them."""
    max_length: int = 0
    """Longest prompt and output together, in tokens; 0 takes the model's, 4,096 at most; commands more."""
    page_size: int = 0
    """Positions of a page; 0 takes 64, and on a TPU 128, as many as its lanes."""
    cache_tokens: int = 0
    """Positions that the cache holds for all requests; 0 takes slots x max_length: none ever waits for pages."""
    prefill_tokens: int = 512
    """Tokens of prompts that a step takes in before it decodes; a power of two."""
    vocab_size: int = 0
    """Tokens that may be chosen, the tokenizer's; 0 takes all of the model's."""
    speculate: int = 0
    """Tokens that the MTP module drafts for each step of the model; 0 decodes plainly."""


@dataclass(eq=False)
class Request:
    """A prompt on its way. Only the engine writes here."""

    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    taken_in: int = 0
    """Tokens of the prompt that are in the cache."""
    drafts: list[int] = field(default_factory=list)
    """Tokens that may come next, by the MTP module."""

    @functools.cached_property
    def distinct(self) -> frozenset[int]:
        """The prompt's tokens."""
        return frozenset(self.prompt)

    @property
    def length(self) -> int:
        """Tokens of the prompt and the output so far."""
        return len(self.prompt) + len(self.tokens)


class Progress(NamedTuple):
    """What a step brought a request."""

    request: Request
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish: str | None
    """`stop`, `length` or `aborted` when it is done."""


class EngineStats(NamedTuple):
    """How it goes: now, and since the beginning."""

    running: int
    waiting: int
    free_pages: int
    total_pages: int
    prompt_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    steps: int


def bucket(count: int, least: int) -> int:
    """The smallest power of two that is at least both."""
    return max(1 << max(count - 1, 0).bit_length(), least)


def chunk_size(left: int, most: int) -> int:
    """Tokens of a prompt to take in next, of those that are left: by its own length alone, so that its numbers depend
    on nothing else. At most a quarter of what is computed is for nothing, but for the smallest chunks.

    Args:
        most: a power of two.
    """
    whole = bucket(left, SMALLEST_CHUNK)
    if whole > most:
        return most
    return left if whole - left <= whole // 4 or whole == SMALLEST_CHUNK else whole // 2


def cut_out(
    texts: Sequence[Sequence[int]], starts: Sequence[int], counts: Sequence[int]
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """So many tokens of each text from its start on, and the token after each of them; 0 where there is none.

    T is the smallest bucket for the longest.
    """
    tokens, following = np.zeros((2, len(texts), bucket(max(counts), SMALLEST_CHUNK)), np.int32)
    for row, (text, start, count) in enumerate(zip(texts, starts, counts, strict=True)):
        tokens[row, :count] = text[start : start + count]
        after = text[start + 1 : start + count + 1]
        following[row, : len(after)] = after
    return tokens, following


def longest(config: EngineConfig, model: ModelConfig) -> int:
    """Tokens that prompt and output together may have."""
    return config.max_length or min(model.max_length, DEFAULT_LENGTH)


def check_settings(config: EngineConfig, model: ModelConfig, mesh_sizes: Mapping[str, int]) -> None:
    """Raises ConfigError for settings that cannot work.

    Args:
        mesh_sizes: devices along each axis of the mesh; axes that are left out have one.
    """
    sizes = dict.fromkeys(MESH_AXES, 1) | dict(mesh_sizes)
    max_length, shards = longest(config, model), math.prod(sizes[axis] for axis in ROW_AXES)
    for name in ("slots", "prefill_tokens"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} = {getattr(config, name)}: must be at least 1.")
    for name in ("max_length", "page_size", "cache_tokens", "vocab_size", "speculate"):
        if getattr(config, name) < 0:
            raise ConfigError(f"{name} = {getattr(config, name)}: must be at least 0.")
    if max_length > model.max_length:
        raise ConfigError(
            f"max_length = {max_length}: the model's positions go up to {model.max_length}. Lower it. (A run's go up "
            "to the longest row that it trains on, unless its model.context_length says more.)"
        )
    if config.prefill_tokens & (config.prefill_tokens - 1) or config.prefill_tokens < SMALLEST_CHUNK:
        raise ConfigError(f"prefill_tokens = {config.prefill_tokens}: must be a power of two from {SMALLEST_CHUNK}.")
    if config.vocab_size > model.vocab_size:
        raise ConfigError(
            f"vocab_size = {config.vocab_size}: the tokenizer has more tokens than the model, which has "
            f"{model.vocab_size}. They do not belong together."
        )
    if config.speculate and not model.mtp.depth:
        raise ConfigError(f"speculate = {config.speculate}: this model has no MTP module to draft with. Set it to 0.")
    if not 0 <= config.speculate < FEW:
        raise ConfigError(f"speculate = {config.speculate}: must be at most {FEW - 1}.")
    if config.slots % shards:
        raise ConfigError(f"slots = {config.slots}: must be a multiple of the mesh's {shards} groups of rows.")
    for problem in (*hybrid_mesh_problems(model, sizes), *width_problems(model, sizes)):
        raise ConfigError(problem)
    for axis in ("context", "stage"):
        if sizes[axis] > 1:
            raise ConfigError(
                f"parallel.{axis} = {sizes[axis]}: generation divides no row and no stack of layers. Set it to 1."
            )
    tensor = sizes["tensor"]
    if config.slots // shards % tensor:
        raise ConfigError(f"slots = {config.slots}: each of {shards} groups' must divide over tensor = {tensor}.")
