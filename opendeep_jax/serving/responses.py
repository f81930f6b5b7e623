"""OpenAI's Responses API, `/v1/responses`, for text: conversations and streams of events."""

import itertools
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import Field, ValidationError, field_validator

from opendeep_jax.generation.answers import Piece
from opendeep_jax.serving.answers import joined_calls
from opendeep_jax.serving.errors import ApiError
from opendeep_jax.serving.requests import ApiRequest, chat
from opendeep_jax.serving.schemas import ChatRequest, Strict

INSTEAD = {
    "previous_response_id": "nothing is stored here; send the whole conversation as input",
    "conversation": "nothing is stored here; send the whole conversation as input",
    "background": "answers are not kept here; leave it out, and read the answer or its stream",
    "prompt": "no prompts are stored here; send the text as input",
    "max_tool_calls": "there are no tools of the server's own here; leave it out",
    "context_management": "conversations are not shortened here; shorten input yourself",
}
UNUSED = frozenset({"store", "include", "stream_options", "context_management"})


class ResponseRequest(Strict):
    """POST /v1/responses. What is shared with chat is checked there, under the names that it has there."""

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=10_000)]
    """A question, or a conversation: messages, and the reasoning and calls of earlier answers."""
    instructions: str | None = None
    """Stands before the conversation, as a system message."""
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    stream: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    top_logprobs: Literal[0] | None = None
    tools: list[dict[str, Any]] | None = None
    more: dict[str, Any] = {}
    """Settings of sampling."""
    chat: Any = None
    """The same as a request for chat."""

    @field_validator("text")
    @classmethod
    def _plain(cls, text: dict[str, Any] | None) -> dict[str, Any] | None:
        form = (text or {}).get("format") or {"type": "text"}
        if form != {"type": "text"}:
            raise ValueError("this server cannot bind an answer to JSON or a schema; ask for the form in the input")
        return text


def read(text: bytes) -> ResponseRequest:
    """Return what a body asks. Raises ValidationError, and ApiError for what is refused by name."""
    try:
        return _read(pydantic_core.from_json(text))
    except ValidationError:
        raise
    except ValueError as error:
        name, known, _ = str(error).partition(": ")
        raise ApiError(400, str(error), name if known and name.isidentifier() else None) from error


def _read(body: Any) -> ResponseRequest:
    own, more = {}, {}
    for name, value in body.items() if isinstance(body, dict) else ():
        if value is None or name in UNUSED or (name == "background" and value is False):
            continue
        if name in INSTEAD:
            raise ValueError(f"{name}: {INSTEAD[name]}.")
        (own if name in ResponseRequest.model_fields and name not in ("more", "chat") else more)[name] = value
    asked = ResponseRequest.model_validate((own | {"more": more}) if isinstance(body, dict) else body)
    messages = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    messages += [{"role": "user", "content": asked.input}] if isinstance(asked.input, str) else _messages(asked.input)
    fields = more | {"messages": messages, "stream": asked.stream, "max_completion_tokens": asked.max_output_tokens}
    if effort := (asked.reasoning or {}).get("effort"):
        fields["reasoning_effort"] = effort
    if asked.tools:
        named = [{key: value for key, value in tool.items() if key != "type"} for tool in asked.tools]
        kinds = [tool.get("type") for tool in asked.tools]
        fields["tools"] = [{"type": kind, "function": tool} for kind, tool in zip(kinds, named, strict=True)]
    if asked.model is not None:
        fields["model"] = asked.model
    asked.chat = ChatRequest.model_validate(fields)
    return asked


def _messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the items of a conversation as messages; an answer's reasoning belongs to the message behind it."""
    messages, thought = [], None
    for item in items:
        match item.get("type") or "message":
            case "message":
                message = {name: value for name, value in item.items() if name not in ("type", "id", "status", "phase")}
                if thought and message.get("role") == "assistant":
                    message["reasoning_content"] = thought
                messages.append(message)
                thought = None
            case "reasoning":
                parts = [part for part in item.get("content") or () if isinstance(part, dict)]
                thought = "".join(str(part.get("text", "")) for part in parts)
            case "function_call":
                call = {"name": item.get("name"), "arguments": item.get("arguments")}
                calls = [{"id": item.get("call_id"), "type": "function", "function": call}]
                messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            case "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
            case other:
                raise ValueError(f"input: items of type {str(other)[:40]!r} are not known here; send messages.")
    return messages


def response(body: ResponseRequest, *given: Any, seconds: float) -> "Response":
    """Read a request; arguments and errors are those of `requests.chat`."""
    return Response(body, chat(body.chat, *given, seconds=seconds))


