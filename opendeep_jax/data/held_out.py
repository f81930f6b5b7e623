"""The held-out split: its batches, its text, and what compressors make of that."""

import contextlib
import gzip
import hashlib
import json
import lzma
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.storage import write_file
from opendeep_jax.data.fim import NO_FIM
from opendeep_jax.data.rows import empty_batch, write_rows

if TYPE_CHECKING:
    from opendeep_jax.data.batch import Batch
    from opendeep_jax.data.pipeline import Data

# Held-out text that gzip and xz are given: half a minute of xz -9, whatever the corpus.
HELD_OUT_BYTES = 64 << 20
# Documents of it that are read together.
DOCUMENTS_AT_ONCE = 1024
_compressing = threading.Lock()


class HeldOut(Sequence["Batch"]):
    """Held-out batches, each made when it is asked for. See `Data.held_out`."""

    def __init__(self, data: "Data", batch_size: int, max_batches: int, part: Sequence[int] | np.ndarray | None):
        self.data, self.batch_size = data, batch_size
        self.part = np.arange(batch_size) if part is None else np.asarray(part, np.int64)
        self.ends = np.cumsum([plan.rows for plan in data.held_out_plans])
        total = int(self.ends[-1])
        chosen = min(total, max_batches * batch_size) if max_batches else total
        self.rows = np.arange(chosen) * total // max(chosen, 1)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, index: int) -> "Batch":
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        data, config = self.data, self.data.config.data
        begin = index % len(self) * self.batch_size
        there = self.rows[begin : begin + self.batch_size]
        rows = there[self.part[self.part < len(there)]]
        batch = empty_batch(len(self.part), config.sequence_length)
        sources = np.searchsorted(self.ends, rows, "right")
        for source in np.unique(sources).tolist():
            mine, plan = np.flatnonzero(sources == source), data.held_out_plans[source]
            in_plan = rows[mine] - (self.ends[source] - plan.rows)
            write_rows(batch, mine, plan, in_plan, data.stores[source], NO_FIM, config.segment_mask)
        return batch


def held_out_text(data: "Data", most_bytes: int = HELD_OUT_BYTES) -> bytes:
    """The held-out documents, one after the other, as the tokenizer gives them back: all, or where they come to more
    than `most_bytes`, about as much, of documents spread evenly over them."""
    total = sum(plan.manifest["text"]["bytes"] for plan in data.held_out_plans)
    step = max(-(-total // most_bytes), 1)
    texts = []
    for store, plan in zip(data.stores, data.held_out_plans, strict=True):
        chosen = np.unique(plan.documents)[::step].tolist()
        for first in range(0, len(chosen), DOCUMENTS_AT_ONCE):
            some = chosen[first : first + DOCUMENTS_AT_ONCE]
            spans = [(document, 0, int(store.lengths(document, document + 1)[0])) for document in some]
            texts += map(data.tokenizer.decode, store.read(spans))
    return "".join(texts).encode("utf-8")


def compressors(text: bytes) -> dict[str, float]:
    """What `gzip -9` and `xz -9` make of the text, in bits per byte."""
    packed = {"gzip": gzip.compress(text, 9), "xz": lzma.compress(text, preset=9)}
    return {f"{name}_bits_per_byte": 8 * len(data) / max(len(text), 1) for name, data in packed.items()}


def compression(data: "Data") -> dict[str, float]:
    """What compressors make of the held-out text; nothing where no text is held out.

    It is computed when data is prepared, and kept in data.directory/held_out; of data that an earlier version has
    prepared, when it is asked for.
    """
    parts = [data.tokenizer.content_hash, HELD_OUT_BYTES, *(plan.content_hash for plan in data.held_out_plans)]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = Path(data.config.data.directory, "held_out", f"{key[:16]}.json")
    with _compressing:  # so that a run's end waits for what its start has begun
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text("utf-8"))
        text = held_out_text(data)
        found = compressors(text) if text else {}
        with contextlib.suppress(ConfigError):  # a directory that cannot be written costs no more than time
            write_file(path, json.dumps(found))
        return found
