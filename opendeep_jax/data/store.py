"""The token store of a source: all its documents, tokenized, in shards, for reading any span of any of them.

    store.json            written last, so the store is whole: source, tokenizer, totals, licenses, hashes
    shards.arrow          one row a shard, memory-mapped: opening a store with a million shards parses nothing
    shards/00000000/
        shard.json        the shard's own manifest
        tokens/           zarr v3: uint16, or uint32 for a large vocabulary, each document as [begin] + tokens + [end]
        documents.arrow   memory-mapped, one row a document: id, url, license, id_hash, begin, byte_length, by_hash

Tokens are cut into inner chunks of 16,384 with a CRC-32C each, checked whenever one is read; documents.arrow is checked
against its SHA-256 when its shard is first used. What is damaged is named, never read.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.storage import sha256_of
from opendeep_jax.data.sources import hash_id

VERSION = 2
# Decoded chunks kept in memory, shared by all stores of a process.
CACHE_BYTES = 256 << 20
# Shards that stay open: some 45 kB of memory each, and a mapping, of which Linux gives a process 65,530. Rows draw from
# all of a store's shards, so a store with more of them opens one for nearly every piece that it reads.
OPEN_SHARDS = 1 << 13
# A shards.arrow up to this size (some 30,000 shards) is checked whenever its store is opened; of a larger one its ends,
# which tell where everything is, and each row against the shard it describes when that is first used.
CHECKED_INDEX_BYTES = 1 << 24


@functools.cache
def _context() -> Any:
    import tensorstore

    return tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """An open shard of a store. N documents."""

    directory: Path
    first_document: int
    """Its first document's number in the store."""
    documents: Any
    """The pyarrow.RecordBatch of documents.arrow."""
    begins: np.ndarray
    """int64 [N]: where each document begins among the shard's tokens. Mapped like the rest: thousands are open."""
    size: int
    """Tokens in the shard."""
    id_hashes: np.ndarray
    """uint64 [N]."""
    byte_lengths: np.ndarray
    """int64 [N]: bytes of each document's text."""
    dtype: str

    @functools.cached_property
    def tokens(self) -> Any:
        """The tensorstore.TensorStore of the shard's tokens. Opening it reads nothing."""
        import tensorstore

        spec = token_spec(self.directory / "tokens", self.size, self.dtype) | {"assume_metadata": True}
        return self.result(0, tensorstore.open(spec, open=True, context=_context()))

    def offsets(self, first: int, end: int) -> np.ndarray:
        """int64 [end - first + 1]: where the documents [first, end) begin among the shard's tokens, and their end."""
        if end < len(self.begins):
            return self.begins[first : end + 1]
        return np.append(self.begins[first:], self.size)

    def read_tokens(self, begin: int, end: int) -> np.ndarray:
        """Tokens [begin, end) of the shard, uint16 or uint32. Raises ConfigError if they are damaged."""
        return self.result(begin, self.tokens[begin:end].read())

    def result(self, begin: int, future: Any) -> np.ndarray:
        """Return what the future of a reading from `begin` on gives. Raises ConfigError if it is damaged."""
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise damaged(token_file(self.directory, begin), str(error)) from error


