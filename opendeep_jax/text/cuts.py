"""Long texts in pieces: where a text can be cut so that its parts have the token ids of the whole.

A tokenizer's library needs some 150 bytes of memory for each token it is at, so a document of 100 MB is handed to it
a piece at a time.
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

EncodeBatch = Callable[[list[str]], list[np.ndarray]]


def begins_words_at_cuts(library: tokenizers.Tokenizer) -> bool:
    """Whether the two sides of a cut are normalized and divided into words as the whole is.

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
