"""Packing: which pieces of which documents make up each row of L positions, and the plans that say so on disk.

A row has L + 1 tokens, the last of which is only a target, so rows cut out of one document overlap by one token and
every token but a document's first is predicted exactly once.

    concatenate   documents in a shuffled order, laid end to end and cut: no padding, most long rows cut a document
    first_fit     documents whole, each into the first row with room for it, in windows of WINDOW documents
    best_fit      documents whole, the longest first, each into the fullest row with room for it (Ding et al. 2024,
                  "Fewer Truncations Improve Language Modeling"): hardly any padding, no document cut that fits a row

With the last two, a document longer than a row gives full rows and a rest that is packed like a document.

A plan is computed once, hashed and memory-mapped. It is a directory:

    plan.json          what it was made from, counts, rates of padding and truncation, dtype and SHA-256 of each file
    row_offsets.bin    int64 [rows + 1]  first piece of each row
    documents.bin      [pieces]          document of each piece: its number in the store
    begins.bin         [pieces]          a piece's first token in its document
    ends.bin           [pieces]          one past its last token

Documents are packed in blocks of BLOCK, so memory stays bounded however large a store is; rows of all blocks are
shuffled together when they are read.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.storage import file_name, new_directory, sha256_of, writing
from opendeep_jax.data.fim import FimRule
from opendeep_jax.data.shuffle import permutation
from opendeep_jax.data.sources import held_out
from opendeep_jax.data.store import Store

VERSION = 2
BLOCK = 1 << 22
# A plan up to this size, some five million documents, is checked whenever it is opened.
CHECKED_BYTES = 1 << 26
FILES = ("row_offsets", "documents", "begins", "ends")
# Of a plan, added up over its blocks. Positions used are those with a token to read and one to predict.
COUNTS = ("rows", "pieces", "documents", "bytes", "tokens", "used", "fitting", "cut")


class PlanKind(NamedTuple):
    """The properties that tell the plans of one store apart."""

    split: str
    """`train`, or `held_out`, which is packed in order."""
    length: int
    packing: str
    share: tuple[float, float] = (0.0, 1.0)
    """Part of the shuffled documents that it packs: plans of several lengths divide a source's text."""


@dataclasses.dataclass(frozen=True, eq=False)
class PackingPlan:
    """An open plan: arrays as in `PackedPieces`, memory-mapped."""

    directory: Path
    manifest: dict
    row_offsets: np.ndarray
    documents: np.ndarray
    begins: np.ndarray
    ends: np.ndarray

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        return self.manifest["rows"]

    @property
    def length(self) -> int:
        """Positions L of a row."""
        return self.manifest["length"]

    @property
    def content_hash(self) -> str:
        """SHA-256 of plan.json, which has those of all its files."""
        return self.manifest["content_hash"]

    def rows_of(self, document: int) -> np.ndarray:
        """int64: the rows that hold a piece of a document."""
        pieces = np.flatnonzero(self.documents == document)
        return np.unique(np.searchsorted(self.row_offsets, pieces, "right") - 1)


def plan_directory(
    root: Path, store: Store, kind: PlanKind, key: tuple[int, ...], fraction: float, fim: FimRule
) -> Path:
    """Return where the plan of these arguments is kept: below `root`, named by a hash of all of them."""
    facts = _facts(store, kind, key, fraction, fim)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    name = file_name(store.manifest["source"]["name"], kind.split, kind.packing, str(kind.length), digest[:16])
    return root / "plans" / name


def _facts(store: Store, kind: PlanKind, key: tuple[int, ...], fraction: float, fim: FimRule) -> dict:
    return {
        "version": VERSION,
        "store": store.content_hash,
        "key": key,
        "held_out_fraction": fraction,
        "fim": fim._asdict() if kind.split == "train" else None,
        **kind._asdict(),
    }


