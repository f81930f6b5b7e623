"""Text as it is generated: tokens in, certain text out; stop strings; and a model's thinking apart from its answer."""

from collections.abc import Iterable
from typing import NamedTuple

from opendeep_jax.text.codec import TextCodec
from opendeep_jax.text.harmony import HarmonyStream
from opendeep_jax.text.spelling import Speech


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
        """Whether a stop string has ended the text; what is pushed afterwards gives nothing."""
        return self.matched is not None

    def cut(self, new: str) -> str:
        """Takes the next text; returns what is certain now."""
        if self.stopped:
            return ""
        text = self._held + new
        ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self.stop if stop in text]
        if ends:
            end, _, self.matched = min(ends)
            self._held = ""
            return text[: end - len(self.matched)]
        kept = max((_begun(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        rest, self._held = self._held, ""
        return "" if self.stopped else rest


class TextStream(StopStrings):
    """One request's tokens turned into text while they come.

    Nothing is given out that a later token could change: no half character, and nothing that may be the beginning of a
    stop string. Each token is looked at once. The text ends before the first stop string that becomes complete,
    wherever the tokens' bounds lie; of two that end together, before the longer.
    """

    def __init__(self, codec: TextCodec, stop: Iterable[str] = (), special: bool = False, before: Iterable[int] = ()):
        """
        Args:
            codec: The model's.
            stop: Texts that end the text, and are no part of it; empty ones count for nothing. The name of a special
                token ends it at that token.
            special: Whether special tokens are text.
            before: Ids of the text that this one goes on with: behind them a first word keeps its space.
        """
        self.codec, self.special = codec, special
        self.stop_at(stop)
        self.matched: str | None = None
        """The stop string that ended the text."""
        begun = any(codec.piece(i) for i in before)
        self._speech = Speech(codec.spelling, () if special else codec.special_ids, begun)
        self._held = ""

    def stop_at(self, stop: Iterable[str]) -> None:
        """Ends the text before the first of these from now on."""
        self.stop = tuple(text for text in stop if text)
        self._stop_ids = {} if self.special else self.codec.stop_ids(self.stop)

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next tokens; returns the text that is certain now."""
        if not self._stop_ids:
            return self.cut(self._speech.push(ids))
        text = ""
        for i in ids:
            if i in self._stop_ids and not self.stopped:
                text += self.finish()
                self.matched = self.matched or self._stop_ids[i]
                break
            text += self.cut(self._speech.push((i,)))
        return text

    def finish(self) -> str:
        """The rest, when no more tokens come; a half character is U+FFFD, as in `TextCodec.decode`."""
        text = self.cut(self._speech.finish())
        if self.stopped:
            return text
        rest, self._held = self._held, ""
        return text + rest


def _begun(text: str, mark: str) -> int:
    """Characters at the text's end that are a beginning of the mark, the most there are."""
    last = text[-1:]
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark[size - 1] == last and text.endswith(mark[:size]):
            return size
    return 0


class Marks(NamedTuple):
    """How a family writes that it thinks, and that it has thought."""

    opening: str
    closing: str
    answering: str = ""
    """Begins an answer without thinking, and is no part of it."""


THINK = Marks("<think>", "</think>")
"""DeepSeek-R1, Qwen 3."""
HARMONY = Marks("<|channel|>analysis<|message|>", "<|end|>")
"""gpt-oss: channels by a grammar of their own (`text/harmony.py`); they are special tokens, so decode with special."""


class Said(NamedTuple):
    """Text of a model: what it thought, and what it answered."""

    thinking: str
    answer: str
    calls = ()
    """Tool calls, which texts of these families have none of."""


def thinking_stream(marks: Marks, prompt: str = "") -> "ThinkingStream | HarmonyStream":
    """Return what tells the thinking of a family from its answer.

    Args:
        prompt: What the text goes on from.
    """
    return HarmonyStream(prompt) if marks is HARMONY else ThinkingStream(opens_thinking(prompt, marks), marks)


def opens_thinking(prompt: str, marks: Marks = THINK) -> bool:
    """Whether the prompt's end has opened the thinking already, as DeepSeek-R1's template does."""
    return prompt.rstrip().endswith(marks.opening)


def split_thinking(text: str, opened: bool = False, marks: Marks = THINK) -> Said:
    """A whole text's thinking and answer, without the marks and the space around them.

    Tool calls are given as their arguments, in the answer.

    `split_thinking("<think>\\nHm.\\n</think>\\n\\n42")` is `Said("Hm.", "42")`.

    Args:
        opened: The prompt has opened the thinking.
        marks: The family's.
    """
    if marks is HARMONY:
        stream = HarmonyStream("<|start|>assistant" + HARMONY.opening if opened else "")
    else:
        stream = ThinkingStream(opened, marks)
    parts = stream.push(text), stream.finish()
    said = [(part.thinking, part.answer + "".join(call.arguments for call in part.calls)) for part in parts]
    return Said("".join(thinking for thinking, _ in said), "".join(answer for _, answer in said))


class ThinkingStream:
    """`split_thinking` for text that comes piece by piece; what it gives, put together, is the same."""

    def __init__(self, opened: bool = False, marks: Marks = THINK):
        self.marks = marks
        self._state = "thinking" if opened else "before"
        self._held, self._begun = "", False

    def push(self, text: str) -> Said:
        """Takes the next text; returns what of it is certain now."""
        self._held += text
        thinking, answer = "", ""
        if self._state == "before":
            self._decide(final=False)
        if self._state == "thinking":
            thinking = self._thought()
        if self._state == "answer":
            answer = self._answered()
        return Said(thinking, answer)

    def finish(self) -> Said:
        """The rest, when no more text comes."""
        if self._state == "before":
            self._decide(final=True)
        rest, self._held = self._held, ""
        if self._state == "thinking":
            return Said((rest if self._begun else rest.lstrip()).rstrip(), "")
        return Said("", rest if self._begun else rest.lstrip())

    def _decide(self, final: bool) -> None:
        """Finds out with what the text begins, once there is enough of it."""
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
        certain = text[: len(text) - _begun(text, self.marks.closing)].rstrip()
        self._held, self._begun = text[len(certain) :], self._begun or bool(certain)
        return certain

    def _answered(self) -> str:
        text = self._held if self._begun else self._held.lstrip()
        self._held, self._begun = "", self._begun or bool(text)
        return text