class Response:
    """One response as it grows: as `requests.ApiRequest`, with the events and names of this API.

    Args:
        body: What was asked.
        asked: The same, as chat is asked of the engine; it has one answer.
    """

    scores_prompts = -1

    def __init__(self, body: ResponseRequest, asked: ApiRequest):
        self._request, self._sequence = asked, 0
        self.prompts, self.requests, self.answers, self.stream = (
            asked.prompts, asked.requests, asked.answers, asked.stream
        )  # fmt: skip
        self._ids = {kind: f"{kind}_{secrets.token_hex(12)}" for kind in ("resp", "rs", "msg", "fc")}
        self._done: list[dict[str, Any]] = []
        """Items of the output that are complete."""
        self._open: tuple[str, str] | None = None
        """Kind of the item that grows, and its text so far."""
        self._about = {
            "id": self._ids["resp"],
            "object": "response",
            "created_at": int(time.time()),
            "model": asked.head["model"],
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.more.get("metadata") or {},
            "parallel_tool_calls": bool(body.more.get("parallel_tool_calls", True)),
            "previous_response_id": None,
            "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
            "store": False,
            "temperature": asked.requests[0][1].temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.more.get("tool_choice", "auto"),
            "tools": body.tools or [],
            "top_p": asked.requests[0][1].top_p,
            "truncation": "disabled",
            "user": body.more.get("user"),
        }

    def complete(self, scores: None) -> dict[str, Any]:
        """Return the response, once the answer is complete."""
        for _ in itertools.chain(self.add(0, self.answers[0].whole), self.end()):
            pass
        return self._described()

    def failed(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the last event of a stream that fails, of the error's body."""
        return {"type": "error", **body["error"]}

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield the events before the first text."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._described("in_progress"))

    def add(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the events of what is new."""
        for kind, text in (("reasoning", piece.reasoning), ("message", piece.text)):
            if text:
                if self._open is None or self._open[0] != kind:
                    yield from self._close()
                    yield from self._begin(kind)
                self._open = (kind, self._open[1] + text)
                name = "response.output_text.delta" if kind == "message" else "response.reasoning_text.delta"
                more = {"logprobs": []} if kind == "message" else {}
                yield self._event(name, **self._place(), content_index=0, delta=text, **more)

    def end(self) -> Iterator[dict[str, Any]]:
        """Yield the last events."""
        yield from self._close()
        for number, call in enumerate(joined_calls(self._request.answers[0].whole.calls)):
            item = {"type": "function_call", "id": f"{self._ids['fc']}{number}", "call_id": call["id"]}
            item |= call["function"] | {"status": "completed"}
            place = {"output_index": len(self._done)}
            opened = item | {"arguments": "", "status": "in_progress"}
            yield self._event("response.output_item.added", **place, item=opened)
            where = {"item_id": item["id"], **place}
            arguments = item["arguments"]
            yield self._event("response.function_call_arguments.delta", **where, delta=arguments)
            yield self._event("response.function_call_arguments.done", **where, name=item["name"], arguments=arguments)
            yield self._event("response.output_item.done", **place, item=item)
            self._done.append(item)
        response = self._described()
        yield self._event(f"response.{response['status']}", response=response)

    def _described(self, status: str = "") -> dict[str, Any]:
        cut = self._request.answers[0].whole.finish == "length"
        status = status or ("incomplete" if cut else "completed")
        counts = self._request.usage()
        usage = {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }
        more = {"status": status, "output": list(self._done), "usage": None if status == "in_progress" else usage}
        more["incomplete_details"] = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return self._about | more

    def _begin(self, kind: str) -> Iterator[dict[str, Any]]:
        self._open = kind, ""
        item = self._item(kind, "", "in_progress") | {"content": []}
        yield self._event("response.output_item.added", output_index=len(self._done), item=item)
        yield self._event("response.content_part.added", **self._place(), content_index=0, part=_part(kind, ""))

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._open is None:
            return
        kind, text = self._open
        name = "response.output_text.done" if kind == "message" else "response.reasoning_text.done"
        more = {"logprobs": []} if kind == "message" else {}
        yield self._event(name, **self._place(), content_index=0, text=text, **more)
        yield self._event("response.content_part.done", **self._place(), content_index=0, part=_part(kind, text))
        item = self._item(kind, text, "completed")
        yield self._event("response.output_item.done", output_index=len(self._done), item=item)
        self._done.append(item)
        self._open = None

    def _item(self, kind: str, text: str, status: str) -> dict[str, Any]:
        about: Mapping[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        ids = {"id": self._id(kind), "type": kind, "status": status}
        return {**ids, **about, "content": [_part(kind, text)]}

    def _id(self, kind: str) -> str:
        return f"{self._ids['msg' if kind == 'message' else 'rs']}{len(self._done) or ''}"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._id(self._open[0]), "output_index": len(self._done)}

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence - 1, **more}


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "message":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": text}
