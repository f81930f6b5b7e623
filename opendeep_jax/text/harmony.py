"""gpt-oss' channels: a stream of messages, each with a header that says whose it is, read piece by piece.

    message = [<|start|> role] [to=RECIPIENT] [<|channel|> CHANNEL [to=RECIPIENT]] [[<|constrain|>] TYPE]
              <|message|> text (<|end|> | <|return|> | <|call|>)

What a message becomes: analysis is thinking; final is the answer; a message to functions.NAME is a tool call; another
tool's (python, browser) is thinking. Commentary to nobody tells a user what comes next: it is the answer where the
answer itself never comes, such as before a tool call, and thinking where a final message follows.
"""

import re
from typing import NamedTuple

CONTROL = re.compile(
    r"<\|(start|message|channel|constrain|end|return|call|startoftext|endoftext|endofprompt|refusal|untrusted|"
    r"endofuntrusted|reserved_\d+)\|>"
)
BEGUN = re.compile(r"<(?:\|(?:[a-z_]{1,20}\d{0,9}\|?)?)?\Z")
"""A text's end that may become a control token."""
RECIPIENT = re.compile(r"\bto=(\S+)")
HEADER = re.compile(r"\s*(?:assistant\b)?\s*(?:to=\S*)?\s*(?:\bjson\b)?\s*\Z")
"""Words before a channel."""
WORDS = ("assistant", "to=", "json")


class CallDelta(NamedTuple):
    """The new part of a tool call."""

    index: int
    """Number of the call in the text."""
    name: str
    """The function's, with its first piece; else empty."""
    arguments: str


class TextDelta(NamedTuple):
    """The new part of a text."""

    thinking: str = ""
    answer: str = ""
    calls: tuple[CallDelta, ...] = ()


class HarmonyStream:
    """Read what a model writes, piece by piece; what it gives, put together, does not depend on the pieces.

    A text without a header is the answer as it is. No control token, and nothing of a header, is in what is given.

    Args:
        prompt: What the text goes on from; its last message may be open.
    """

    def __init__(self, prompt: str = ""):
        self._held = ""
        self._header: str | None = ""
        """Text of the header so far; None inside of a message."""
        self._kind = ""
        self._marked = False
        """True once the header has had a control token: from there on it is no plain text."""
        self._controlled = False
        """True once there was a control token."""
        self._begun = {"thinking": False, "answer": False}
        """Kinds of which text was given already."""
        self._fresh = True
        """True until text of the message was given."""
        self._preamble = ""
        self._calls = 0
        start = prompt.rfind("<|start|>assistant")
        if start >= 0:
            self.push(prompt[start:].rstrip())
            self._begun, self._preamble, self._controlled = {"thinking": False, "answer": False}, "", False
            if self._header == "assistant":
                self._header, self._marked = "", False

    def push(self, text: str) -> TextDelta:
        """Take the next text; return what of it is certain now."""
        return self._read(self._held + text, final=False)

    def finish(self) -> TextDelta:
        """Return the rest at the end of the text. An incomplete header gives nothing."""
        return self._read(self._held, final=True)

    def _read(self, text: str, final: bool) -> TextDelta:
        out = _Deltas()
        at = 0
        for found in CONTROL.finditer(text):
            self._read_text(text[at : found.start()], out, final=True)
            self._control(found[1], out)
            at = found.end()
        rest, self._held = text[at:], ""
        if not final and (begun := BEGUN.search(rest)):
            rest, self._held = rest[: begun.start()], rest[begun.start() :]
        self._read_text(rest, out, final=False)
        if final:
            self._check_header(out, final=True)
            self._append_preamble(out, "answer")
        return TextDelta(out.text["thinking"], out.text["answer"], tuple(out.calls))

    def _read_text(self, text: str, out: "_Deltas", final: bool) -> None:
        """Read text between control tokens."""
        if self._header is None:
            self._append_open(text, out)
        else:
            self._header += text
            if not final:
                self._check_header(out, final=False)

    def _check_header(self, out: "_Deltas", final: bool) -> None:
        """Treat a malformed header as text of an answer without a header."""
        header = self._header
        if header is None or self._marked or not header.strip():
            return
        words = header.split()
        begun = not header[-1:].isspace() and any(word.startswith(words[-1]) for word in WORDS)
        may = HEADER.match(header) or (begun and HEADER.match(header[: len(header) - len(words[-1])]))
        if not may or (final and not (self._controlled and HEADER.match(header))):
            self._open("answer")
            self._append_open(header, out)

    def _control(self, name: str, out: "_Deltas") -> None:
        self._controlled = True
        if name == "message":
            if self._header is not None:
                self._open(self._kind_of(self._header), out, self._header)
        elif name in ("channel", "constrain"):
            if self._header is None:  # a message that was never closed
                self._close()
            self._header = f"{self._header or ''}<|{name}|>"
            self._marked = True
        elif name in ("start", "end", "return", "call"):
            if self._header is not None and not self._marked and name != "start":
                self._check_header(out, final=True)
            self._close()
            self._marked = name == "start"

    def _kind_of(self, header: str) -> str:
        channel = re.search(r"<\|channel\|>\s*(\w*)", header)
        recipient = RECIPIENT.search(header)
        to = recipient[1].partition("<|")[0] if recipient else ""
        role = re.match(r"\s*([\w.]+)(?!\S*=)", RECIPIENT.sub("", header).partition("<|")[0])
        if role and role[1] not in ("assistant", "json"):
            return "thinking"  # what the model makes others say
        if to.startswith("functions."):
            return "call"
        if to and to not in ("assistant", "user", "all"):
            return "thinking"
        return {"analysis": "thinking", "commentary": "preamble"}.get(channel[1] if channel else "", "answer")

    def _open(self, kind: str, out: "_Deltas | None" = None, header: str = "") -> None:
        if out is not None:
            self._append_preamble(out, "thinking" if kind == "answer" else "answer" if kind == "call" else "")
        self._kind, self._header, self._fresh, self._marked = kind, None, True, False
        if kind == "call" and out is not None:
            name = RECIPIENT.search(header)[1].partition("<|")[0].removeprefix("functions.")
            out.calls.append(CallDelta(self._calls, name, ""))

    def _close(self) -> None:
        if self._header is None and self._kind == "call":
            self._calls += 1
        self._header, self._kind = "", ""

    def _append_open(self, text: str, out: "_Deltas") -> None:
        """Append text to the open message."""
        if not text:
            return
        if self._kind == "call":
            out.calls.append(CallDelta(self._calls, "", text))
        elif self._kind == "preamble":
            self._preamble += "\n" * (self._fresh and bool(self._preamble)) + text
            self._fresh = False
        else:
            self._append(self._kind, text, out)

    def _append(self, kind: str, text: str, out: "_Deltas") -> None:
        apart = "\n" * (self._fresh and self._begun[kind])
        out.text[kind] += apart + text
        self._begun[kind], self._fresh = True, False

    def _append_preamble(self, out: "_Deltas", kind: str) -> None:
        if self._preamble and kind:
            self._fresh = True
            self._append(kind, self._preamble, out)
            self._preamble = ""


class _Deltas:
    """Accumulator of the result of one push."""

    def __init__(self):
        self.text = {"thinking": "", "answer": ""}
        self.calls: list[CallDelta] = []
