"""Random reads of token spans: ArrayRecord against TensorStore (zarr3, sharded) against a bare memory map.

    python benchmarks/store_formats.py [--documents=20000] [--rounds=3]

Documents are log-normal in length (mean about 1,000 tokens), as uint16 tokens in one file; batches of 64 spans are read
at random places with a warm file cache, as int32 arrays. `short` reads up to 4,097 tokens from the documents'
beginning; `long` reads 4,097 tokens out of documents of 400,000, of which ArrayRecord has to read all. Only TensorStore
and our store, which is made of it, check what they read (CRC-32C). Needs the array_record package.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SPAN, BATCH = 4097, 64
LONG_TOKENS, LONG_DOCUMENTS = 400_000, 40
INNER_CHUNKS = 4096, 16_384
Span = tuple[int, int, int]
Reader = Callable[[list[Span]], list[np.ndarray]]


def readers(directory: Path, tokens: np.ndarray, offsets: np.ndarray) -> dict[str, Reader]:
    """Writes the documents in each format, and gives the functions that read a batch of spans."""
    from array_record.python import array_record_module

    made: dict[str, Reader] = {}
    for group in (1, 16):
        path = str(directory / f"group{group}.array_record")
        writer = array_record_module.ArrayRecordWriter(path, f"group_size:{group},uncompressed")
        for begin, end in zip(offsets, offsets[1:], strict=False):
            writer.write(tokens[begin:end].tobytes())
        writer.close()
        reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")
        made[f"ArrayRecord, group size {group}"] = array_record_reader(reader)
    for inner in INNER_CHUNKS:
        made[f"TensorStore, inner chunk {inner:,}"] = tensorstore_reader(directory, tokens, offsets, inner)
    made["our store"] = our_reader(directory / "store", tokens, offsets)
    tokens.tofile(directory / "tokens.bin")
    mapped = np.memmap(directory / "tokens.bin", tokens.dtype, "r")
    made["memory map"] = lambda spans: [mapped[offsets[d] + b : offsets[d] + e].astype(np.int32) for d, b, e in spans]
    return made


def array_record_reader(reader) -> Reader:
    """Reads whole records, and takes the spans out of them."""

    def read(spans: list[Span]) -> list[np.ndarray]:
        records = reader.read([document for document, _, _ in spans])
        return [
            np.frombuffer(record, np.uint16)[begin:end].astype(np.int32)
            for record, (_, begin, end) in zip(records, spans, strict=True)
        ]

    return read


def tensorstore_reader(directory: Path, tokens: np.ndarray, offsets: np.ndarray, inner: int) -> Reader:
    """Reads all spans of a batch together, with a cache of decoded chunks."""
    import tensorstore

    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [inner], "codecs": codecs, "index_codecs": codecs}
    outer = -(-len(tokens) // inner) * inner
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(directory / f"zarr{inner}")},
        "recheck_cached_data": "open",
        "metadata": {
            "shape": [len(tokens)],
            "data_type": "uint16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [outer]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }
    tensorstore.open(spec, create=True).result().write(tokens).result()
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 256 << 20}})
    array = tensorstore.open(spec, open=True, context=context).result()

    def read(spans: list[Span]) -> list[np.ndarray]:
        with tensorstore.Batch() as batch:
            reading = [array[offsets[d] + b : offsets[d] + e].read(batch=batch) for d, b, e in spans]
        return [future.result().astype(np.int32) for future in reading]

    return read


def our_reader(directory: Path, tokens: np.ndarray, offsets: np.ndarray) -> Reader:
    """The store that `opendeep data prepare` would make, of documents whose text is their tokens."""
    import dataclasses

    from opendeep_jax.config.schema import SourceConfig
    from opendeep_jax.data.sources import Document, Part, SourceFile
    from opendeep_jax.data.storing import shards
    from opendeep_jax.data.storing.prepare import prepare_store
    from opendeep_jax.text.files import byte_tokenizer

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [tokens[offsets[int(text)] + 1 : offsets[int(text) + 1] - 1] for text in texts]

    def read_part(source, part, left_out):
        return (Document(str(i), str(i)) for i in range(part.begin, part.end))

    tokenizer = dataclasses.replace(byte_tokenizer(), encoder=encode, begin_id=0, end_ids=(0,))
    file = SourceFile("documents", "documents", 0, "")
    documents = range(len(offsets) - 1)
    parts = [Part(file, i, min(i + 2000, len(documents)), 1) for i in documents[::2000]]
    original, shards.read_part = shards.read_part, read_part
    try:
        store = prepare_store(directory, SourceConfig("numbers"), parts, tokenizer, {}, workers=1, shard_bytes=1)
    finally:
        shards.read_part = original
    return lambda spans: [ids.astype(np.int32) for ids in store.read(spans)]


def measure(read: Reader, spans: list[Span]) -> float:
    """Tokens a second."""
    begun = time.perf_counter()
    for first in range(0, len(spans), BATCH):
        read(spans[first : first + BATCH])
    return sum(end - begin for _, begin, end in spans) / (time.perf_counter() - begun)


def main(documents: int, rounds: int) -> None:
    """Measures all formats in turn, `rounds` times, and prints the best of each."""
    rng = np.random.default_rng(0)
    columns: dict[str, dict[str, float]] = {}
    lengths = {
        "short": np.clip(rng.lognormal(6.2, 1.2, documents).astype(int), 3, 200_000),
        "long": np.full(LONG_DOCUMENTS, LONG_TOKENS),
    }
    for kind, sizes in lengths.items():
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        tokens = rng.integers(1, 60_000, offsets[-1]).astype(np.uint16)
        if kind == "short":
            spans = [(int(d), 0, int(min(sizes[d], SPAN))) for d in rng.permutation(documents)]
        else:
            begins = rng.integers(0, LONG_TOKENS - SPAN, 4096)
            spans = [
                (int(d), int(b), int(b) + SPAN) for d, b in zip(rng.integers(0, len(sizes), 4096), begins, strict=True)
            ]
        columns[kind] = {}
        with tempfile.TemporaryDirectory() as temporary:
            made = readers(Path(temporary), tokens, offsets)
            for read in made.values():
                measure(read, spans[: 16 * BATCH])
            for _ in range(rounds):
                for name, read in made.items():
                    columns[kind][name] = max(columns[kind].get(name, 0), measure(read, spans))
    print(f"{documents:,} documents of {lengths['short'].mean():,.0f} tokens; {LONG_DOCUMENTS} of {LONG_TOKENS:,}")
    print(f"{'million tokens a second':34}{'short':>10}{'ratio':>8}{'long':>10}{'ratio':>8}")
    base = {kind: column["ArrayRecord, group size 1"] for kind, column in columns.items()}
    for name in columns["short"]:
        cells = (f"{columns[kind][name] / 1e6:10.1f}{columns[kind][name] / base[kind]:8.2f}" for kind in columns)
        print(f"{name:34}{''.join(cells)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000, help="log-normal documents")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    given = parser.parse_args()
    main(given.documents, given.rounds)
