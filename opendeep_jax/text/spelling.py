"""The bytes that each token adds to a text, by the steps of its tokenizer's own decoder.

`read_byte_decoder(library)` computes them once; `IncrementalDecoder` decodes a stream of tokens to the text that
`library.decode` gives for all of them. A decoder whose tokens have no text of their own is refused.
"""

import codecs
import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import tokenizers

from opendeep_jax.config.checks import ConfigError

LARGEST_ID = 1 << 24
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""SentencePiece's name of a byte."""
CLEANED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
"""Replacements of a WordPiece decoder's clean-up, inside each token."""
REMEDY = "Use a byte-level, SentencePiece, Unigram or WordPiece tokenizer."


@dataclasses.dataclass(frozen=True, eq=False)
class ByteDecoder:
    """Table of the bytes that each token decodes to.

    Instance: of Llama 2, `pieces` of `▁the` is " the", and one leading space is cut off a text's beginning.
    """

    pieces: list[bytes]
    """UTF-8 of each id behind other tokens; parts of characters are possible."""
    silent: frozenset[int] = frozenset()
    """Ids that no token has: they are left out before anything else."""
    first: Mapping[int, bytes] = dataclasses.field(default_factory=dict)
    """UTF-8 of the ids that say something else where they begin a text."""
    last: Mapping[int, bytes] = dataclasses.field(default_factory=dict)
    """UTF-8 of the ids that say something else where they end a text."""
    raw: frozenset[int] = frozenset()
    """Ids of single bytes to fall back on. A run of them that is not UTF-8 is U+FFFD for each of its bytes."""
    strip: tuple[str, int, int] = ("", 0, 0)
    """A character, and how many of it at most are cut off a text's beginning and off its end."""

    def lengths(self, ids: Iterable[int], hidden: Collection[int] = ()) -> list[int]:
        """Bytes that each id adds to the text of all of them; 0 for those outside of the vocabulary and hidden ones."""
        sizes, begun = [], False
        character, cut = self.strip[0].encode(), self.strip[1]
        for i in ids:
            if not 0 <= i < len(self.pieces) or i in self.silent or i in hidden:
                sizes.append(0)
                continue
            piece = self.pieces[i] if begun else self.first.get(i, self.pieces[i])
            begun = True
            while cut and piece:
                if not piece.startswith(character):
                    cut = 0
                    break
                piece, cut = piece[len(character) :], cut - 1
            sizes.append(len(piece))
        return sizes

    def text(self, ids: Iterable[int], hidden: Collection[int] = ()) -> str:
        """Return the text of ids."""
        if not (self.first or self.last or self.raw or self.strip[0]):  # each says the same wherever it stands
            shown = (self.pieces[i] for i in ids if 0 <= i < len(self.pieces) and i not in hidden)
            return b"".join(shown).decode("utf-8", "replace")
        speech = IncrementalDecoder(self, hidden)
        return speech.push(ids) + speech.finish()


