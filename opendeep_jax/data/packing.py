"""Packing: documents, in an order shuffled anew each epoch, laid end to end and cut into rows of L positions.

Rows overlap by one token, because targets are one token further: in an epoch every token is predicted exactly once,
except each document's first. A document that is longer than what is left of a row goes on in the next row. Any row
of any epoch can be computed at once, from its index and the seed alone.
"""

import functools
from typing import NamedTuple

import numpy as np

from opendeep_jax.data.batch import Batch


def permutation(size: int, *key: int) -> np.ndarray:
    """int64 [size]: a permutation that `key` decides, the same with every version of numpy and on every machine."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _scramble(state + np.uint64(part))
    return np.argsort(_scramble(np.arange(size, dtype=np.uint64) + state), kind="stable")


def _scramble(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014): a fixed bijection on 64 bits that looks random."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Order(NamedTuple):
    """One epoch's order: which document comes n-th, where it begins in the epoch's stream, which row comes n-th."""

    documents: np.ndarray
    starts: np.ndarray
    rows: np.ndarray


class PackedRows:
    """Random access to the rows of a tokenized split.

    tokens: integers [T], all documents; offsets: int64 [documents + 1], where each begins; length: positions L of a
    row; key: decides the shuffling, None keeps documents and rows in order; segment_mask: whether rows say where
    documents begin, or pass for one piece of text as in the V3 report.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        length: int,
        key: tuple[int, ...] | None,
        segment_mask: bool = True,
    ):
        self.tokens, self.offsets, self.length = tokens, offsets, length
        self.segment_mask = segment_mask
        self.rows_per_epoch = -(-max(0, len(tokens) - 1) // length)
        documents = len(offsets) - 1

        @functools.lru_cache(maxsize=2)  # Two, for rows fetched across the end of an epoch.
        def order(epoch: int) -> Order:
            if key is None:
                chosen, rows = np.arange(documents), np.arange(self.rows_per_epoch)
            else:
                chosen = permutation(documents, *key, epoch, 0)
                rows = permutation(self.rows_per_epoch, *key, epoch, 1)
            starts = np.concatenate([[0], np.cumsum(np.diff(offsets)[chosen])])
            return Order(chosen, starts, rows)

        self.order = order

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """What row `index`, counted through all epochs, is made of: (document, first token in it, end in it).

        The last token of the last piece is only a target.
        """
        epoch, n = divmod(index, self.rows_per_epoch)
        order = self.order(epoch)
        start = int(order.rows[n]) * self.length
        stop = min(start + self.length + 1, len(self.tokens))
        first = int(np.searchsorted(order.starts, start, "right")) - 1
        last = int(np.searchsorted(order.starts, stop, "left"))
        begins = order.starts[first:last].tolist()
        ends = order.starts[first + 1 : last + 1].tolist()
        documents = order.documents[first:last].tolist()
        return [
            (document, max(start - begin, 0), min(stop, end) - begin)
            for document, begin, end in zip(documents, begins, ends, strict=True)
        ]

    def write(self, index: int, batch: Batch, b: int) -> None:
        """Writes row `index` into row `b` of `batch`, whose arrays are zero there; what stays zero is padding."""
        pieces = self.pieces(index)
        begins = np.cumsum([0] + [stop - start for _, start, stop in pieces])
        stream = np.concatenate(
            [self.tokens[self.offsets[d] + start : self.offsets[d] + stop] for d, start, stop in pieces]
        )
        n = len(stream) - 1
        batch.tokens[b, :n] = stream[:-1]
        batch.targets[b, :n] = stream[1:]
        batch.loss_mask[b, :n] = True
        batch.segment_ids[b, :n] = 1
        batch.positions[b, :n] = np.arange(n)
        if self.segment_mask:
            piece = np.searchsorted(begins, np.arange(n + 1), "right")
            batch.segment_ids[b, :n] = piece[:-1]
            batch.positions[b, :n] -= begins[piece[:-1] - 1]
            batch.loss_mask[b, :n] = piece[:-1] == piece[1:]


def empty_batch(rows: int, length: int) -> Batch:
    """A Batch of `rows` rows that are padding throughout."""
    integers = (np.zeros((rows, length), np.int32) for _ in range(4))
    tokens, targets, segment_ids, positions = integers
    return Batch(tokens, targets, np.zeros((rows, length), np.bool_), segment_ids, positions)
