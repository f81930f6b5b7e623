"""A store in memory, for tests of what is built on stores: token t of document d is the number 1000 d + t."""

import hashlib
from pathlib import Path

import numpy as np

from opendeep_jax.data.sources import hash_id


class MemoryStore:
    """Documents of the given lengths; ids are `doc0`, `doc1`, …"""

    def __init__(self, lengths, name: str = "memory"):
        self._lengths = np.asarray(lengths, np.int64)
        self.directory = Path(name)
        self.documents, self.tokens = len(self._lengths), int(self._lengths.sum())
        self.content_hash = hashlib.sha256(self._lengths.tobytes()).hexdigest()
        self.hashes = np.array([hash_id(f"doc{d}") for d in range(self.documents)], np.uint64)
        self.manifest = {"source": {"name": name}, "content_hash": self.content_hash}

    def lengths(self, first, end):
        return self._lengths[first:end]

    def byte_lengths(self, first, end):
        return self._lengths[first:end] * 3

    def id_hashes(self, first, end):
        return self.hashes[first:end]

    def id_hashes_of(self, documents):
        return self.hashes[documents]

    def open_shards(self, documents):
        pass

    def read(self, spans):
        return [1000 * document + np.arange(begin, end) for document, begin, end in spans]

    def describe(self, document):
        return {"id": f"doc{document}", "url": "", "license": "CC0-1.0", "shard": "00000000"}

    def find(self, name):
        return [int(name[3:])] if name.startswith("doc") and int(name[3:]) < self.documents else []
