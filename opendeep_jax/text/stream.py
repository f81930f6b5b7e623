"""Text as it is generated: tokens in, certain text out; stop strings; and thinking, answer and tool calls apart.

tokens -> TextStream -> text -> ThinkingStream or HarmonyStream -> TextDelta; AnswerStream is all of it
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from opendeep_jax.text.harmony import HarmonyStream, TextDelta
from opendeep_jax.text.spelling import IncrementalDecoder
from opendeep_jax.text.tokenizer import Tokenizer


class StopStrings:
    """Text that ends before the first of some strings that becomes complete, wherever the bounds of its pieces lie.

    Args:
        stop: Empty ones count for nothing.
    """

    def __init__(self, stop: Iterable[str] = ()):
        self.stop = tuple(text for text in stop if text)
        self.matched: str | None = None
        """The string that ended the text."""
        self._held = ""

    @property
    def stopped(self) -> bool:
        """Return whether a stop string has ended the text; what is pushed afterwards gives nothing."""
        return self.matched is not None

    def cut(self, new: str) -> str:
        """Take the next text; return what is certain now."""
        if self.stopped:
            return ""
        text = self._held + new
        ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self.stop if stop in text]
        if ends:
            end, _, self.matched = min(ends)
            self._held = ""
            return text[: end - len(self.matched)]
        kept = max((_partial_match(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """Return what was held back, when no more text comes."""
        rest, self._held = self._held, ""
        return "" if self.stopped else rest


class TextStream(StopStrings):
    """One request's tokens turned into text while they come.

    Nothing is given out that a later token could change: no half character, and nothing that may be the beginning of a
    stop string. Each token is looked at once. The text ends before the first stop string that becomes complete,
    wherever the tokens' bounds lie; of two that end together, before the longer.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Iterable[str] = (), special: bool = False, before: Iterable[int] = ()
    ):
        """
        Args:
            tokenizer: The model's.
            stop: Texts that end the text, and are no part of it; empty ones count for nothing. The name of a special
                token ends it at that token.
            special: Whether special tokens are text.
            before: Ids of the text that this one goes on with: behind them a first word keeps its space.
        """
        super().__init__()
        self.tokenizer, self.special = tokenizer, special
        self.stop_at(stop)
        begun = any(tokenizer.piece(i) for i in before)
        self._decoder = IncrementalDecoder(tokenizer.byte_decoder, () if special else tokenizer.special_ids, begun)

    def stop_at(self, stop: Iterable[str]) -> None:
        """End the text before the first of these from now on."""
        self.stop = tuple(text for text in stop if text)
        self._stop_ids = {} if self.special else self.tokenizer.stop_ids(self.stop)

    def push(self, ids: Iterable[int]) -> str:
        """Take the next tokens; return the text that is certain now."""
        if not self._stop_ids:
            return self.cut(self._decoder.push(ids))
        text = ""
        for i in ids:
            if i in self._stop_ids and not self.stopped:
                text += self.finish()
                self.matched = self.matched or self._stop_ids[i]
                break
            text += self.cut(self._decoder.push((i,)))
        return text

    def finish(self) -> str:
        """Return the rest at the end of the tokens; a half character is U+FFFD, as in `Tokenizer.decode`."""
        return self.cut(self._decoder.finish()) + self.rest()


def _partial_match(text: str, mark: str) -> int:
    """Return the length of the longest suffix of the text that is a prefix of the mark."""
    last = text[-1:]
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark[size - 1] == last and text.endswith(mark[:size]):
            return size
    return 0


class ThinkingMarks(NamedTuple):
    """Marks that begin and end a family's thinking."""

    opening: str
    closing: str
    answering: str = ""
    """Begins an answer without thinking, and is no part of it."""


THINK = ThinkingMarks("<think>", "</think>")
"""DeepSeek-R1, Qwen 3."""
HARMONY = ThinkingMarks("<|channel|>analysis<|message|>", "<|end|>")
"""gpt-oss: channels by a grammar of their own (`text/harmony.py`); they are special tokens, so decode with special."""


def thinking_stream(marks: ThinkingMarks, prompt: str = "") -> "ThinkingStream | HarmonyStream":
    """Return what tells the thinking of a family from its answer.

    Args:
        prompt: What the text goes on from; its end may have opened the thinking, as DeepSeek-R1's template does.
    """
    return HarmonyStream(prompt) if marks is HARMONY else ThinkingStream(prompt.rstrip().endswith(marks.opening), marks)


