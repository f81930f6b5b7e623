"""Writing one shard of a token store: read its parts, tokenize them, and put a whole directory in its place."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opendeep_jax import __version__
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import SourceConfig
from opendeep_jax.config.storage import new_directory, sha256_of, writing
from opendeep_jax.data.sources import Document, Part, hash_id, read_part
from opendeep_jax.data.store import OUTER_CHUNK, VERSION, token_spec
from opendeep_jax.text.tokenizer import Tokenizer

# Text that is handed to the tokenizer at once: enough for all cores, little enough for memory.
BATCH_CHARACTERS = 1 << 20
# Ids of documents left out for one reason that the manifest names.
EXAMPLES = 20
# Of a shard's bytes, what its tokens may leave unsaid.
MOST_LOST = 0.01


@dataclasses.dataclass
class Collected:
    """The contents of a shard's documents.arrow and shard.json. One entry a document in every list."""

    ids: list[str] = dataclasses.field(default_factory=list)
    urls: list[str] = dataclasses.field(default_factory=list)
    licenses: list[str] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    """Tokens."""
    byte_lengths: list[int] = dataclasses.field(default_factory=list)
    left_out: dict[str, dict] = dataclasses.field(default_factory=dict)
    lost_bytes: int = 0
    """Bytes of text that no token says."""
    worst: tuple[int, str, str] = (0, "", "")
    """The document that lost most: bytes, id, and the first letters that it lost."""

    def skip(self, reason: str, id: str) -> None:
        """Count a document that is left out."""
        entry = self.left_out.setdefault(reason, {"documents": 0, "examples": []})
        entry["documents"] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(id)


def write_shard(
    store: Path,
    source: SourceConfig,
    tokenizer: Tokenizer,
    facts: dict,
    name: str,
    parts: Sequence[Part],
    known_hash: str | None,
    advance: Callable[[int], None],
) -> None:
    """Tokenize `parts` into the shard `name` of the store at `store`, calling `advance` with bytes of the parts.

    The shard appears whole or not at all, and is made of the parts and the tokenizer alone.

    Raises:
        ConfigError: for sources that cannot be read, for a place that cannot be written, and if the shard's content
            hash is not `known_hash`, where there is one.
    """
    directory = store / "shards" / name
    with new_directory(directory) as temporary:
        tokens = _TokenWriter(temporary / "tokens", token_dtype(tokenizer))
        collected = Collected()
        for part in parts:
            left = part.size
            for batch in _batches(read_part(source, part, collected.skip)):
                size = _tokenize(batch, tokenizer, tokens, collected)
                advance(min(size, left))
                left -= min(size, left)
            advance(left)
        tokens.close()
        _refuse_losses(source, tokenizer, collected)
        digest = content_hash(tokens.digest, collected.lengths, collected.ids, collected.urls, collected.licenses)
        if known_hash not in (None, digest):
            raise ConfigError(
                f"The text of source {source.name!r} ({source.path}) has changed since {store} was made: shard {name} "
                f"has the content hash {digest[:16]}... instead of {known_hash[:16]}.... Bring back the text as it "
                f"was, or delete {store} and prepare all of it anew."
            )
        with writing(directory):
            _write_documents(temporary / "documents.arrow", collected)
            files = file_facts(temporary)
        manifest = {
            **shard_facts(source, tokenizer, facts, name, parts),
            "documents": len(collected.ids),
            "tokens": sum(collected.lengths),
            "bytes": sum(collected.byte_lengths),
            "licenses": _count_licenses(collected),
            "left_out": collected.left_out,
            "lost_bytes": collected.lost_bytes,
            "content_hash": digest,
            "files": files,
        }
        with writing(directory):
            write_json(temporary / "shard.json", manifest)


def shard_facts(source: SourceConfig, tokenizer: Tokenizer, facts: dict, name: str, parts: Sequence[Part]) -> dict:
    """The part of a shard's manifest that is known before its text is read: a shard with another one is another's."""
    curation = facts.get("curation")
    return {
        "version": VERSION,
        "name": name,
        "source": source.name,
        "tokenizer_hash": tokenizer.content_hash,
        "dtype": token_dtype(tokenizer),
        "tool_version": __version__,
        "curation_hash": curation and hashlib.sha256(json.dumps(curation, sort_keys=True).encode()).hexdigest(),
        "parts": [{"file": part.file.name, "begin": part.begin, "end": part.end} for part in parts],
    }


def token_dtype(tokenizer: Tokenizer) -> str:
    """uint16 if it holds every token, else uint32."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def file_facts(directory: Path) -> dict[str, dict]:
    """Size and SHA-256 of every file below `directory`, by name."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in paths
    }


