"""Words, as every step of curation sees them: the quality filters, near-duplicates and evaluation overlap.

datatrove splits English with spaCy, at a third of a megabyte a second. It takes any other splitter in spaCy's place;
this one is a regular expression made to agree with it (docs/curation.md has the numbers), thirty times as fast.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

# Thai, Lao, Tibetan, Burmese, Khmer, kana and Han are written without spaces: each sign counts as a word.
UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
LETTER = rf"[^\W{UNSPACED}]"
# A word, with dots and apostrophes inside (don't, e.g), a number with other signs too (3:16, 1,000), or a run of one
# other sign (a comma, three dots).
WORD = re.compile(rf"[{UNSPACED}]|{LETTER}+(?:[.'’&@]{LETTER}+|(?<=\d)[:,/]\d{LETTER}*)*|([^\w\s])\1*")
SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?:\s+|$)|[。！？]+\s*")
WHITE_SPACE = re.compile(r"\s+")

PIECE = 1 << 20
"""Characters of a document that are looked at together where memory would otherwise grow with its length."""


def split_words(text: str) -> list[str]:
    """All words and signs of a text; white space alone belongs to none."""
    return [match[0] for match in WORD.finditer(text)]


def split_sentences(text: str) -> list[tuple[int, int]]:
    """(begin, end) of each sentence, with the white space that follows it; together they are the whole text."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    if not ends or text[ends[-1] :].strip():
        ends.append(len(text))
    return list(zip([0, *ends], ends, strict=False))


@functools.cache
def word_tokenizer():
    """Return the splitter above as datatrove's blocks take it in place of a language."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return split_words(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return [text[begin:end].strip() for begin, end in split_sentences(text)]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return split_sentences(text)

    return Words()


def simplify(text: str) -> str:
    """datatrove's `simplify_text`, with numbers as they are: lower case, no signs or diacritics, single spaces."""
    from datatrove.utils.text import simplify_text

    return simplify_text(text, simplification(text))


def simplification(text: str):
    """datatrove's TextNormConfig, which spares ASCII the search for diacritics: half of the time, for nothing.

    Numbers stay: were each a 0, as is its default, all tables of a size would be copies of each other, and any list of
    13 years a part of any evaluation set with 13 numbers in a row.
    """
    from datatrove.utils.text import TextNormConfig

    return TextNormConfig(norm_numbers=False, norm_unicode_diacritics=not text.isascii())


def tells(ngram: Sequence[str]) -> bool:
    """Return whether a run of words tells where it is from: one of numbers alone, as in any table or list, does not."""
    return any(not word.isdecimal() for word in ngram)


def pieces(text: str, size: int = PIECE, overlap: int = 0) -> Iterator[str]:
    """The text in pieces of about `size` characters that end at white space, where there is some within `size` more.

    Each begins about `overlap` characters before the end of the last, also at white space.
    """
    begin = 0
    while len(text) - begin > size:
        space = WHITE_SPACE.search(text, begin + size, begin + 2 * size)
        if not space and len(text) <= begin + 2 * size:
            break  # the last words are whole
        end = space.start() if space else begin + size
        yield text[begin:end]
        earlier = WHITE_SPACE.search(text, max(begin + 1, end - overlap), end) if overlap else None
        begin = earlier.start() if earlier else end
    yield text[begin:]


def shingles(text: str, ngram: int) -> np.ndarray:
    """uint64 [words - ngram + 1]: a hash of each run of `ngram` words of the simplified text; none if it has fewer.

    They stand for the same sets of runs as datatrove's, hashed in another way.
    """
    words = itertools.chain.from_iterable(split_words(simplify(piece)) for piece in pieces(text))
    hashes = np.fromiter(map(_hash, words), np.uint64)
    count = len(hashes) - ngram + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    # Horner's scheme over the ring of 64-bit integers, with an odd base, and a mix so that all bits count.
    runs = np.zeros(count, np.uint64)
    for i in range(ngram):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + count]
    return runs ^ (runs >> np.uint64(32))


@functools.lru_cache(1 << 17)
def _hash(word: str) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(word.encode("utf-8"))


FOREIGN = re.compile(r"[^\W\d_\u0000-\u024f]")
ENGLISH = re.compile(r"\b(the|be|to|of|and|that|have|with)\b", re.IGNORECASE)
JUDGED = 50
"""Words that a text must have before the lack of English ones says anything."""


def may_be_english(text: str) -> bool:
    """False for a text that is mostly in another script than Latin, or has 50 words and hardly one of English's usual.

    The usual ones, and that there must be two of them, are Gopher's (Rae et al. 2021).
    """
    text = text[:PIECE]
    letters = sum(map(str.isalpha, text))
    if 2 * len(FOREIGN.findall(text)) > letters:
        return False
    found = {match[0].lower() for match in ENGLISH.finditer(text)}
    return len(found) >= 2 or len(text.split()) < JUDGED
