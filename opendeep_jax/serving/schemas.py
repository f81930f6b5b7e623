"""Bodies of requests, as OpenAI's API spells them. A field that this server cannot honor is refused, not ignored."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from opendeep_jax.generation.requests import MOST_LOGPROBS

MAX_CHOICES = 128
"""Prompts times `n` of one request."""

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]

ABOUT = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prediction", "request_id",
    "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "cache_salt", "priority",
    "spaces_between_special_tokens", "parallel_tool_calls"})  # fmt: skip
"""Fields that are said about a request, or of how its answer travels, rather than asked of it: taken, and unused."""
NEUTRAL: dict[str, Any] = {"modalities": ["text"], "verbosity": "medium", "function_call": "none", "functions": [],
    "suffix": "", "length_penalty": 1, "use_beam_search": False, "early_stopping": False, "typical_p": 1,
    "skip_special_tokens": True, "include_stop_str_in_output": False, "add_generation_prompt": True,
    "continue_final_message": False, "add_special_tokens": False, "do_sample": True, "num_beams": 1,
    "num_return_sequences": 1, "no_repeat_ngram_size": 0, "return_token_ids": False,
    "return_tokens_as_token_ids": False, "return_full_text": False}  # fmt: skip
"""Settings of others that this server lacks, at the one value that changes nothing."""
CURES = {
    "audio": "this server reads and writes text alone; leave it out",
    "modalities": 'this server reads and writes text alone; leave it out, or give ["text"]',
    "functions": "there are no tools here; leave functions out, and describe them in the messages",
    "function_call": "there are no tools here; leave it out",
    "web_search_options": "this server reaches no web; leave it out, and put what was found into the messages",
    "suffix": "this server goes on with a prompt and fills nothing in; leave it out",
    "guided_json": "this server cannot bind an answer to a schema; ask for the form in words",
    "guided_regex": "this server cannot bind an answer to a pattern; ask for the form in words",
    "guided_choice": "this server cannot bind an answer to a choice; ask for it in words, or use logit_bias",
    "guided_grammar": "this server cannot bind an answer to a grammar; ask for the form in words",
    "use_beam_search": "this server samples; leave it out",
}
"""Cures for settings that would change the answer and that this server lacks."""


class Strict(BaseModel):
    """No unknown fields but null ones, which are not given; no number in quotes, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False
    """A last chunk with the token counts."""
    include_obfuscation: bool = False
    """Taken, and unused: chunks are never padded."""
    continuous_usage_stats: Literal[False] = False


class Sampling(Strict):
    """Fields that completions and chat share."""

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
    presence_penalty: Penalty | None = None
    """Off the logit of each token that the answer has already."""
    frequency_penalty: Penalty | None = None
    """Off the logit of each token, as often as the answer has it."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    """Divides positive logits of tokens that prompt or answer have, and multiplies others. Not in OpenAI's API."""
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    """Bias added to the logits of tokens, by their ids."""
    ignore_eos: bool | None = None
    """Write on after the end-of-text token, up to max_tokens: for measurements. Not in OpenAI's API."""
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=64)] | None = None
    """Tokens that end the answer too, and are no part of it. Not in OpenAI's API."""
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Nothing ends the answer before it has so many tokens. Not in OpenAI's API."""

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @model_validator(mode="before")
    @classmethod
    def _without_effect(cls, data: Any) -> Any:
        """Drop fields that change nothing; refuse those that would change the answer by name, with a cure."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None or name in ABOUT:
                continue
            neutral = NEUTRAL.get(name)
            if name in NEUTRAL and value == neutral and isinstance(value, bool) == isinstance(neutral, bool):
                continue
            if name not in cls.model_fields and (name in CURES or name in NEUTRAL):
                cure = CURES.get(name, f"this server knows it only as {NEUTRAL.get(name)!r}; leave it out")
                raise ValueError(f"{name}: {cure}.")
            kept[name] = value
        return kept

    @field_validator("logit_bias")
    @classmethod
    def _by_id(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        unknown = next((token for token in bias or {} if not (token.isascii() and token.isdecimal())), None)
        if unknown is not None:
            raise ValueError(f"{unknown[:40]!r} is no token's id; give ids, such as {{'42': -100}}")
        return bias

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

    type: Literal["text", "input_text", "output_text"]
    text: str
    # Marks of other servers, which change no answer.
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Any = None


class Function(Strict):
    """Function that a tool call calls."""

    name: str
    arguments: str = ""


class ToolCall(Strict):
    """A call of a tool in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the call as chat templates read it."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Tool(Strict):
    """A tool that the model may call: a function, by its JSON schema."""

    type: Literal["function"]
    function: dict[str, Any]


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    """Thinking of an earlier answer, for templates that use it."""
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None
    # What answers of this and other servers carry beside their text, sent back with them.
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    provider_specific_fields: Any = None
    cache_control: Any = None
    id: Any = None
    parsed: Any = None

    @model_validator(mode="before")
    @classmethod
    def _thought(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("reasoning"), str):
            rest = {name: value for name, value in data.items() if name != "reasoning"}
            return {"reasoning_content": data["reasoning"]} | rest
        return data

    @field_validator("content", mode="before")
    @classmethod
    def _text_alone(cls, content: Any) -> Any:
        kinds = [part.get("type") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        unknown = next((kind for kind in kinds if isinstance(kind, str) and not kind.endswith("text")), None)
        if unknown:
            raise ValueError(f"{unknown[:40]} parts: this model reads text alone; leave them out, or describe them")
        return content

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates read it; arguments of tool calls are values, as templates write them."""
        content = self.content or self.refusal or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        more = {"name": self.name, "reasoning_content": self.reasoning_content, "tool_call_id": self.tool_call_id}
        if self.tool_calls:
            more["tool_calls"] = [call.for_template() for call in self.tool_calls]
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
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    """Tools, for models whose template and answers know tools (gpt-oss); others refuse them."""
    tool_choice: Literal["none", "auto"] | None = None

    @field_validator("response_format")
    @classmethod
    def _plain(cls, form: dict[str, Any] | None) -> dict[str, Any] | None:
        if form and form != {"type": "text"}:
            kind = str(form.get("type"))[:40]
            raise ValueError(
                f"{kind}: this server cannot bind an answer to JSON or a schema; ask for the form in the messages, and "
                "leave response_format out"
            )
        return form

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _free(cls, choice: Any) -> Any:
        if choice not in ("none", "auto"):
            raise ValueError('this server cannot make a model call a tool; give "auto" or "none", or leave it out')
        return choice

    @property
    def answer_tokens(self) -> int | None:
        """Longest answer, under whichever name it came."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Return the chat template's arguments besides the messages."""
        given = dict(self.chat_template_kwargs or {})
        return given | ({"reasoning_effort": self.reasoning_effort} if self.reasoning_effort else {})

    @model_validator(mode="after")
    def _logprobs_belong_together(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs = true.")
        taken = {"messages", "add_generation_prompt", "seconds", "template", "special"} & set(
            self.chat_template_kwargs or {}
        )
        if taken:
            raise ValueError(f"chat_template_kwargs: {', '.join(sorted(taken))} is given by the server.")
        return self


def first_problem(error: ValidationError) -> tuple[str, str | None]:
    """Return the first error of a body, as one sentence and the field's name (None for the body as a whole)."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    field = _field(found[0]["loc"])
    said = list(dict.fromkeys(_words(each) for each in found if _field(each["loc"]) == field))
    sentence = ", or: ".join(said[:4]).replace("Value error, ", "")
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
