"""Packing plans on disk: computed once, hashed, memory-mapped. A plan is a directory:

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
from opendeep_jax.config.storage import file_name, new_directory, writing
from opendeep_jax.data.fim import FimRule
from opendeep_jax.data.packing import pack
from opendeep_jax.data.sources import held_out
from opendeep_jax.data.store import Store
from opendeep_jax.data.storing.layout import sha256_of

VERSION = 2
BLOCK = 1 << 22
# A plan up to this size, some five million documents, is checked whenever it is opened.
CHECKED_BYTES = 1 << 26
FILES = ("row_offsets", "documents", "begins", "ends")
# Of a plan, added up over its blocks. Positions used are those with a token to read and one to predict.
COUNTS = ("rows", "pieces", "documents", "bytes", "tokens", "used", "fitting", "cut")


class PlanKind(NamedTuple):
    """What tells the plans of one store apart."""

    split: str
    """`train`, or `held_out`, which is packed in order."""
    length: int
    packing: str
    share: tuple[float, float] = (0.0, 1.0)
    """Part of the shuffled documents that it packs: plans of several lengths divide a source's text."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """An open plan: arrays as in `packing.Pieces`, memory-mapped."""

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
    """Where the plan of these arguments is kept: below `root`, named by a hash of all of them."""
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
) -> Plan:
    """The plan for one split of a store, opened, or computed first if it is not there.

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
    """Packs one block of documents into the files; gives what it adds to the counts."""
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


def open_plan(directory: Path) -> Plan:
    """Maps a plan. Raises ConfigError, naming the file, where one is missing or cut off, or, in a plan of up to
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
    return Plan(directory, manifest, *arrays)


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
    """Recomputes a plan's hashes; a sentence for each damaged file."""
    try:
        return [str(error) for error in _wrong_files(directory, _manifest(directory), contents=True)]
    except ConfigError as error:
        return [str(error)]


def _wrong_files(directory: Path, manifest: dict, contents: bool) -> Iterator[ConfigError]:
    """An error for each file that is missing, of another size, or, where `contents` are read, altered."""
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
