"""Packing plans of ten million documents: seconds, peak memory, rows, padding, and how many documents are cut.

    python benchmarks/packing.py [--documents=10000000] [--length=4096] [--packing=best_fit] [--directory=/tmp]

Documents have 1 to 200,000 tokens, log-normally (median 545, mean about 1,100), and their begin and end marks. A plan
is made as `opendeep data prepare` makes it, from a store in memory: shuffled, packed, hashed, and written to a
temporary directory. `cut` is the share of those documents that fit a row and are yet divided. Each packing runs in a
process of its own; `memory` is its peak, the 160 MB of the store (for ten million documents) included.

2026-11-22, 2 cores that others used too (load 4), 11.2 billion tokens:

    packing      seconds  million documents/s  memory, MB       rows  padding      cut
    concatenate      9.0                 1.11         689  2,732,706   0.000%  19.641%
    first_fit       12.3                 0.81         650  2,743,013   0.394%   0.000%
    best_fit        14.5                 0.69         654  2,732,239   0.001%   0.000%
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

PACKINGS = ("concatenate", "first_fit", "best_fit")
# Natural logarithm of a document's tokens: mean and standard deviation.
LOG_TOKENS = 6.3, 1.2
MOST_TOKENS = 200_000


class GeneratedStore:
    """The part of a store that packing reads: `documents` documents with log-normal lengths and random hashes."""

    def __init__(self, documents: int):
        self.documents = documents
        self.sizes = document_tokens(documents) + 2
        self.hashes = np.random.default_rng(1).integers(0, 1 << 63, documents, np.uint64)
        self.content_hash, self.manifest = "generated", {"source": {"name": "generated"}}

    def lengths(self, first: int, end: int) -> np.ndarray:
        """int64: tokens of documents [first, end), marks included."""
        return self.sizes[first:end]

    def byte_lengths(self, first: int, end: int) -> np.ndarray:
        """int64: bytes of their text."""
        return self.sizes[first:end] * 4

    def id_hashes(self, first: int, end: int) -> np.ndarray:
        """uint64: hashes of their ids."""
        return self.hashes[first:end]


def document_tokens(documents: int, seed: int = 0) -> np.ndarray:
    """int64 [documents]: log-normal numbers of tokens from 1 to MOST_TOKENS."""
    tokens = np.random.default_rng(seed).lognormal(*LOG_TOKENS, documents)
    return np.clip(tokens, 1, MOST_TOKENS).astype(np.int64)


def measure(documents: int, length: int, packing: str, directory: str) -> dict:
    """Makes one plan; gives what the table shows of it."""
    from opendeep_jax.data.fim import NO_FIM
    from opendeep_jax.data.plan import PlanKind, make_plan

    store = GeneratedStore(documents)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        begun = time.perf_counter()
        plan = make_plan(Path(temporary), store, PlanKind("train", length, packing), (0, 0), 0.0, NO_FIM)
        seconds = time.perf_counter() - begun
        return {
            "packing": packing,
            "seconds": f"{seconds:.1f}",
            "million documents/s": f"{documents / seconds / 1e6:.2f}",
            "memory, MB": f"{peak_memory() / 1e6:,.0f}",
            "rows": f"{plan.rows:,}",
            "padding": f"{plan.manifest['padding']:.3%}",
            "cut": f"{plan.manifest['truncated']:.3%}",
        }


def peak_memory() -> int:
    """Most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`, run by a new interpreter."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Prints rows of text under their keys: the first column to the left, numbers to the right."""
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in (dict(zip(widths, widths, strict=True)), *rows):
        first, *rest = (row[key].rjust(width) for key, width in widths.items())
        print("  ".join([first.strip().ljust(len(first)), *rest]), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000, help="documents to pack")
    parser.add_argument("--length", type=int, default=4096, help="positions in a row")
    parser.add_argument("--packing", choices=PACKINGS, action="append", help="only this one; may be repeated")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where plans are written, and removed again")
    given = parser.parse_args(argv)
    tokens = int(document_tokens(given.documents).sum())
    print(f"{given.documents:,} documents of {tokens:,} tokens in rows of {given.length:,}\n")
    packings = given.packing or PACKINGS
    print_table([in_fresh_process(measure, given.documents, given.length, name, given.directory) for name in packings])


if __name__ == "__main__":
    main()
