"""Fill-in-the-middle (Bavarian et al. 2022; DeepSeek-V3, section 4.1): a document's middle is moved behind its end.

A document `[begin] text [end]` becomes, in prefix-suffix-middle order,

    [begin] [fim begin] prefix [fim hole] suffix [fim end] middle [end]

Whether a document is rearranged, and where it is cut, is a function of the seed and its id's hash alone, and is applied
when tokens are read: the store holds plain documents. Cuts fall between tokens.
"""

from typing import NamedTuple

import numpy as np

from opendeep_jax.data.shuffle import scramble
from opendeep_jax.data.sources import fraction_of

EXTRA_TOKENS = 3


class FimRule(NamedTuple):
    """The share of documents that are rearranged, and the special tokens for it (begin, hole, end)."""

    seed: int
    rate: float
    ids: tuple[int, int, int]

    def chosen(self, id_hashes: np.ndarray) -> np.ndarray:
        """bool: which documents are rearranged."""
        return fraction_of(id_hashes, f"fim {self.seed}") < self.rate

    def extra_tokens(self, id_hashes: np.ndarray) -> np.ndarray:
        """int64: tokens that each document gains."""
        if not self.rate:
            return np.zeros(len(id_hashes), np.int64)
        return EXTRA_TOKENS * self.chosen(id_hashes).astype(np.int64)

    def cuts(self, id_hash: np.uint64, tokens: int) -> tuple[int, int]:
        """Return where the middle of a document of `tokens` tokens begins and ends, as in the plain document."""
        state = np.array([id_hash], np.uint64) ^ scramble(np.array([self.seed + 1], np.uint64))
        first, second = (int(scramble(state + np.uint64(n))[0]) % (tokens - 1) + 1 for n in (1, 2))
        return min(first, second), max(first, second)

    def parts(self, id_hash: np.uint64, tokens: int, begin: int, end: int) -> list[int | tuple[int, int]]:
        """Tokens [begin, end) of the rearranged document: ids of special tokens, and spans of the plain document.

        tokens: of the plain document, its begin and end marks included.
        """
        i, j = self.cuts(id_hash, tokens)
        start, hole, stop = self.ids
        layout = [(0, 1), start, (1, i), hole, (j, tokens - 1), stop, (i, j), (tokens - 1, tokens)]
        found: list[int | tuple[int, int]] = []
        at = 0
        for part in layout:
            size = 1 if isinstance(part, int) else part[1] - part[0]
            low, high = max(begin - at, 0), min(end - at, size)
            if low < high:
                found.append(part if isinstance(part, int) else (part[0] + low, part[0] + high))
            at += size
        return found


NO_FIM = FimRule(0, 0.0, (0, 0, 0))
