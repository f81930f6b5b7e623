"""Packing: which pieces of which documents make up each row of L positions.

A row has L + 1 tokens, the last of which is only a target, so rows cut out of one document overlap by one token and
every token but a document's first is predicted exactly once.

    concatenate   documents in a shuffled order, laid end to end and cut: no padding, most long rows cut a document
    first_fit     documents whole, each into the first row with room for it, in windows of WINDOW documents
    best_fit      documents whole, the longest first, each into the fullest row with room for it (Ding et al. 2024,
                  "Fewer Truncations Improve Language Modeling"): hardly any padding, no document cut that fits a row

With the last two, a document longer than a row gives full rows and a rest that is packed like a document.
"""

from typing import NamedTuple

import numpy as np

from opendeep_jax.data.shuffle import permutation

WINDOW = 4096
# Windows that first_fit packs side by side: as many as stay in a core's cache.
WINDOWS_AT_ONCE = 256


class Pieces(NamedTuple):
    """Rows as pieces of documents: row r is made of the pieces row_offsets[r] … row_offsets[r + 1] - 1, in order.

    For example two documents of 4 and 5 tokens in rows of L=6 positions, concatenated:
    row_offsets [0, 2, 3], documents [0, 1, 1], begins [0, 0, 2], ends [4, 3, 5].
    """

    row_offsets: np.ndarray
    """int64 [rows + 1]."""
    documents: np.ndarray
    """int64 [pieces]."""
    begins: np.ndarray
    """int64 [pieces]: a piece's first token in its document."""
    ends: np.ndarray
    """int64 [pieces]: one past its last token."""


def pack(lengths: np.ndarray, length: int, packing: str, key: tuple[int, ...] | None) -> Pieces:
    """Packs documents of `lengths` tokens (each 2 or more) into rows of `length` positions.

    key: decides the shuffling; None keeps the documents in order.
    """
    order = np.arange(len(lengths)) if key is None else permutation(len(lengths), *key)
    lengths = np.asarray(lengths, np.int64)[order]
    if packing == "concatenate":
        row_offsets, chosen, begins, ends = _concatenate(lengths, length)
        return Pieces(row_offsets, order[chosen], begins, ends)
    chosen, begins, ends = _chunks(lengths, length)
    rows = {"first_fit": first_fit, "best_fit": best_fit}[packing](ends - begins, length + 1)
    by_row = np.argsort(rows, kind="stable")  # inside a row the shuffled order stays
    row_offsets = np.concatenate([[0], np.cumsum(np.bincount(rows))]).astype(np.int64)
    return Pieces(row_offsets, order[chosen[by_row]], begins[by_row], ends[by_row])


def _concatenate(lengths: np.ndarray, length: int) -> Pieces:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    total = int(starts[-1])
    begin = np.arange(-(-max(total - 1, 0) // length), dtype=np.int64) * length
    end = np.minimum(begin + length + 1, total)
    first = np.searchsorted(starts, begin, "right") - 1
    counts = np.searchsorted(starts, end, "left") - first
    row_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    row = np.repeat(np.arange(len(begin)), counts)
    documents = first[row] + np.arange(len(row)) - row_offsets[row]
    begins = np.maximum(begin[row] - starts[documents], 0)
    ends = np.minimum(end[row], starts[documents + 1]) - starts[documents]
    return Pieces(row_offsets, documents, begins, ends)


def _chunks(lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents cut into pieces of at most length + 1 tokens that overlap by one: document, begin and end of each."""
    counts = -(-(lengths - 1) // length)
    documents = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = number * length
    return documents, begins, np.minimum(begins + length + 1, lengths[documents])


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [items]: the bin of each item by best-fit decreasing, bins numbered from 0. Every size <= capacity.

    Items of one size go the same way until the fullest bins with room for them are used up, so they are placed
    together: time grows with the distinct sizes, not with the items.
    """
    order = np.argsort(-sizes, kind="stable")
    placed = np.empty(len(sizes), np.int64)
    bins: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # by the room that is left in them
    has_bins = np.zeros(capacity + 1, np.bool_)
    counts, made, done = np.bincount(sizes), 0, 0

    def put(room: int, some: np.ndarray) -> None:
        if len(some) and room:
            bins[room].append(some)
            has_bins[room] = True

    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            room = size + int(has_bins[size:].argmax())
            if has_bins[room]:
                per_bin = room // size
                some = bins[room].pop()
                has_bins[room] = bool(bins[room])
                needed = -(-left // per_bin)
                put(room, some[needed:])
                some = some[:needed]
            else:
                room, per_bin = capacity, capacity // size
                some = np.arange(made, made - (-left // per_bin))
                made += len(some)
            placing = min(left, len(some) * per_bin)
            placed[done : done + placing] = np.repeat(some, per_bin)[:placing]
            full, rest = divmod(placing, per_bin)
            put(room - per_bin * size, some[:full])
            put(room - rest * size, some[full:])
            done, left = done + placing, left - placing
    result = np.empty_like(placed)
    result[order] = placed
    return result


def first_fit(sizes: np.ndarray, capacity: int, window: int = WINDOW) -> np.ndarray:
    """int64 [items]: the bin of each item by first-fit in each run of `window` items, bins numbered from 0."""
    items = len(sizes)
    window = min(window, max(items, 1))
    padded = np.zeros(-(-items // window) * window, np.int32)
    padded[:items] = sizes
    placed, made = [], 0
    for some in np.array_split(padded.reshape(-1, window), max(1, len(padded) // (window * WINDOWS_AT_ONCE))):
        local, used = _first_fit(some, capacity)
        first = made + np.cumsum(used) - used
        placed.append(local + first[:, None])
        made += int(used.sum())
    return np.concatenate([part.ravel() for part in placed])[:items]


def _first_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Bins of `sizes` [windows, items], each window for itself, and how many each uses; a size of 0 is no item."""
    windows, items = sizes.shape
    room = np.full((windows, items + 1), capacity, np.int32)
    placed = np.zeros((windows, items), np.int64)
    used = np.zeros(windows, np.int64)
    most = 0
    every = np.arange(windows)
    for item in range(items):
        size = sizes[:, item]
        chosen = (room[:, : most + 1] >= size[:, None]).argmax(axis=1)  # a bin not yet used always has room
        chosen[size == 0] = 0
        room[every, chosen] -= size
        placed[:, item] = chosen
        used = np.maximum(used, np.where(size > 0, chosen + 1, 0))
        most = int(used.max(initial=0))
    return placed, used