class IncrementalDecoder:
    """Incremental decoder of tokens: no text is given out that a later token could change."""

    def __init__(self, spelling: ByteDecoder, hidden: Collection[int] = (), begun: bool = False):
        """
        Args:
            spelling: The tokenizer's.
            hidden: Ids to leave out.
            begun: Text stands before the first id, which then keeps its leading space.
        """
        self.spelling, self.hidden = spelling, hidden
        self._begun = begun
        self._run, self._ending = b"", b""  # bytes to fall back on; the rest of a token that may be the last one
        self._character, self._cut, self._cut_end = spelling.strip
        self._cut = 0 if begun else self._cut
        self._held = ""  # what may be cut off the end
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """Take the next ids; return the text that is certain now."""
        spelling, text = self.spelling, ""
        for i in ids:
            if not 0 <= i < len(spelling.pieces) or i in spelling.silent or i in self.hidden:
                continue
            piece = spelling.pieces[i] if self._begun else spelling.first.get(i, spelling.pieces[i])
            self._begun = True
            if self._ending:
                text, self._ending = text + self._characters.decode(self._ending), b""
            if i in spelling.raw:
                self._run += piece
                continue
            if self._run:
                text += self._fall_back()
            if i in spelling.last and piece.startswith(spelling.last[i]):
                size = len(spelling.last[i])
                piece, self._ending = piece[:size], piece[size:]
            text += self._characters.decode(piece)
        return self._stripped(text)

    def finish(self) -> str:
        """Return the rest, when no more ids come; half a character is U+FFFD."""
        text = self._stripped(self._fall_back() + self._characters.decode(b"", final=True))
        held, self._held, self._ending = self._held[self._cut_end :], "", b""
        return text + held

    def _fall_back(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        while self._cut and text:
            if not text.startswith(self._character):
                self._cut = 0
                break
            text, self._cut = text[1:], self._cut - 1
        if not self._cut_end:
            return text
        text = self._held + text
        certain = text.rstrip(self._character)
        self._held = text[len(certain) :]
        return certain


def read_byte_decoder(library: tokenizers.Tokenizer) -> ByteDecoder:
    """Return what a tokenizer's tokens say.

    Raises:
        ConfigError: its decoder gives no text to single tokens, or an id is absurdly large.
    """
    names = {i: name for name, i in library.get_vocab(with_added_tokens=False).items()}
    names |= {i: library.id_to_token(i) for i in library.get_added_tokens_decoder()}  # normalized, where they are
    largest = max(names, default=-1)
    if largest > LARGEST_ID:  # the library would count up to it when it writes itself out
        raise ConfigError(f"The tokenizer has an id of {largest:,}: no vocabulary is that large. Fetch it again.")
    steps = _flat(None if library.decoder is None else json.loads(library.decoder.__getstate__()))
    joins = next((n for n, step in enumerate(steps) if step["type"] in ("ByteLevel", "Fuse")), len(steps))
    before, after = steps[:joins], steps[joins:]
    characters = byte_characters() if any(step["type"] == "ByteLevel" for step in after) else {}
    strip = ("", 0, 0)
    whole = []
    for step in after:
        if step["type"] == "Strip":
            strip = (step["content"], step["start"], step["stop"])
        elif step["type"] == "Replace" and len(step["pattern"].get("String", "")) == 1:
            whole.append(_replacement(step))
        elif step["type"] not in ("ByteLevel", "Fuse", "ByteFallback"):
            raise ConfigError(f"The tokenizer's decoder changes whole texts ({_short(step)}). {REMEDY}")
    maps = [_written(step) for step in before]
    placed = not steps or any(step["type"] in ("Metaspace", "WordPiece") for step in before)
    ends = any(step["type"] == "BPEDecoder" for step in before)

    def text_of(name: str, first: bool = False, last: bool = False) -> tuple[bytes, bool]:
        """UTF-8 of a token, and whether it is a byte to fall back on."""
        for step in maps:
            if step is None:
                if found := BYTE.fullmatch(name):
                    return bytes.fromhex(found[1]), True
            else:
                name = step(name, first, last)
        if not steps and not first:
            name = " " + name
        for replace in whole:
            name = replace(name, first, last)
        if characters:
            numbers = [characters.get(character) for character in name]
            if None not in numbers:
                return bytes(numbers), False
        return name.encode("utf-8", "replace"), False

    pieces, raw = [b""] * (largest + 1), set()
    for i, name in names.items():
        pieces[i], falls_back = text_of(name)
        if falls_back:
            raw.add(i)
    first = {i: text_of(name, first=True)[0] for i, name in names.items()} if placed else {}
    last = {i: text_of(name, last=True)[0] for i, name in names.items()} if ends else {}
    first, last = ({i: one for i, one in other.items() if one != pieces[i]} for other in (first, last))
    silent = frozenset(i for i in range(len(pieces)) if i not in names)
    return ByteDecoder(pieces, silent, first, last, frozenset(raw), strip)


def _flat(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [one for part in step["decoders"] for one in _flat(part)]
    return [step]


def _short(step: Mapping[str, Any]) -> str:
    return json.dumps(step, ensure_ascii=False)[:80]


def _replacement(step: Mapping[str, Any]) -> Callable[[str, bool, bool], str]:
    pattern, content = step["pattern"], step["content"]
    if "String" in pattern:
        return lambda name, first, last: name.replace(pattern["String"], content)
    replace = tokenizers.decoders.Replace(tokenizers.Regex(pattern["Regex"]), content)
    return lambda name, first, last: replace.decode([name])


def _written(step: Mapping[str, Any]) -> Callable[[str, bool, bool], str] | None:
    """One step of a decoder as a function of a token, and whether it is the first or the last; None for bytes.

    Raises ConfigError for a step that gives no text to single tokens.
    """
    match step["type"]:
        case "ByteFallback":
            return None
        case "Replace":
            return _replacement(step)
        case "Metaspace":
            mark, drops = step["replacement"], step.get("prepend_scheme", "always") != "never"
            return lambda name, first, last: name.replace(mark, "" if first and drops else " ")
        case "WordPiece":
            prefix, cleanup = step["prefix"], step["cleanup"]

            def word(name: str, first: bool, last: bool) -> str:
                if not first:
                    name = name[len(prefix) :] if name.startswith(prefix) else " " + name
                for unclean, clean in CLEANED if cleanup else ():
                    name = name.replace(unclean, clean)
                return name

            return word
        case "BPEDecoder":
            return lambda name, first, last: name.replace(step["suffix"], "" if last else " ")
        case "Strip":
            character, start, stop = step["content"], step["start"], step["stop"]

            def strip(name: str, first: bool, last: bool) -> str:
                name = name[min(start, len(name) - len(name.lstrip(character))) :]
                return name[: len(name) - min(stop, len(name) - len(name.rstrip(character)))]

            return strip
    raise ConfigError(
        f"The tokenizer's decoder has a step that gives no text to single tokens: {_short(step)}. {REMEDY}"
    )


def byte_characters() -> dict[str, int]:
    """GPT-2's character for each byte, which byte-level tokens are written in: `Ġ` is 32, the space."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
