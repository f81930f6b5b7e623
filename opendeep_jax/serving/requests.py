"""From the body of a request to prompts and parameters, and back from answers to OpenAI's JSON."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from opendeep_jax.data.text_codec import TextCodec
from opendeep_jax.generation.params import SamplingParams, TokenLogprob
from opendeep_jax.serving.answers import Answer, Piece, chat_logprobs, completion_logprobs
from opendeep_jax.serving.errors import ApiError
from opendeep_jax.serving.schemas import ChatRequest, CompletionRequest, Sampling
from opendeep_jax.serving.service import Limits

DEFAULT_COMPLETION_TOKENS = 16
"""As OpenAI's API has it."""


@dataclasses.dataclass
class Asked:
    """What one request asks of the engine, and how its answer is spelled."""

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
    choice: Callable[[int, Sequence[Sequence[float]] | None], dict[str, Any]]
    """A whole choice; with the log-probabilities of the prompts' tokens from the second on, where they are wanted."""
    stream: bool = False
    stream_usage: bool = False
    scores_prompts: bool = False

    def usage(self) -> dict[str, int]:
        """Counts of tokens so far."""
        read, written = sum(map(len, self.prompts)), sum(answer.tokens for answer in self.answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def completion(body: CompletionRequest, codec: TextCodec, limits: Limits, name: str) -> Asked:
    """Reads a completion request. Raises ApiError for prompts and lengths that cannot be."""
    prompts = [_encoded(codec, prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
    tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    for prompt in prompts:
        _check_prompt(prompt, tokens, "prompt", "max_tokens", limits)
    wanted = -1 if body.logprobs is None else body.logprobs
    requests = _requests(body, prompts, [tokens] * len(prompts), wanted, codec) if tokens else []
    many = body.n or 1
    answers = [Answer(codec, body.stop_strings) for _ in range(len(prompts) * many)]
    if not tokens:
        for answer in answers:
            answer.whole.finish = "length"
    echoed = [codec.decode(prompt, special=True) if body.echo else "" for prompt in prompts]
    offsets = [len(text) for text in echoed for _ in range(many)]

    def spelled(index: int, text: str, logprobs: dict | None, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def opening(index: int) -> dict[str, Any] | None:
        return spelled(index, echoed[index // many], None, None) if body.echo else None

    def chunk(index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if wanted >= 0:
            logprobs = completion_logprobs(codec, piece.logprobs, offsets[index])
            offsets[index] += sum(map(len, logprobs["tokens"]))
        return spelled(index, piece.text, logprobs, piece.finish)

    def choice(index: int, scores: Sequence[Sequence[float]] | None) -> dict[str, Any]:
        whole, prompt = answers[index].whole, prompts[index // many]
        logprobs, before = None, []
        if wanted >= 0:
            if scores is not None:
                pairs = zip(prompt[1:], scores[index // many], strict=True)
                before = [prompt[0], *(TokenLogprob(token, value, ()) for token, value in pairs)]
            offset = 0 if before else offsets[index]
            logprobs = completion_logprobs(codec, [*before, *whole.logprobs], offset)
        return spelled(index, echoed[index // many] + whole.text, logprobs, whole.finish)

    return Asked(
        _head("cmpl", name), ("text_completion", "text_completion"), prompts, requests, answers, opening, chunk, choice,
        stream=bool(body.stream),
        stream_usage=bool(body.stream_options and body.stream_options.include_usage),
        scores_prompts=bool(body.echo) and wanted >= 0,
    )  # fmt: skip


def chat(body: ChatRequest, codec: TextCodec, limits: Limits, name: str) -> Asked:
    """Reads a chat request. Raises ApiError for lengths that cannot be, ConfigError where the template refuses it."""
    text = codec.apply_chat([message.for_template() for message in body.messages], **body.template_arguments)
    prompt = codec.encode(text, special=True)
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    _check_prompt(prompt, body.answer_tokens or 1, "messages", field, limits)
    tokens = body.answer_tokens or limits.max_length - len(prompt)
    wanted = (body.top_logprobs or 0) if body.logprobs else -1
    answers = [Answer(codec, body.stop_strings, text) for _ in range(body.n or 1)]

    def logprobs(piece: Piece) -> dict | None:
        return chat_logprobs(codec, piece.logprobs) if wanted >= 0 else None

    def opening(index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def chunk(index: int, piece: Piece) -> dict[str, Any]:
        said = {"reasoning_content": piece.reasoning, "content": piece.text}
        delta = {key: value for key, value in said.items() if value}
        return {"index": index, "delta": delta, "logprobs": logprobs(piece), "finish_reason": piece.finish}

    def choice(index: int, _) -> dict[str, Any]:
        whole = answers[index].whole
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        if whole.reasoning:
            message["reasoning_content"] = whole.reasoning
        return {"index": index, "message": message, "logprobs": logprobs(whole), "finish_reason": whole.finish}

    requests = _requests(body, [prompt], [tokens], wanted, codec)
    kinds = "chat.completion", "chat.completion.chunk"
    return Asked(
        _head("chatcmpl", name), kinds, [prompt], requests, answers, opening, chunk, choice,
        stream=bool(body.stream),
        stream_usage=bool(body.stream_options and body.stream_options.include_usage),
    )  # fmt: skip


def _encoded(codec: TextCodec, text: str) -> list[int]:
    """A prompt's ids, begun as the model's own tokenizer would begin a text."""
    return codec.begun(codec.encode(text, special=True))


def _check_prompt(prompt: list[int], tokens: int, field: str, tokens_field: str, limits: Limits) -> None:
    if not prompt:
        raise ApiError(400, f"{field}: is empty; the model needs at least one token to go on from.", field)
    if max(prompt) >= limits.vocab_size:
        raise ApiError(400, f"{field}: holds token {max(prompt)}; the model's are 0 to {limits.vocab_size - 1}.", field)
    # A prompt without room for a single token is itself what is too long.
    too_long = len(prompt) + min(tokens, 1) > limits.max_length
    if too_long or len(prompt) + tokens > limits.max_length:
        cure = "Shorten the prompt." if too_long else "Shorten the prompt, or ask for fewer tokens."
        raise ApiError(
            400,
            f"This model's context is {limits.max_length:,} tokens; the prompt has {len(prompt):,}, and {tokens:,} are "
            f"asked for. {cure}",
            field if too_long else tokens_field,
            "context_length_exceeded",
        )


def _requests(
    body: Sampling, prompts: list[list[int]], tokens: list[int], logprobs: int, codec: TextCodec
) -> list[tuple[list[int], SamplingParams]]:
    """One request for each choice. Seeds count up from the given one inside each prompt, or are drawn at random."""

    def params(most: int, choice: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=most,
            temperature=1.0 if body.temperature is None else float(body.temperature),
            top_k=max(body.top_k or 0, 0),
            top_p=1.0 if body.top_p is None else float(body.top_p),
            min_p=float(body.min_p or 0.0),
            seed=secrets.randbits(32) if body.seed is None else (body.seed + choice) % 2**32,
            end_ids=() if body.ignore_eos else codec.end_ids,
            logprobs=logprobs,
        )

    return [
        (prompt, params(most, choice))
        for prompt, most in zip(prompts, tokens, strict=True)
        for choice in range(body.n or 1)
    ]


def _head(prefix: str, name: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