def content_hash(
    tokens: Any, lengths: Iterable[int], ids: Iterable[str], urls: Iterable[str], licenses: Iterable[str]
) -> str:
    """SHA-256 of what a shard holds, whatever its files look like: `tokens` is the SHA-256 object of the tokens."""
    digest = hashlib.sha256(tokens.digest())
    for document in zip(lengths, ids, urls, licenses, strict=True):
        digest.update(json.dumps(document).encode() + b"\n")
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a manifest."""
    path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenize(batch: list[Document], tokenizer: Tokenizer, tokens: "_TokenWriter", collected: Collected) -> int:
    """Add a batch of documents; return the bytes of their text."""
    encoded = tokenizer.encode_batch([document.text for document in batch])
    row = np.empty(sum(map(len, encoded)) + 2 * len(encoded), tokens.dtype)
    at = size = 0
    for document, ids in zip(batch, encoded, strict=True):
        end = at + len(ids) + 2
        row[at], row[at + 1 : end - 1], row[end - 1] = tokenizer.bos_id, ids, tokenizer.eos_id
        text = document.text.encode("utf-8")
        text_bytes = len(text)
        if lost := tokenizer.lost_bytes(text, ids):
            collected.lost_bytes += lost
            if lost > collected.worst[0]:
                collected.worst = (lost, document.id, _lost_characters(document.text, tokenizer.decode(ids)))
        collected.ids.append(document.id)
        collected.urls.append(document.url)
        collected.licenses.append(document.license)
        collected.lengths.append(end - at)
        collected.byte_lengths.append(text_bytes)
        at, size = end, size + text_bytes
    del encoded  # a long document's are large
    tokens.write(row)
    return size


def _lost_characters(text: str, said: str) -> str:
    """Return the first letters of a text that are not in what its tokens say."""
    said_letters = set(said)
    return "".join(dict.fromkeys(letter for letter in text if letter not in said_letters))[:8]


def _refuse_losses(source: SourceConfig, tokenizer: Tokenizer, collected: Collected) -> None:
    """Raise ConfigError where the tokenizer cannot write too much of the text."""
    size = sum(collected.byte_lengths)
    if collected.lost_bytes <= MOST_LOST * size:
        return
    lost, id, letters = collected.worst
    what = f"{letters!r}" if letters else "some of its white space"
    raise ConfigError(
        f"The tokenizer {tokenizer.name} cannot write the text of source {source.name!r}: {collected.lost_bytes:,} of "
        f"{size:,} bytes are lost ({collected.lost_bytes / size:.1%}, and at most {MOST_LOST:.0%} may be). Document "
        f"{id} alone loses {lost:,}, as of {what}. Take one that has all bytes: --data.tokenizer=bpe:8192, "
        "--data.tokenizer=bytes, or a byte-level tokenizer.json."
    )


class _TokenWriter:
    """An array of tokens that grows, and the SHA-256 of them. Keeps at most a file's worth of them in memory."""

    def __init__(self, directory: Path, dtype: str):
        self.directory, self.dtype, self.digest = directory, dtype, hashlib.sha256()
        self.pending: list[np.ndarray] = []
        self.size = self.written = 0
        self.array: Any = None

    def write(self, tokens: np.ndarray) -> None:
        self.digest.update(tokens.astype(f"<u{tokens.itemsize}", copy=False))
        while len(tokens):
            if self.size - self.written == OUTER_CHUNK:
                self._put()
            taken = tokens[: OUTER_CHUNK - (self.size - self.written)]
            self.pending.append(taken)
            self.size += len(taken)
            tokens = tokens[len(taken) :]

    def close(self) -> None:
        self._put()

    def _put(self) -> None:
        """Write one file. Files past the first are rare: they come from single documents or files of that size."""
        import tensorstore

        try:
            if self.array is None:
                self.array = tensorstore.open(token_spec(self.directory, self.size, self.dtype), create=True).result()
            else:
                self.array = self.array.resize(exclusive_max=[self.size]).result()
            if self.pending:
                self.array[self.written : self.size].write(np.concatenate(self.pending)).result()
        except (OSError, ValueError) as error:  # ValueError is TensorStore's word for a full disk, too.
            with writing(self.directory):
                raise OSError(str(error)) from error
        self.pending, self.written = [], self.size


def _write_documents(path: Path, collected: Collected) -> None:
    import pyarrow

    hashes = np.array([hash_id(id) for id in collected.ids], np.uint64)
    lengths = np.array(collected.lengths, np.int64)
    names = list(dict.fromkeys(collected.licenses))
    numbers = {name: number for number, name in enumerate(names)}
    license = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([numbers[name] for name in collected.licenses], pyarrow.int32()),
        pyarrow.array(names, pyarrow.string()),
    )
    columns = {
        "id": pyarrow.array(collected.ids, pyarrow.large_string()),
        "url": pyarrow.array(collected.urls, pyarrow.large_string()),
        "license": license,
        "id_hash": pyarrow.array(hashes),
        "begin": pyarrow.array(np.cumsum(lengths) - lengths),
        "byte_length": pyarrow.array(np.array(collected.byte_lengths, np.int64)),
        "by_hash": pyarrow.array(np.argsort(hashes, kind="stable").astype(np.uint32)),
    }
    write_arrow(path, columns, {"tokens": str(lengths.sum())})


def write_arrow(path: Path, columns: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write an Arrow IPC file of one record batch."""
    import pyarrow

    batch = pyarrow.RecordBatch.from_pydict(columns).replace_schema_metadata(metadata)
    with pyarrow.ipc.new_file(str(path), batch.schema) as file:
        file.write_batch(batch)


def _count_licenses(collected: Collected) -> dict[str, dict]:
    counts: dict[str, dict] = {}
    for name, tokens, size in zip(collected.licenses, collected.lengths, collected.byte_lengths, strict=True):
        entry = counts.setdefault(name, {"documents": 0, "tokens": 0, "bytes": 0})
        entry["documents"] += 1
        entry["tokens"] += tokens
        entry["bytes"] += size
    return counts
