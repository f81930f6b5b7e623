"""Requests to the engine, their results, and the engine's settings. Without JAX."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.model_rules import hybrid_mesh_problems
from opendeep_jax.config.rules import MESH_AXES, ROW_AXES, width_problems
from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.config.sentences import problem

MOST_DRAFTS = 15
"""Tokens that may be drafted for each step of the model."""
SMALLEST_CHUNK = 16
DEFAULT_LENGTH = 4096
MOST_LOGPROBS = 20
"""Alternatives whose log-probabilities a request may ask for."""


@dataclass(frozen=True)
class SamplingParams:
    """Settings of sampling. The filters apply together: top_k first, then top_p and min_p of what it leaves.

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
    """Tokens that end the output, and are no part of it unless `keep_end` is set."""
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
    """Alternatives whose log-probabilities under the model come with each token; 0 the token's own alone, -1 none."""
    drawn_logprobs: bool = False
    """Give each token's log-probability under the distribution that it was drawn from: after penalties, temperature
    and filters. At temperature 0 it is 0: the token was certain."""
    keep_end: bool = False
    """Keep the one of `end_ids` that was sampled: the output's last token, with its log-probabilities."""

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
        """True if logits of single tokens are changed."""
        penalties = self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty
        return bool(penalties or self.logit_bias or (self.min_tokens and self.end_ids))


class TokenLogprob(NamedTuple):
    """A token's log-probability under the model, before penalties, temperature and filters, in nats."""

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


@dataclass(frozen=True)
class EngineConfig:
    """Concurrency and memory of the engine."""

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
    expert_choices: bool = False
    """Keep which experts each token was routed to; the programs are others."""
    kept_tokens: bool = False
    """Keep which tokens each one was drawn among, after top_k, top_p and min_p."""


@dataclass(eq=False)
class Request:
    """A prompt on its way. Only the engine writes here."""

    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    drawn_logprobs: list[float] = field(default_factory=list)
    kept: list[Int[np.ndarray, "n"] | None] = field(default_factory=list)
    """The tokens that each one was drawn among; None for all. Where the engine has `kept_tokens`."""
    experts: list[Int[np.ndarray, "n layers K"]] = field(default_factory=list)
    """The experts of each MoE layer that the tokens in the cache were routed to, in parts. Where the engine has
    `expert_choices`. A sample's last token is in no cache."""
    finish: str | None = None
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    prefilled: int = 0
    """Tokens of the prompt that are in the cache."""
    drafts: list[int] = field(default_factory=list)
    """Tokens that may come next, by the MTP module."""
    group: "Group | None" = None
    """The samples of one prompt that this is one of."""

    samples: "list[Request]" = field(default_factory=list)
    """All that were submitted together, this one among them."""

    @functools.cached_property
    def distinct(self) -> frozenset[int]:
        """The prompt's tokens."""
        return frozenset(self.prompt)

    @property
    def length(self) -> int:
        """Tokens of the prompt and the output so far."""
        return len(self.prompt) + len(self.tokens)


@dataclass(eq=False)
class Group:
    """Samples of one prompt: the first to start prefills it, the others share its pages. Only the engine writes here.

    Whole pages are shared; the last one, which each sample writes on in, is copied, and so are a hybrid's states.
    """

    members: list[Request]
    leader: Request | None = None
    """Request whose prompt is or was prefilled; None before any."""
    pages: list[int] = field(default_factory=list)
    """The prompt's, held until every member has what it needs of them."""
    ready: bool = False
    """True once the whole prompt is in the cache."""
    logits: tuple | None = None
    """Logits of the first tokens: a step's logits, on the devices, and the prompt's row of them."""
    experts: list = field(default_factory=list)
    """`Request.experts` of the prompt."""


class RequestProgress(NamedTuple):
    """Progress of a request in one step."""

    request: Request
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish: str | None
    """`stop`, `length` or `aborted` when it is done."""


