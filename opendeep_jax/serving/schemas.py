"""Bodies of requests, as OpenAI's API spells them. A field that this server cannot honour is refused, not ignored."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from opendeep_jax.generation.params import MOST_LOGPROBS

MAX_CHOICES = 128
"""Prompts times `n` of one request."""

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Neutral = Annotated[float, Field(ge=0, le=0, allow_inf_nan=False)]
"""A penalty that this server does not have: only the value that changes nothing."""


class Strict(BaseModel):
    """No unknown fields, no number in quotes, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """What else a stream says."""

    include_usage: bool = False
    """A last chunk with the token counts."""


class Sampling(Strict):
    """What completions and chat share."""

    model: str | None = None
    """Name of the model; the served one if left out."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Answers to each prompt, 1 if left out; each has a seed of its own."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the likeliest token every time; 1 if left out."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample among the likeliest tokens that together have this probability."""
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """Sample among so many likeliest tokens; 0 and -1 are all. Not in OpenAI's API."""
    min_p: Probability | None = None
    """Sample among tokens at least this likely, relative to the likeliest. Not in OpenAI's API."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    """Gives the same answer again; drawn at random if left out."""
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    """The answer ends before any of these."""
    stream: bool | None = None
    """Answer in server-sent events, as it is written."""
    stream_options: StreamOptions | None = None
    presence_penalty: Neutral | None = None
    frequency_penalty: Neutral | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    ignore_eos: bool | None = None
    """Write on after the end-of-text token, up to max_tokens: for measurements. Not in OpenAI's API."""
    # Said about a request rather than asked of it.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @model_validator(mode="after")
    def _options_belong_to_streams(self):
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: only for stream = true.")
        return self


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
    )
    """Text, token ids, or a list of either."""
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Longest answer in tokens, 16 if left out; 0 only with `echo`."""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    """Log-probability of each token, and of so many alternatives."""
    echo: bool | None = None
    """Give the prompt back before the answer, with its log-probabilities if `logprobs` is set."""
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """`prompt` as a list of prompts."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @model_validator(mode="after")
    def _sizes(self):
        choices = len(self.prompts) * (self.n or 1)
        if choices > MAX_CHOICES:
            raise ValueError(f"n: {len(self.prompts)} prompts x n are {choices} choices, at most {MAX_CHOICES} can be.")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 leaves nothing to answer; give at least 1, or echo = true.")
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of: answers are not ranked here; leave it out, or give the same as n.")
        if self.echo and self.logprobs is not None and self.stream:
            raise ValueError("echo: log-probabilities of a prompt are not streamed; leave out stream, or logprobs.")
        return self


class TextPart(Strict):
    """One part of a message's content; this server reads text alone."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    """What an earlier answer thought, for templates that want to see it."""
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates read it."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        more = {"name": self.name, "reasoning_content": self.reasoning_content, "tool_call_id": self.tool_call_id}
        return {"role": self.role, "content": content} | {
            key: value for key, value in more.items() if value is not None
        }


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Longest answer in tokens; all that the context leaves if left out."""
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    reasoning_effort: Annotated[str, StringConstraints(max_length=100)] | None = None
    """Handed to the chat template, as the next one's entries are."""
    chat_template_kwargs: dict[str, str | bool | int | float] | None = None
    """Such as {"enable_thinking": false}. Not in OpenAI's API."""
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def answer_tokens(self) -> int | None:
        """Longest answer, under whichever name it came."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What the chat template gets beside the messages."""
        given = dict(self.chat_template_kwargs or {})
        return given | ({"reasoning_effort": self.reasoning_effort} if self.reasoning_effort else {})

    @model_validator(mode="after")
    def _logprobs_belong_together(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs = true.")
        taken = {"messages", "add_generation_prompt"} & set(self.chat_template_kwargs or {})
        if taken:
            raise ValueError(f"chat_template_kwargs: {', '.join(sorted(taken))} is given by the server.")
        return self


def first_problem(error: ValidationError) -> tuple[str, str | None]:
    """What is wrong with a body, as one sentence and the name of the field (None for the body as a whole)."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    field = _field(found[0]["loc"])
    said = list(dict.fromkeys(_words(each) for each in found if _field(each["loc"]) == field))
    sentence = ", or: ".join(said[:4]).removeprefix("Value error, ")
    if not field and ": " in sentence and found[0]["type"] == "value_error":
        field = sentence.partition(": ")[0]
        return sentence, field
    return f"{field}: {sentence}" if field else sentence, field or None


def _words(problem: Mapping[str, Any]) -> str:
    return "This server has no such setting" if problem["type"] == "extra_forbidden" else problem["msg"]


def _field(place: tuple[int | str, ...]) -> str:
    """`messages.0.content`; what comes after is the alternative that pydantic tried, such as `list[str]`."""
    names = []
    for part in place:
        if isinstance(part, str) and not part.isidentifier() or part == "str":
            break
        names.append(str(part))
    return ".".join(names)
