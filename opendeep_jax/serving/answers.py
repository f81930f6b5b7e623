"""Tokens that come back from the engine, as the text, the thinking and the log-probabilities of an answer."""

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from opendeep_jax.data.text_codec import TextCodec
from opendeep_jax.data.text_stream import HARMONY, THINK, Marks, TextStream, ThinkingStream, opens_thinking
from opendeep_jax.generation.params import TokenLogprob

if TYPE_CHECKING:
    from opendeep_jax.generation.engine import Progress


@dataclasses.dataclass
class Piece:
    """What is new of one answer."""

    text: str = ""
    reasoning: str = ""
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish: str | None = None
    """`stop` or `length` once the answer is complete."""

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.logprobs or self.finish)


class Answer:
    """One answer as it grows; `push` gives what is new, `whole` keeps all.

    Args:
        codec: Turns tokens to text.
        stop: The answer ends before any of these strings.
        conversation: The rendered conversation that this answers; its thinking is then told apart, if the model
            thinks. None for a text that just goes on.
    """

    def __init__(self, codec: TextCodec, stop: list[str], conversation: str | None = None):
        marks = None if conversation is None else thinking_marks(codec)
        special = marks is not None and not codec.special_ids.isdisjoint(codec.encode(marks.opening, special=True))
        self._stream = TextStream(codec, stop, special)
        self._thinking = marks and ThinkingStream(opens_thinking(conversation, marks), marks)
        self.whole = Piece()
        self.tokens = 0
        self.submitted, self.first, self.last = time.perf_counter(), 0.0, 0.0

    def push(self, progress: "Progress") -> Piece:
        """Takes progress of the engine's; nothing is taken after a stop string."""
        if self.whole.finish:
            return Piece()
        self.last = time.perf_counter()
        self.first = self.first or self.last
        piece, text, taken = Piece(finish=progress.finish), "", 0
        for token in progress.tokens:
            text += self._stream.push([token])
            taken += 1
            if self._stream.stopped:
                piece.finish = "stop"
                break
        self.tokens += taken
        piece.logprobs = list(progress.logprobs[:taken])
        if piece.finish:
            text += self._stream.finish()
        if self._thinking:
            piece.reasoning, piece.text = self._thinking.push(text)
            if piece.finish:
                reasoning, rest = self._thinking.finish()
                piece.reasoning, piece.text = piece.reasoning + reasoning, piece.text + rest
        else:
            piece.text = text
        self.whole.text += piece.text
        self.whole.reasoning += piece.reasoning
        self.whole.logprobs += piece.logprobs
        self.whole.finish = piece.finish
        return piece


def thinking_marks(codec: TextCodec) -> Marks | None:
    """How the model writes that it thinks, as its chat template tells; None if it does not."""
    template = codec.chat_template or ""
    if "<|channel|>" in template:
        return HARMONY
    return THINK if THINK.closing in template or THINK.opening in template else None


def chat_logprobs(codec: TextCodec, entries: list[TokenLogprob]) -> dict[str, Any]:
    """Log-probabilities as chat completions give them."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text = codec.decode([token], special=True)
        # A token that is part of a character has no text of its own, so its bytes are not said either.
        return {"token": text, "logprob": _finite(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}

    return {
        "content": [
            one(entry.token, entry.logprob) | {"top_logprobs": [one(token, value) for token, value in entry.top]}
            for entry in entries
        ],
        "refusal": None,
    }


def completion_logprobs(codec: TextCodec, entries: list[TokenLogprob | int], offset: int) -> dict[str, Any]:
    """Log-probabilities as completions give them.

    Args:
        entries: Tokens with theirs; a bare id is a token without, such as a prompt's first.
        offset: Characters of the text before them.
    """
    tokens, values, top, offsets = [], [], [], []
    for entry in entries:
        bare = isinstance(entry, int)
        text = codec.decode([entry if bare else entry.token], special=True)
        tokens.append(text)
        values.append(None if bare else _finite(entry.logprob))
        offsets.append(offset)
        alternatives = (
            {} if bare else {codec.decode([token], special=True): _finite(value) for token, value in entry.top}
        )
        top.append(alternatives or None)
        offset += len(text)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def _finite(logprob: float) -> float:
    """JSON has no -inf; OpenAI's API says -9999 for it."""
    return max(float(logprob), -9999.0)
