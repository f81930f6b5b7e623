"""Encoding texts with less memory and time than the library takes, to the same ids: long texts in pieces, cut where
the parts have the token ids of the whole, and each word of our own tokenizers once.

The library needs some 150 bytes of memory for each token it is at, so a document of 100 MB is handed to it a piece at a
time.
"""

import itertools
import re
from collections.abc import Callable, Iterator

import numpy as np
import tokenizers

# Characters of a piece, at least; at most twice as many.
PIECE = 1 << 20
# Pieces that are encoded at once, each by a thread of its own where there are some.
TOGETHER = 4
# Every byte-level tokenizer in the field begins a new word here: after a line's end, when the line does not end with
# white space and the next one begins with a letter; and at a single space between a letter or digit and a letter.
CUT = re.compile(r"(?<=\S\n)(?=[^\W\d_])|(?<=[A-Za-z0-9])(?= [A-Za-z])")
# Both sides of such cuts, for asking a tokenizer whether it does.
PROBES = [
    *itertools.product(
        ("a\n", "1\n", ").\n", "é\n", "数\n", "_\n", "'\n", "a\n\nA\n"), ("b c", "B", "é", "数据", "s2")
    ),
    *itertools.product(("a", "B1", "\nC", "don't"), (" b", " Bc d", " s\n")),
]

# Merges stay inside: a word with the one sign or space before it, up to three digits, signs with the white space
# after them (so `):` and the next line's indentation can be one token), or white space.
WORDS = r"[^\s\p{L}\p{N}]?[\p{L}]+| [\p{L}]+|[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+\s*| ?\s+"
PRE_TOKENIZER = tokenizers.pre_tokenizers.Sequence(
    [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
# The same words in ASCII text, which Python's expressions find in a tenth of the library's time.
ASCII_WORDS = re.compile(WORDS.replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9"), re.ASCII)
REMEMBERED_WORDS = 1 << 20

EncodeBatch = Callable[[list[str]], list[np.ndarray]]


def splits_words_at_cuts(library: tokenizers.Tokenizer) -> bool:
    """Return whether the two sides of a cut are normalized and divided into words as the whole is.

    True for byte-level tokenizers; false for those that see a text's beginning (SentencePiece) or have no words.
    """
    normalize = library.normalizer.normalize_str if library.normalizer else str
    if not library.pre_tokenizer:
        return False

    def words(text: str) -> list[str]:
        return [word for word, _ in library.pre_tokenizer.pre_tokenize_str(normalize(text))]

    return all(
        normalize(left) + normalize(right) == normalize(left + right)
        and words(left) + words(right) == words(left + right)
        for left, right in PROBES
    )


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces of PIECE to 2 * PIECE characters, cut at the first CUT past PIECE.

    A piece without one is cut at 2 * PIECE all the same, which may change the token ids there.
    """
    begin = 0
    while len(text) - begin > 2 * PIECE:
        found = CUT.search(text, begin + PIECE, begin + 2 * PIECE)
        end = found.start() if found else begin + 2 * PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]


def in_pieces(encode_batch: EncodeBatch) -> EncodeBatch:
    """An `encode_batch` that is handed texts of more than 2 * PIECE characters in pieces."""

    def encode_long(text: str) -> np.ndarray:
        parts, encoded = pieces(text), []
        while group := list(itertools.islice(parts, TOGETHER)):
            encoded += encode_batch(group)
        return np.concatenate(encoded)

    def encode_all(texts: list[str]) -> list[np.ndarray]:
        if all(len(text) <= 2 * PIECE for text in texts):
            return encode_batch(texts)
        return [encode_long(text) if len(text) > 2 * PIECE else encode_batch([text])[0] for text in texts]

    return encode_all


def cache_words(encode_batch: EncodeBatch) -> EncodeBatch:
    """An `encode_batch` with the same results that encodes each word of ASCII text once, which is much faster."""
    remembered: dict[str, bytes] = {}

    def encode(text: str) -> np.ndarray:
        words = ASCII_WORDS.findall(text)
        if new := list(set(words).difference(remembered)):
            if len(remembered) > REMEMBERED_WORDS:
                remembered.clear()
                new = list(set(words))
            remembered.update(zip(new, (ids.tobytes() for ids in encode_batch(new)), strict=True))
        return np.frombuffer(bytearray().join(map(remembered.__getitem__, words)), np.int32)

    def encode_all(texts: list[str]) -> list[np.ndarray]:
        others = iter(encode_batch([text for text in texts if not text.isascii()]))
        return [encode(text) if text.isascii() else next(others) for text in texts]

    return encode_all
