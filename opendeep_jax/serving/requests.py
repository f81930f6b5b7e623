"""Conversion of request bodies to prompts and parameters, and of answers to OpenAI's JSON."""

import dataclasses
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from opendeep_jax.generation.answers import Answer, Piece
from opendeep_jax.generation.requests import SamplingParams, TokenLogprob
from opendeep_jax.serving.answers import TextOffsets, chat_logprobs, completion_logprobs, joined_calls
from opendeep_jax.serving.errors import ApiError
from opendeep_jax.serving.schemas import ChatRequest, CompletionRequest, Sampling
from opendeep_jax.serving.service import Limits
from opendeep_jax.text.stream import knows_tools
from opendeep_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from opendeep_jax.generation.scoring import Scored

NONE: Mapping[str, float] = MappingProxyType({})
DEFAULT_COMPLETION_TOKENS = 16
"""Default of OpenAI's API."""


@dataclasses.dataclass
class ApiRequest:
    """One request to the engine, and the format of its answer."""

    head: dict[str, Any]
    """Id, time and model: the same in every chunk of a stream."""
    kinds: tuple[str, str]
    """`object` of a whole answer, and of a chunk."""
    prompts: list[list[int]]
    requests: list[tuple[list[int], SamplingParams]]
    """One for each choice; none if nothing is to be generated."""
    answers: list[Answer]
    opening: Callable[[int], dict[str, Any] | None]
    """The first chunk of a choice, before its text."""
    chunk: Callable[[int, Piece], dict[str, Any]]
    choice: Callable[[int, "Sequence[Scored] | None"], dict[str, Any]]
    """A whole choice; with the log-probabilities of the prompts' tokens from the second on, where they are wanted."""
    stream: bool = False
    stream_usage: bool = False
    scores_prompts: int = -1
    """Alternatives that are wanted at each token of the prompts; -1 for no log-probabilities of prompts at all."""

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield a stream's events before the first text."""
        firsts = (self.opening(index) for index in range(len(self.answers)))
        return (self._chunk_head | {"choices": [first]} for first in firsts if first is not None)

    def add(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the events of what is new of a choice."""
        yield self._chunk_head | {"choices": [self.chunk(index, piece)]}

    def end(self) -> Iterator[dict[str, Any] | str]:
        """Yield the events after the last text."""
        if self.stream_usage:
            yield self._chunk_head | {"choices": [], "usage": self.usage()}
        yield "[DONE]"

    def failed(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the last event of a stream that fails, of the error's body."""
        return body

    def complete(self, scores: "Sequence[Scored] | None") -> dict[str, Any]:
        """Return the whole answer; with log-probabilities of the prompts' tokens where they are wanted."""
        choices = [self.choice(index, scores) for index in range(len(self.answers))]
        return self.head | {"object": self.kinds[0], "choices": choices, "usage": self.usage()}

    @property
    def _chunk_head(self) -> dict[str, Any]:
        return self.head | {"object": self.kinds[1]} | ({"usage": None} if self.stream_usage else {})

    def usage(self) -> dict[str, int]:
        """Counts of tokens so far."""
        read, written = sum(map(len, self.prompts)), sum(answer.tokens for answer in self.answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def completion(
    body: CompletionRequest, tokenizer: Tokenizer, limits: Limits, name: str, defaults: Mapping[str, float] = NONE
) -> ApiRequest:
    """Read a completion request. Raises ApiError for invalid prompts and lengths.

    Args:
        defaults: The model's own sampling, for what the body leaves open.
    """
    prompts = [_encoded(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
    tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    room = [_room(prompt, tokens, "prompt", limits) for prompt in prompts]
    wanted = -1 if body.logprobs is None else body.logprobs
    requests = _requests(body, prompts, room, wanted, tokenizer, limits, defaults) if tokens else []
    many = body.n or 1
    least, stop = body.min_tokens or 0, body.stop_strings
    answers = [Answer(tokenizer, stop, least=least, before=prompt) for prompt in prompts for _ in range(many)]
    if not tokens:
        for answer in answers:
            answer.whole.finish = "length"
    echoed = [(_echo_text(tokenizer, prompt) if body.echo else "") for prompt in body.prompts]
    places = [TextOffsets(tokenizer, len(text), special=False) for text in echoed for _ in range(many)]

    def spelled(index: int, text: str, logprobs: dict | None, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def opening(index: int) -> dict[str, Any] | None:
        return spelled(index, echoed[index // many], None, None) if body.echo else None

    def chunk(index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if wanted >= 0:
            logprobs = completion_logprobs(tokenizer, piece.logprobs, places[index])
        return spelled(index, piece.text, logprobs, piece.finish)

    def choice(index: int, scores: Sequence[Sequence[float]] | None) -> dict[str, Any]:
        whole, prompt, echo = answers[index].whole, prompts[index // many], echoed[index // many]
        logprobs = None
        if wanted >= 0:
            logprobs = completion_logprobs(tokenizer, whole.logprobs, TextOffsets(tokenizer, len(echo), special=False))
        if scores is not None:
            one = scores[index // many]
            tops = one.top or [()] * len(one.logprobs)
            before = [prompt[0], *map(TokenLogprob, prompt[1:], one.logprobs, tops)]
            # A text may lack the begin token, and the space that its first token begins with.
            pieces = b"".join(tokenizer.piece(token, True) for token in prompt)
            lacking = len(pieces.decode("utf-8", "replace")) - len(echo)
            of_prompt = completion_logprobs(tokenizer, before, -lacking)
            logprobs = {key: of_prompt[key] + logprobs[key] for key in logprobs}
        return spelled(index, echo + whole.text, logprobs, whole.finish)

    return ApiRequest(
        _head("cmpl", name), ("text_completion", "text_completion"), prompts, requests, answers, opening, chunk, choice,
        stream=bool(body.stream),
        stream_usage=bool(body.stream_options and body.stream_options.include_usage),
        scores_prompts=wanted if body.echo else -1,
    )  # fmt: skip


def chat(
    body: ChatRequest,
    tokenizer: Tokenizer,
    limits: Limits,
    name: str,
    defaults: Mapping[str, float] = NONE,
    seconds: float = math.inf,
) -> ApiRequest:
    """Read a chat request. Raises ApiError for invalid fields, ConfigError where the template refuses it.

    Args:
        defaults: as for `completion`.
        seconds: The template may take so long; raises TimeoutError then.
    """
    text = rendered(body, tokenizer, seconds)
    prompt = tokenizer.encode(text, special=True)
    tokens = _room(prompt, body.answer_tokens or limits.max_length, "messages", limits)
    wanted = (body.top_logprobs or 0) if body.logprobs else -1
    answers = [Answer(tokenizer, body.stop_strings, text, body.min_tokens or 0) for _ in range(body.n or 1)]

    def logprobs(piece: Piece) -> dict | None:
        return chat_logprobs(tokenizer, piece.logprobs) if wanted >= 0 else None

    def opening(index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def chunk(index: int, piece: Piece) -> dict[str, Any]:
        said = {"reasoning_content": piece.reasoning, "content": piece.text, "tool_calls": piece.calls}
        delta = {key: value for key, value in said.items() if value}
        return {"index": index, "delta": delta, "logprobs": logprobs(piece), "finish_reason": piece.finish}

    def choice(index: int, _) -> dict[str, Any]:
        whole = answers[index].whole
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        if whole.reasoning:
            message["reasoning_content"] = whole.reasoning
        if whole.calls:
            message |= {"content": whole.text or None, "tool_calls": joined_calls(whole.calls)}
        return {"index": index, "message": message, "logprobs": logprobs(whole), "finish_reason": whole.finish}

    requests = _requests(body, [prompt], [tokens], wanted, tokenizer, limits, defaults)
    kinds = "chat.completion", "chat.completion.chunk"
    return ApiRequest(
        _head("chatcmpl", name), kinds, [prompt], requests, answers, opening, chunk, choice,
        stream=bool(body.stream),
        stream_usage=bool(body.stream_options and body.stream_options.include_usage),
    )  # fmt: skip


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return a prompt's ids, with the tokenizer's prefix."""
    return tokenizer.with_prefix(tokenizer.encode(text, special=True))


def _echo_text(tokenizer: Tokenizer, prompt: str | list[int]) -> str:
    """A prompt as it is echoed: a text as it was given, without the begin token that goes before it."""
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt, special=True)


def rendered(body: ChatRequest, tokenizer: Tokenizer, seconds: float = math.inf) -> str:
    """The text of a conversation. Raises ApiError for tools that the model's template or our reading of it lacks."""
    arguments, tools = body.template_arguments, body.tools if body.tool_choice != "none" else None
    called = any(message.tool_calls or message.role == "tool" for message in body.messages)
    if (tools or called) and not knows_tools(tokenizer):
        field = "tools" if tools else "messages"
        raise ApiError(
            400,
            f"{field}: there are no tools here: calls are not read from this model's answers. Leave them out, or put "
            "what they give into the messages.",
            field,
        )
    if tools:
        arguments["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    return tokenizer.apply_chat([message.for_template() for message in body.messages], seconds=seconds, **arguments)


def _room(prompt: list[int], tokens: int, field: str, limits: Limits) -> int:
    """Return the most tokens of an answer: the requested number, cut to what the context leaves. Raises ApiError."""
    if not prompt:
        raise ApiError(400, f"{field}: is empty; the model needs at least one token to go on from.", field)
    if max(prompt) >= limits.vocab_size:
        raise ApiError(400, f"{field}: holds token {max(prompt)}; the model's are 0 to {limits.vocab_size - 1}.", field)
    room = limits.max_length - len(prompt)
    if room < min(tokens, 1):
        raise ApiError(
            400,
            f"This model's context is {limits.max_length:,} tokens, and the prompt has {len(prompt):,}, which "
            "leaves no room for an answer. Shorten the prompt.",
            field,
            "context_length_exceeded",
        )
    return min(tokens, room)


def _requests(
    body: Sampling,
    prompts: list[list[int]],
    tokens: list[int],
    logprobs: int,
    tokenizer: Tokenizer,
    limits: Limits,
    defaults: Mapping[str, float],
) -> list[tuple[list[int], SamplingParams]]:
    """One request for each choice. Seeds count up from the given one inside each prompt, or are drawn at random."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    chosen = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    if "top_k" in chosen:
        chosen["top_k"] = max(chosen["top_k"], 0)  # -1 is vLLM's "all"
    bias = tuple((int(token), float(value)) for token, value in (body.logit_bias or {}).items())
    ends = (*(() if body.ignore_eos else tokenizer.end_ids), *(body.stop_token_ids or ()))
    for field, ids in (("logit_bias", [token for token, _ in bias]), ("stop_token_ids", body.stop_token_ids or ())):
        if ids and max(ids) >= limits.vocab_size:
            last = limits.vocab_size - 1
            raise ApiError(400, f"{field}: names token {max(ids)}; the model's are 0 to {last}.", field)

    def params(most: int, choice: int) -> SamplingParams:
        return SamplingParams(
            **{**defaults, **chosen},
            max_tokens=most,
            seed=secrets.randbits(32) if body.seed is None else (body.seed + choice) % 2**32,
            end_ids=ends,
            logprobs=logprobs,
            logit_bias=bias,
            min_tokens=min(body.min_tokens or 0, most),
        )

    return [
        (prompt, params(most, choice))
        for prompt, most in zip(prompts, tokens, strict=True)
        for choice in range(body.n or 1)
    ]


def _head(prefix: str, name: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