def make_plan(
    root: Path,
    store: Store,
    kind: PlanKind,
    key: tuple[int, ...],
    fraction: float,
    fim: FimRule,
    advance: Callable[[int], None] = lambda documents: None,
    block: int = BLOCK,
) -> PackingPlan:
    """Return the plan for one split of a store, opened, or computed first if it is not there.

    Args:
        key: decides the shuffling of the training split.
        fraction: share of documents that is held out.
        advance: called with the documents that are packed, block by block.
    Raises:
        ConfigError: where it cannot be written, or what is there is damaged.
    """
    directory = plan_directory(root, store, kind, key, fraction, fim)
    if directory.exists():
        return open_plan(directory)
    with new_directory(directory) as temporary, writing(directory):
        writers = [_Column(temporary / f"{name}.bin", dtype) for name, dtype in _columns(store)]
        counts = np.zeros(len(COUNTS), np.int64)
        for number, first in enumerate(range(0, store.documents, block)):
            end = min(first + block, store.documents)
            counts += _pack_block(store, range(first, end), number, kind, key, fraction, fim, writers, counts)
            advance(end - first)
        writers[0].write(counts[1:2])
        rows, pieces, documents, text_bytes, tokens, used, fitting, cut = counts.tolist()
        manifest = {
            **_facts(store, kind, key, fraction, fim),
            "source": store.manifest["source"]["name"],
            "rows": rows,
            "pieces": pieces,
            "documents": documents,
            "text": {"documents": documents, "bytes": text_bytes, "tokens": tokens},
            "padding": 1 - used / (rows * kind.length) if rows else 0.0,
            "truncated": cut / max(fitting, 1),
            "files": {writer.path.name: writer.close() for writer in writers},
        }
        manifest["content_hash"] = _content_hash(manifest)
        (temporary / "plan.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return open_plan(directory)


def _columns(store: Store) -> list[tuple[str, str]]:
    document = "uint32" if store.documents < 1 << 32 else "uint64"
    return [("row_offsets", "int64"), ("documents", document), ("begins", "uint32"), ("ends", "uint32")]


def _pack_block(
    store: Store,
    documents: range,
    number: int,
    kind: PlanKind,
    key: tuple[int, ...],
    fraction: float,
    fim: FimRule,
    writers: list["_Column"],
    before: np.ndarray,
) -> np.ndarray:
    """Pack one block of documents into the files; return what it adds to the counts."""
    hashes = store.id_hashes(documents.start, documents.stop)
    chosen = np.flatnonzero(held_out(hashes, fraction) == (kind.split == "held_out"))
    lengths = store.lengths(documents.start, documents.stop)[chosen]
    text_bytes = int(store.byte_lengths(documents.start, documents.stop)[chosen].sum())
    tokens = int(lengths.sum())
    if kind.split == "train":
        lengths = lengths + fim.extra_tokens(hashes[chosen])
        # Which documents a share takes must not go with their size, so it is decided by their hash.
        if kind.share != (0.0, 1.0):
            begin, end = (round(share * len(chosen)) for share in kind.share)
            mine = np.sort(np.argsort(hashes[chosen], kind="stable")[begin:end])
            chosen, lengths = chosen[mine], lengths[mine]
    pieces = pack(lengths, kind.length, kind.packing, None if kind.split == "held_out" else (*key, number))
    for writer, column in zip(writers, (pieces.row_offsets[:-1] + before[1], *pieces[1:]), strict=True):
        writer.write(chosen[column] + documents.start if writer.path.stem == "documents" else column)
    rows, fits = len(pieces.row_offsets) - 1, lengths <= kind.length + 1
    cuts = np.bincount(pieces.documents, minlength=len(lengths)) > 1
    used = int((pieces.ends - pieces.begins).sum()) - rows
    return np.array(
        [rows, len(pieces.documents), len(lengths), text_bytes, tokens, used, fits.sum(), (cuts & fits).sum()]
    )


class _Column:
    """A file of numbers that grows, and its hash."""

    def __init__(self, path: Path, dtype: str):
        self.path, self.dtype, self.digest, self.size = path, np.dtype(dtype), hashlib.sha256(), 0
        self.file = open(path, "wb")

    def write(self, numbers: np.ndarray) -> None:
        data = numbers.astype(self.dtype)
        self.file.write(data)
        self.digest.update(data)
        self.size += data.nbytes

    def close(self) -> dict:
        self.file.close()
        return {"dtype": self.dtype.name, "bytes": self.size, "sha256": self.digest.hexdigest()}


def open_plan(directory: Path) -> PackingPlan:
    """Map a plan. Raises ConfigError, naming the file, where one is missing or cut off, or, in a plan of up to
    CHECKED_BYTES, not as it was written; a larger one is not read (`verify_plan` does)."""
    manifest = _manifest(directory)
    small = sum(facts["bytes"] for facts in manifest["files"].values()) <= CHECKED_BYTES
    for wrong in _wrong_files(directory, manifest, contents=small):
        raise wrong
    arrays = []
    for name in FILES:
        path, facts = directory / f"{name}.bin", manifest["files"][f"{name}.bin"]
        empty = np.zeros(0, facts["dtype"])
        arrays.append(np.memmap(path, facts["dtype"], "r") if facts["bytes"] else empty)
    return PackingPlan(directory, manifest, *arrays)


def _manifest(directory: Path) -> dict:
    path = directory / "plan.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if manifest["content_hash"] != _content_hash(manifest):
            raise ValueError("it is not as it was written")
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from error


def _content_hash(manifest: dict) -> str:
    """SHA-256 of all that plan.json says, the files' hashes among it: their numbers of rows decide the order too."""
    said = {key: value for key, value in manifest.items() if key != "content_hash"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def verify_plan(directory: Path) -> list[str]:
    """Recompute a plan's hashes; a sentence for each damaged file."""
    try:
        return [str(error) for error in _wrong_files(directory, _manifest(directory), contents=True)]
    except ConfigError as error:
        return [str(error)]


def _wrong_files(directory: Path, manifest: dict, contents: bool) -> Iterator[ConfigError]:
    """Yield an error for each file that is missing, of another size, or, where `contents` are read, altered."""
    for name in FILES:
        path = directory / f"{name}.bin"
        facts = manifest["files"][path.name]
        if not path.exists() or path.stat().st_size != facts["bytes"]:
            found = f"{path.stat().st_size} bytes instead of {facts['bytes']}" if path.exists() else "missing"
            yield _damaged(path, found)
        elif contents and sha256_of(path) != facts["sha256"]:
            yield _damaged(path, "its SHA-256 is not the one in plan.json")


def _damaged(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"The packing plan {path} is damaged: {what}. Delete {path.parent} and run `opendeep data prepare` again: the "
        "plan is computed anew, the same as before."
    )


# The ways to pack.

WINDOW = 4096
# Windows that first_fit packs side by side: as many as stay in a core's cache.
WINDOWS_AT_ONCE = 256


class PackedPieces(NamedTuple):
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


def pack(lengths: np.ndarray, length: int, packing: str, key: tuple[int, ...] | None) -> PackedPieces:
    """Pack documents of `lengths` tokens (each 2 or more) into rows of `length` positions.

    key: decides the shuffling; None keeps the documents in order.
    """
    order = np.arange(len(lengths)) if key is None else permutation(len(lengths), *key)
    lengths = np.asarray(lengths, np.int64)[order]
    if packing == "concatenate":
        row_offsets, chosen, begins, ends = _concatenate(lengths, length)
        return PackedPieces(row_offsets, order[chosen], begins, ends)
    chosen, begins, ends = _chunks(lengths, length)
    rows = {"first_fit": first_fit, "best_fit": best_fit}[packing](ends - begins, length + 1)
    by_row = np.argsort(rows, kind="stable")  # inside a row the shuffled order stays
    row_offsets = np.concatenate([[0], np.cumsum(np.bincount(rows))]).astype(np.int64)
    return PackedPieces(row_offsets, order[chosen[by_row]], begins[by_row], ends[by_row])


def _concatenate(lengths: np.ndarray, length: int) -> PackedPieces:
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
    return PackedPieces(row_offsets, documents, begins, ends)


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
