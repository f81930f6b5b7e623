"""An answer's tokens as thinking, text and tool calls, while they come: for server, terminal and evaluation."""

from collections.abc import Iterable, Sequence

from opendeep_jax.text.codec import TextCodec
from opendeep_jax.text.harmony import Spoken
from opendeep_jax.text.stream import HARMONY, THINK, Marks, StopStrings, TextStream, thinking_stream


class AnswerStream:
    """Tells an answer from the thinking before it. Stop strings end the answer; in the thinking they are just text.

    Args:
        codec: Turns tokens to text.
        stop: The answer ends before any of these strings.
        conversation: The rendered conversation that is answered; thinking is told apart if the model thinks. None for
            a text that just goes on.
        least: No stop string ends it before it has so many tokens.
        before: Ids of a text that just goes on.
    """

    def __init__(
        self,
        codec: TextCodec,
        stop: Sequence[str] = (),
        conversation: str | None = None,
        least: int = 0,
        before: Sequence[int] = (),
    ):
        marks = None if conversation is None else thinking_marks(codec)
        special = marks is not None and not codec.special_ids.isdisjoint(codec.encode(marks.opening, special=True))
        # Special tokens are seen as tokens alone, unless they are text.
        seen = () if special else [text for text in stop if codec.library.token_to_id(text) in codec.special_ids]
        self._text = TextStream(codec, () if least else seen, special, before)
        self._thinking = marks and thinking_stream(marks, conversation)
        self._answer, self._least = StopStrings(() if least else stop), least
        self._stop, self._seen, self._tokens = stop, seen, 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._text.stopped or self._answer.stopped

    def push(self, ids: Iterable[int]) -> Spoken:
        """Takes the next tokens; returns what is certain now."""
        ids = list(ids)
        spoken = self._spoken(self._text.push(ids), final=False)
        self._tokens += len(ids)
        if self._least and self._tokens >= self._least:
            self._answer, self._least = StopStrings(self._stop), 0
            self._text.stop_at(self._seen)
        return spoken

    def finish(self) -> Spoken:
        """The rest, when no more tokens come."""
        return self._spoken(self._text.finish(), final=True)

    def _spoken(self, text: str, final: bool) -> Spoken:
        thinking, answer, calls = "", text, ()
        if self._thinking:
            said = self._thinking.push(text)
            thinking, answer, calls = said.thinking, said.answer, said.calls
            if final:
                rest = self._thinking.finish()
                thinking, answer, calls = thinking + rest.thinking, answer + rest.answer, calls + rest.calls
        return Spoken(thinking, self._answer.cut(answer) + (self._answer.rest() if final else ""), calls)


class AnswerText:
    """The text of an `AnswerStream` alone; tool calls are their arguments, thinking is left out."""

    def __init__(self, stream: AnswerStream):
        self._stream = stream

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._stream.stopped

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next tokens; returns the text that is certain now."""
        return _text(self._stream.push(ids))

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        return _text(self._stream.finish())


def _text(spoken: Spoken) -> str:
    return spoken.answer + "".join(call.arguments for call in spoken.calls)


def thinking_marks(codec: TextCodec) -> Marks | None:
    """Return how the model writes that it thinks, as its chat template tells; None if it does not."""
    template = codec.chat_template or ""
    if "<|channel|>" in template:
        return HARMONY
    return THINK if THINK.closing in template or THINK.opening in template else None


def knows_tools(codec: TextCodec) -> bool:
    """Return whether a model's template takes tools, and its answers are read for calls of them."""
    return thinking_marks(codec) is HARMONY and "tools" in (codec.chat_template or "")