class ThinkingStream:
    """Tell thinking from answer in text that comes piece by piece, without the marks and the space around them.

    Of the pieces of `<think>\\nHm.\\n</think>\\n\\n42` it gives, put together, the thinking `Hm.` and the answer `42`.

    Args:
        opened: The prompt has opened the thinking.
        marks: The family's.
    """

    def __init__(self, opened: bool = False, marks: ThinkingMarks = THINK):
        self.marks = marks
        self._state = "thinking" if opened else "before"
        self._held, self._begun = "", False

    def push(self, text: str) -> TextDelta:
        """Take the next text; return what of it is certain now."""
        self._held += text
        thinking, answer = "", ""
        if self._state == "before":
            self._decide(final=False)
        if self._state == "thinking":
            thinking = self._thought()
        if self._state == "answer":
            answer = self._answered()
        return TextDelta(thinking, answer)

    def finish(self) -> TextDelta:
        """Return the rest at the end of the text."""
        if self._state == "before":
            self._decide(final=True)
        rest, self._held = self._held, ""
        if self._state == "thinking":
            return TextDelta((rest if self._begun else rest.lstrip()).rstrip(), "")
        return TextDelta("", rest if self._begun else rest.lstrip())

    def _decide(self, final: bool) -> None:
        """Decide whether the text begins with thinking, once there is enough of it."""
        text = self._held.lstrip()
        for mark, state in ((self.marks.opening, "thinking"), (self.marks.answering, "answer")):
            if mark and text.startswith(mark):
                self._state, self._held = state, text[len(mark) :]
                return
        begins = any(mark.startswith(text) for mark in (self.marks.opening, self.marks.answering) if mark)
        if final or not begins:
            self._state, self._begun = "answer", True  # a text without marks is left as it is

    def _thought(self) -> str:
        text = self._held if self._begun else self._held.lstrip()
        before, closing, after = text.partition(self.marks.closing)
        if closing:
            self._state, self._held, self._begun = "answer", after, False
            return before.rstrip()
        certain = text[: len(text) - _partial_match(text, self.marks.closing)].rstrip()
        self._held, self._begun = text[len(certain) :], self._begun or bool(certain)
        return certain

    def _answered(self) -> str:
        text = self._held if self._begun else self._held.lstrip()
        self._held, self._begun = "", self._begun or bool(text)
        return text


class AnswerStream:
    """Tell an answer from the thinking before it. Stop strings end the answer; in the thinking they are just text.

    Args:
        tokenizer: Turns tokens to text.
        stop: The answer ends before any of these strings.
        conversation: The rendered conversation that is answered; thinking is told apart if the model thinks. None for
            a text that just goes on.
        least: No stop string ends it before it has so many tokens.
        before: Ids of a text that just goes on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        conversation: str | None = None,
        least: int = 0,
        before: Sequence[int] = (),
    ):
        marks = None if conversation is None else thinking_marks(tokenizer)
        special = marks is not None and not tokenizer.special_ids.isdisjoint(
            tokenizer.encode(marks.opening, special=True)
        )
        # Special tokens are seen as tokens alone, unless they are text.
        seen = () if special else list(tokenizer.stop_ids(stop).values())
        self._text = TextStream(tokenizer, () if least else seen, special, before)
        self._thinking = marks and thinking_stream(marks, conversation)
        self._answer, self._least = StopStrings(() if least else stop), least
        self._stop, self._seen, self._tokens = stop, seen, 0

    @property
    def stopped(self) -> bool:
        """Return whether a stop string has ended the answer."""
        return self._text.stopped or self._answer.stopped

    def push(self, ids: Iterable[int]) -> TextDelta:
        """Take the next tokens; return what is certain now."""
        ids = list(ids)
        spoken = self._deltas(self._text.push(ids), final=False)
        self._tokens += len(ids)
        if self._least and self._tokens >= self._least:
            self._answer, self._least = StopStrings(self._stop), 0
            self._text.stop_at(self._seen)
        return spoken

    def finish(self) -> TextDelta:
        """Return the rest at the end of the tokens."""
        return self._deltas(self._text.finish(), final=True)

    def _deltas(self, text: str, final: bool) -> TextDelta:
        thinking, answer, calls = "", text, ()
        if self._thinking:
            said = self._thinking.push(text)
            thinking, answer, calls = said.thinking, said.answer, said.calls
            if final:
                rest = self._thinking.finish()
                thinking, answer, calls = thinking + rest.thinking, answer + rest.answer, calls + rest.calls
        return TextDelta(thinking, self._answer.cut(answer) + (self._answer.rest() if final else ""), calls)


def thinking_marks(tokenizer: Tokenizer) -> ThinkingMarks | None:
    """Return how the model writes that it thinks, as its chat template tells; None if it does not."""
    template = tokenizer.chat_template or ""
    if "<|channel|>" in template:
        return HARMONY
    return THINK if THINK.closing in template or THINK.opening in template else None


def knows_tools(tokenizer: Tokenizer) -> bool:
    """Return whether a model's template takes tools, and its answers are read for calls of them."""
    return thinking_marks(tokenizer) is HARMONY and "tools" in (tokenizer.chat_template or "")
