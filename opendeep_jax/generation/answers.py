"""Text, thinking and log-probabilities of answers, from the engine's tokens."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from opendeep_jax.generation.requests import Request, RequestProgress, TokenLogprob
from opendeep_jax.text.harmony import CallDelta, TextDelta
from opendeep_jax.text.stream import AnswerStream
from opendeep_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from opendeep_jax.generation.engine import Engine


@dataclasses.dataclass
class Piece:
    """New text of one answer."""

    text: str = ""
    reasoning: str = ""
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Pieces of tool calls, as OpenAI's streams have them."""
    finish: str | None = None
    """`stop`, `length` or `tool_calls` once the answer is complete."""

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.logprobs or self.calls or self.finish)


class Answer:
    """One answer as it grows; `push` gives what is new, `whole` keeps all.

    Args:
        tokenizer: Turns tokens to text.
        stop: The answer ends before any of these strings.
        conversation: The rendered conversation that this answers; its thinking is then told apart, if the model
            thinks. None for a text that just goes on.
        least: No stop string ends it before it has so many tokens.
        before: Ids of a text that just goes on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        conversation: str | None = None,
        least: int = 0,
        before: Sequence[int] = (),
    ):
        self._stream = AnswerStream(tokenizer, stop, conversation, least, before)
        self.whole = Piece()
        self.tokens = 0
        self.submitted, self.first, self.last = time.perf_counter(), 0.0, 0.0

    def push(self, progress: RequestProgress) -> Piece:
        """Take progress of the engine's and return what is new; nothing is taken after a stop string."""
        if self.whole.finish:
            return Piece()
        self.last = time.perf_counter()
        self.first = self.first or self.last
        piece, taken = Piece(finish=progress.finish), 0
        for token in progress.tokens:
            self._add(piece, self._stream.push([token]))
            taken += 1
            if self._stream.stopped:
                piece.finish = "stop"
                break
        self.tokens += taken
        piece.logprobs = list(progress.logprobs[:taken])
        if piece.finish:
            self._add(piece, self._stream.finish())
        if piece.finish == "stop" and (self.whole.calls or piece.calls):
            piece.finish = "tool_calls"
        self.whole.text += piece.text
        self.whole.reasoning += piece.reasoning
        self.whole.calls += piece.calls
        self.whole.logprobs += piece.logprobs
        self.whole.finish = piece.finish
        return piece

    @staticmethod
    def _add(piece: Piece, spoken: TextDelta) -> None:
        piece.reasoning += spoken.thinking
        piece.text += spoken.answer
        piece.calls += map(_spelled, spoken.calls)


def _spelled(call: CallDelta) -> dict[str, Any]:
    """A piece of a tool call; its first one has the name and an id."""
    if not call.name:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def answer_all(
    engine: "Engine",
    requests: Sequence[Request],
    answers: Sequence[Answer],
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Piece]]:
    """Run requests until each one's answer is complete; yield pieces as they come, each with its answer's place.

    The engine is idle at the end, also where whoever takes the pieces goes before.

    Args:
        requests: just submitted, and no others are on their way.
        answers: of each request.
        stopped: asked between steps; once true the answers end where they are.
    """
    places = {request: place for place, request in enumerate(requests)}
    try:
        while places and not stopped():
            for progress in engine.step():
                place = places.get(progress.request)
                if place is None:
                    continue
                piece = answers[place].push(progress)
                if piece.finish:
                    del places[progress.request]
                    if not progress.finish:  # a stop string is nothing that the engine knows of
                        engine.abort(progress.request)
                if piece:
                    yield place, piece
    finally:
        for request in places:
            engine.abort(request)
        while engine.busy:
            engine.step()
