"""The text of the held-out split, and what compressors make of it."""

import contextlib
import gzip
import hashlib
import json
import lzma
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.storage import write_file

if TYPE_CHECKING:
    from opendeep_jax.data.pipeline import Data

# Held-out text that gzip and xz are given: half a minute of xz -9, whatever the corpus.
HELD_OUT_BYTES = 64 << 20
# Documents of it that are read together.
DOCUMENTS_AT_ONCE = 1024
_compressing = threading.Lock()


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
    """Return what `gzip -9` and `xz -9` make of the text, in bits per byte."""
    packed = {"gzip": gzip.compress(text, 9), "xz": lzma.compress(text, preset=9)}
    return {f"{name}_bits_per_byte": 8 * len(data) / max(len(text), 1) for name, data in packed.items()}


def compression(data: "Data") -> dict[str, float]:
    """Return what compressors make of the held-out text; nothing where no text is held out.

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
