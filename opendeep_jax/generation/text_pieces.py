"""Outputs as text while they are written. What makes text of tokens is handed in: the engine itself knows none."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from opendeep_jax.generation.engine import Engine
    from opendeep_jax.generation.requests import Request


class Stream(Protocol):
    """One output's tokens turned into text, as `text/stream.py:TextStream` does."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next tokens; returns the text that is certain now."""

    def finish(self) -> str:
        """The rest, when no more tokens come."""


class TextPiece(NamedTuple):
    """What came of one of the requests."""

    place: int
    """The request's, in their list."""
    text: str
    finish: str | None
    """`stop`, `length` or `aborted` with its last piece."""


def text_pieces(engine: "Engine", requests: "Sequence[Request]", streams: Sequence[Stream]) -> Iterator[TextPiece]:
    """Runs requests until each has ended, or its stream has stopped; yields pieces as they come.

    The engine is idle at the end.

    Args:
        requests: just submitted, and no others are on their way.
        streams: of each request.
    """
    places = {request: place for place, request in enumerate(requests)}
    while places:
        for progress in engine.step():
            place = places.get(progress.request)
            if place is None:
                continue
            stream, finish = streams[place], progress.finish
            text = stream.push(progress.tokens)
            if finish and not stream.stopped:
                text += stream.finish()
            if stream.stopped or finish:
                del places[progress.request]
                if not finish:
                    engine.abort(progress.request)
                yield TextPiece(place, text, "stop" if stream.stopped else finish)
            elif text:
                yield TextPiece(place, text, None)
    while engine.busy:  # what was stopped gives its pages back
        engine.step()
