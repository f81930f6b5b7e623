"""The tokenized store: one split of one source as a memory-mapped run of tokens, written once, read at random.

A store is a directory:

    manifest.json     counts, source, licence, hashes of every source file and of the tokenizer, sizes of the rest
    tokens.bin        every document as [begin] + tokens + [end], uint16, or uint32 for a large vocabulary
    offsets.npy       int64 [documents + 1], where each document begins in tokens.bin, and the end
    byte_lengths.npy  int64 [documents], UTF-8 bytes of each document's text
    names.json        the documents' names
    text.bin          the documents' text, one after the other; held-out split only
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from opendeep_jax.data.files import new_directory, writing
from opendeep_jax.data.sources import Document
from opendeep_jax.data.tokenizer import Tokenizer

VERSION = 1
# Text that is handed to the tokenizer at once: enough for all cores, little enough for memory.
BATCH_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """An open store."""

    directory: Path
    manifest: dict
    tokens: np.ndarray
    """uint16 or uint32 [T], memory-mapped."""
    offsets: np.ndarray
    """int64 [documents + 1]."""
    byte_lengths: np.ndarray
    """int64 [documents]."""

    @functools.cached_property
    def names(self) -> list[str]:
        """The documents' names, in the store's order."""
        return json.loads((self.directory / "names.json").read_text("utf-8"))

    @property
    def text(self) -> bytes:
        """All documents' text, if the store keeps it."""
        path = self.directory / "text.bin"
        return path.read_bytes() if path.exists() else b""


def write_store(
    directory: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    facts: dict,
    keep_text: bool = False,
    advance: Callable[[int], None] = lambda size: None,
) -> None:
    """Tokenizes `documents` into a new store at `directory`, calling `advance` with the bytes done.

    `facts` go into the manifest. Raises ConfigError if it cannot be written, and then leaves nothing behind.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    names, lengths, byte_lengths, digest = [], [], [], hashlib.sha256()
    with new_directory(directory) as temporary, writing(directory):
        with open(temporary / "tokens.bin", "wb") as tokens, open(temporary / "text.bin", "wb") as text_file:
            for batch in _batches(documents):
                for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
                    row = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(dtype)
                    tokens.write(row)
                    digest.update(row)
                    text = document.text.encode("utf-8")
                    if keep_text:
                        text_file.write(text)
                    names.append(document.name)
                    lengths.append(len(row))
                    byte_lengths.append(len(text))
                    advance(len(text))
        np.save(temporary / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
        np.save(temporary / "byte_lengths.npy", np.array(byte_lengths, np.int64))
        (temporary / "names.json").write_text(json.dumps(names), "utf-8")
        manifest = {
            **facts,
            "version": VERSION,
            "tokenizer": tokenizer.name,
            "tokenizer_hash": tokenizer.content_hash,
            "documents": len(names),
            "bytes": sum(byte_lengths),
            "tokens": sum(lengths),
            "tokens_sha256": digest.hexdigest(),
            "dtype": np.dtype(dtype).name,
            "sizes": {path.name: path.stat().st_size for path in sorted(temporary.iterdir())},
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def open_store(directory: Path) -> Store:
    """Opens a store without reading its tokens. Raises ValueError if a part is missing, cut off or unreadable."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
        for name, size in manifest["sizes"].items():
            found = (directory / name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found} bytes instead of {size}")
        tokens = np.zeros(0, manifest["dtype"])
        if manifest["tokens"]:
            tokens = np.memmap(directory / "tokens.bin", manifest["dtype"], mode="r")
        offsets, byte_lengths = np.load(directory / "offsets.npy"), np.load(directory / "byte_lengths.npy")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory} is damaged: {error}") from error
    return Store(directory, manifest, tokens, offsets, byte_lengths)