class Samples(NamedTuple):
    """Outputs of N requests in columns, T the longest, for reinforcement learning."""

    prompt: Int[np.ndarray, "N"]
    """Index of each sample's prompt."""
    ids: Int[np.ndarray, "N T"]
    """Sampled tokens, the end token included where there is one; 0 behind them."""
    lengths: Int[np.ndarray, "N"]
    ended: Bool[np.ndarray, "N"]
    """True if the end token was sampled; else the length limit was reached."""
    drawn_logprobs: Float[np.ndarray, "N T"]
    """Log-probabilities in the distribution that each token was drawn from; 0 after the end."""
    logprobs: Float[np.ndarray, "N T"]
    """Log-probabilities of the model, before penalties, temperature and filters."""
    kept: list[list[Int[np.ndarray, "n"] | None]]
    """Kept-token sets, as in `Request.kept`."""
    experts: list[Int[np.ndarray, "length layers K"] | None]
    """Expert choices for each request's prompt and output but its last token; None where the engine keeps none."""


class EngineStats(NamedTuple):
    """Counters of the engine: current, and since the start."""

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
    """Cut tokens of each text from its start on, and the token after each of them; 0 if none.

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


def columns(requests: Sequence[Request], prompt: Sequence[int]) -> Samples:
    """Return finished requests that asked for both kinds of log-probabilities in columns.

    Args:
        prompt: which prompt each request's is.
    """
    lengths = np.array([len(request.tokens) for request in requests], np.int32)
    ids = np.zeros((len(requests), max(lengths, default=0)), np.int32)
    drawn, own = np.zeros((2, *ids.shape), np.float32)
    for row, request in enumerate(requests):
        count = lengths[row]
        ids[row, :count], drawn[row, :count] = request.tokens, request.drawn_logprobs
        own[row, :count] = [one.logprob for one in request.logprobs]
    ended = np.array([request.finish == "stop" for request in requests], bool)
    experts = [np.concatenate(request.experts) if request.experts else None for request in requests]
    kept = [request.kept for request in requests]
    return Samples(np.array(prompt, np.int32), ids, lengths, ended, drawn, own, kept, experts)


def check_settings(config: EngineConfig, model: ModelConfig, mesh_sizes: Mapping[str, int]) -> None:
    """Raise ConfigError for invalid settings.

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
    if config.speculate > MOST_DRAFTS:
        raise ConfigError(f"speculate = {config.speculate}: must be at most {MOST_DRAFTS}.")
    if config.expert_choices and not model.num_moe_layers:
        raise ConfigError("expert_choices: this model has no experts. Leave it out.")
    if config.slots % shards:
        raise ConfigError(f"slots = {config.slots}: must be a multiple of the mesh's {shards} groups of rows.")
    for found in (*hybrid_mesh_problems(model, sizes), *width_problems(model, sizes)):
        raise ConfigError(found)
    for axis in ("context", "stage"):
        if sizes[axis] > 1:
            raise ConfigError(
                f"parallel.{axis} = {sizes[axis]}: generation divides no row and no stack of layers. Set it to 1."
            )
    tensor = sizes["tensor"]
    if config.slots // shards % tensor:
        raise ConfigError(f"slots = {config.slots}: each of {shards} groups' must divide over tensor = {tensor}.")


def check_request(
    prompt: Sequence[int], params: SamplingParams, max_length: int, vocab_size: int, config: EngineConfig
) -> None:
    """Raise ConfigError for a prompt that is empty, too long, or has tokens that the model lacks, and for parameters
    that the engine's settings rule out.

    Args:
        max_length: tokens of prompt and output together.
        vocab_size: the model's.
    """
    if not prompt:
        raise ConfigError("The prompt is empty: it needs at least one token, such as the one that begins a text.")
    if len(prompt) >= max_length:
        raise ConfigError(
            f"The prompt has {len(prompt)} tokens, and prompt and output together may have {max_length}. "
            "Shorten it, or start with a greater max_length."
        )
    unknown = [token for token in prompt if not 0 <= token < vocab_size]
    if unknown:
        raise ConfigError(f"The prompt holds the token {unknown[0]}; the model's are 0 to {vocab_size - 1}.")
    if params.adjusts and config.speculate:
        raise ConfigError(
            "Penalties, logit_bias and min_tokens change what follows each single token, and this engine guesses "
            "several ahead. Leave them out, or start it with speculate = 0."
        )