class Store:
    """An open store; safe to use from several threads. Raises ConfigError, naming the file, for what is damaged."""

    def __init__(self, directory: Path, manifest: dict, index: Any):
        self.directory, self.manifest, self.index = directory, manifest, index
        self.documents: int = manifest["documents"]
        self.tokens: int = manifest["tokens"]
        self.content_hash: str = manifest["content_hash"]
        self.shards: int = manifest["shards"]
        self._first = numbers(index.column("first_document"))
        self._checked: set[int] = set()
        self.shard = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def __reduce__(self):
        return open_store, (self.directory,)

    def row(self, number: int) -> dict:
        """The row of shards.arrow for a shard: name, first_document, first_token, counts, content_hash, files."""
        try:
            row = self.index.slice(number, 1)
            row.validate(full=True)  # A flipped byte may point anywhere in memory.
            (found,) = row.to_pylist()
            return found | {"files": json.loads(found["files"])}
        except ValueError as error:
            raise damaged_index(self.directory, str(error)) from error

    def shard_directory(self, number: int) -> Path:
        """Return where a shard is."""
        return self.directory / "shards" / self.row(number)["name"]

    def files(self, number: int) -> dict[str, dict]:
        """Size and SHA-256 of each file of a shard, by its name below the shard's directory."""
        return self.row(number)["files"]

    def lengths(self, first: int, end: int) -> np.ndarray:
        """int64 [end - first]: tokens of these documents, begin and end marks included."""
        return self._gather(first, end, lambda shard, a, b: np.diff(shard.offsets(a, b)), np.int64)

    def id_hashes(self, first: int, end: int) -> np.ndarray:
        """uint64 [end - first]: hashes of these documents' ids."""
        return self._gather(first, end, lambda shard, a, b: shard.id_hashes[a:b], np.uint64)

    def byte_lengths(self, first: int, end: int) -> np.ndarray:
        """int64 [end - first]: bytes of these documents' text, as UTF-8."""
        return self._gather(first, end, lambda shard, a, b: shard.byte_lengths[a:b], np.int64)

    def read(self, spans: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """Tokens [begin, end) of a document for each (document, begin, end): uint16 or uint32 arrays.

        All are read together. Raises IndexError for a span that is not inside its document.
        """
        import tensorstore

        numbers = self._shard_of(np.array([span[0] for span in spans], np.int64)).tolist()
        pending = []
        with tensorstore.Batch() as batch:
            for number, (document, begin, end) in zip(numbers, spans, strict=True):
                shard = self.shard(number)
                row = document - shard.first_document
                offset, limit = shard.offsets(row, row + 1).tolist()
                if not 0 <= begin <= end <= limit - offset:
                    raise IndexError(f"tokens {begin} to {end} of document {document}, which has {limit - offset}")
                pending.append((shard, offset + begin, shard.tokens[offset + begin : offset + end].read(batch=batch)))
        return [shard.result(begin, future) for shard, begin, future in pending]

    def id_hashes_of(self, documents: np.ndarray) -> np.ndarray:
        """uint64 [documents]: hashes of the ids of these documents, in any order."""
        documents = np.asarray(documents, np.int64)
        owners, found = self._shard_of(documents), np.empty(len(documents), np.uint64)
        for number in np.unique(owners).tolist():
            mine, shard = owners == number, self.shard(number)
            found[mine] = shard.id_hashes[documents[mine] - shard.first_document]
        return found

    def open_shards(self, documents: Sequence[int]) -> None:
        """Open the shards of these documents, and check them, side by side."""
        owners = np.unique(self._shard_of(np.asarray(documents, np.int64))).tolist()
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(self.shard, owners):
                pass

    def describe(self, document: int) -> dict:
        """Return a document's id, url, license, shard (its name), bytes and tokens."""
        number = int(self._shard_of(document))
        shard = self.shard(number)
        row = document - shard.first_document
        described = {name: shard.documents.column(name)[row].as_py() for name in ("id", "url", "license")}
        described |= {"shard": shard.directory.name, "bytes": int(shard.byte_lengths[row])}
        return described | {"tokens": int(np.diff(shard.offsets(row, row + 1))[0])}

    def find(self, id: str) -> list[int]:
        """The documents with this id, by bisection in each shard, which is only checked for damage if it has one."""
        wanted, found = hash_id(id), []
        for number in range(self.shards):
            path = self.shard_directory(number) / "documents.arrow"
            with reading(path):
                documents = map_arrow(path)
                hashes, by_hash = (numbers(documents.column(name)) for name in ("id_hash", "by_hash"))
                first = bisect.bisect_left(by_hash, wanted, key=hashes.__getitem__)
                end = bisect.bisect_right(by_hash, wanted, key=hashes.__getitem__)
            if first < end:
                shard = self.shard(number)
                rows = sorted(by_hash[first:end].tolist())
                ids = shard.documents.column("id")
                found += [shard.first_document + row for row in rows if ids[row].as_py() == id]
        return found

    def _shard_of(self, document):
        number = np.searchsorted(self._first, document, "right") - 1
        if np.any(np.less(document, 0)) or np.any(np.greater_equal(document, self.documents)):
            raise IndexError(f"document {document} of a store with {self.documents}")
        return number

    def _gather(self, first: int, end: int, take, dtype) -> np.ndarray:
        if not 0 <= first <= end <= self.documents:
            raise IndexError(f"documents {first} to {end} of a store with {self.documents}")
        parts = [np.zeros(0, dtype)]
        number = int(self._shard_of(first)) if first < end else 0
        while first < end:
            shard = self.shard(number)
            stop = min(shard.first_document + len(shard.id_hashes), end)
            parts.append(take(shard, first - shard.first_document, stop - shard.first_document))
            first, number = stop, number + 1
        return parts[1] if len(parts) == 2 else np.concatenate(parts)

    def _open_shard(self, number: int) -> Shard:
        row = self.row(number)
        directory = self.directory / "shards" / row["name"]
        path = directory / "documents.arrow"
        with reading(path):
            if number not in self._checked:
                wanted, found = row["files"][path.name]["sha256"], sha256_of(path)
                if found != wanted:
                    raise damaged(path, f"its SHA-256 is {found} instead of {wanted}")
                self._checked.add(number)
            documents = map_arrow(path)
            tokens = int(documents.schema.metadata[b"tokens"])
        next_document = int(self._first[number + 1]) if number + 1 < self.shards else self.documents
        counts = row["documents"], next_document - row["first_document"], row["tokens"]
        if counts != (len(documents), len(documents), tokens):
            raise damaged_index(self.directory, f"it contradicts {path}")
        begin, id_hashes, byte_lengths = (
            numbers(documents.column(name)) for name in ("begin", "id_hash", "byte_length")
        )
        dtype = self.manifest["dtype"]
        return Shard(directory, row["first_document"], documents, begin, tokens, id_hashes, byte_lengths, dtype)


def open_store(directory: Path, tokenizer_hash: str | None = None) -> Store:
    """Open a store, reading store.json alone and mapping shards.arrow, however many shards there are.

    Raises:
        ConfigError: if there is no whole store, it is damaged, or it was made with a tokenizer whose content_hash is
            not `tokenizer_hash`.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if tokenizer_hash is not None and manifest["tokenizer_hash"] != tokenizer_hash:
        raise ConfigError(
            f"The store {directory} was made with the tokenizer {manifest['tokenizer']} (SHA-256 "
            f"{manifest['tokenizer_hash'][:16]}...), not with the one of this run ({tokenizer_hash[:16]}...). Set "
            "data.tokenizer to the tokenizer that it was made with, or prepare the source's text anew."
        )
    path = directory / "shards.arrow"
    try:
        size = path.stat().st_size
        if size != manifest["index"]["size"]:
            raise damaged_index(directory, f"it has {size} bytes instead of {manifest['index']['size']}")
        kind, hash_of = ("sha256", sha256_of) if size <= CHECKED_INDEX_BYTES else ("ends_sha256", sha256_of_ends)
        if hash_of(path) != manifest["index"][kind]:
            raise damaged_index(directory, "its SHA-256 is not the one in store.json")
        return Store(directory, manifest, map_arrow(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise damaged_index(directory, getattr(error, "strerror", None) or str(error)) from error


def read_manifest(directory: Path) -> dict:
    """Return what store.json says. Raises ConfigError if it is not there, damaged, or of another version."""
    path = directory / "store.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version, wanted = manifest["version"], {"tokenizer", "tokenizer_hash", "index", "content_hash", "shards"}
        if version == VERSION and not wanted <= manifest.keys():
            raise KeyError(*wanted - manifest.keys())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{directory} holds no whole token store: store.json is missing, which is written last. Run `opendeep data "
            "prepare` (again): what is finished is kept."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}). Delete it and run `opendeep data prepare` again: whole shards are kept."
        ) from error
    if version != VERSION:
        raise ConfigError(
            f"The store {directory} has format {version}, and this version of OpenDeep reads format {VERSION}. "
            "Prepare the source's text anew."
        )
    return manifest


def check_files(store: Store) -> None:
    """Raise ConfigError for the first file of the store's shards that is missing or has another size."""
    for number in range(store.shards):
        row = store.row(number)
        directory = store.directory / "shards" / row["name"]
        for name, file in row["files"].items():
            with reading(directory / name):
                if (size := (directory / name).stat().st_size) != file["size"]:
                    raise damaged(directory / name, f"it has {size} bytes instead of {file['size']}")


def index_facts(path: Path) -> dict:
    """Return what store.json says of shards.arrow."""
    return {"size": path.stat().st_size, "sha256": sha256_of(path), "ends_sha256": sha256_of_ends(path)}


# The files of a store: how tokens lie in them, their hashes, and what is said of damage.

# Tokens that are read, and checked, together.
INNER_CHUNK = 1 << 14
# Most tokens in one file; all of a shard's, except where one document or compressed file holds more.
OUTER_CHUNK = 1 << 25
# Bytes at each end of a large index that are hashed apart.
END_BYTES = 1 << 16


def token_spec(directory: Path, tokens: int, dtype: str) -> dict:
    """TensorStore's description of the array of `tokens` tokens at `directory`. A file that is gone is an error."""
    outer = min(-(-max(tokens, 1) // INNER_CHUNK) * INNER_CHUNK, OUTER_CHUNK)
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [INNER_CHUNK], "codecs": codecs, "index_codecs": codecs}
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(directory)},
        "metadata": {
            "shape": [tokens],
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [outer]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
        "recheck_cached_data": "open",
    }


def token_file(directory: Path, token: int) -> Path:
    """Return the file of a shard that holds one of its tokens."""
    return directory / "tokens" / "c" / str(token // OUTER_CHUNK)


def sha256_of_ends(path: Path) -> str:
    """SHA-256 of the first and last END_BYTES of a file: Arrow keeps its layout there. Raises OSError."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(END_BYTES))
        file.seek(max(path.stat().st_size - END_BYTES, 0))
        digest.update(file.read())
    return digest.hexdigest()


def numbers(column: Any) -> np.ndarray:
    """The numbers of a pyarrow Array without nulls, not copied. Its own `to_numpy` loads pandas, if that is there."""
    whole = np.frombuffer(column.buffers()[1], str(column.type))
    return whole[column.offset : column.offset + len(column)]


def damaged(path: Path, reason: str) -> ConfigError:
    """Return the error for a damaged file of a shard."""
    shard = next(place for place in (path, *path.parents) if place.parent.name == "shards")
    return ConfigError(
        f"{path} is damaged: {reason}. Delete {shard} and run `opendeep data prepare` again (for a run with its "
        "--workdir): only that shard is made anew."
    )


def damaged_index(directory: Path, reason: str) -> ConfigError:
    """Return the error for a damaged shards.arrow of the store at `directory`."""
    return ConfigError(
        f"{directory / 'shards.arrow'} is damaged: {reason}. Delete it and run `opendeep data prepare` again: it is "
        "made anew from the shards, which are kept."
    )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a shard's file is read into a ConfigError that names it."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, LookupError) as error:  # Arrow's own errors are among them.
        raise damaged(path, getattr(error, "strerror", None) or str(error)) from error


def map_arrow(path: Path) -> Any:
    """Return the one RecordBatch of an Arrow file, memory-mapped."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:  # What is mapped stays so without the file descriptor.
        return pyarrow.ipc.open_file(file).get_batch(0)
