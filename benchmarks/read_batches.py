"""Reading packed batches out of a token store, in tokens/s, beside what ArrayRecord and Grain reach on the same text.

    python benchmarks/read_batches.py [--tokens=300000000] [--seconds=3] [--batch=64] [--directory=/tmp]

A store of log-normal documents (mean about 1,100 tokens, uint16, larger than TensorStore's cache) is prepared in a
temporary directory, packed each way, and read in batches at random places: `cold` with one thread after the kernel was
told to forget its files, then with all files in its cache on one and two threads, and through `Data.iterate`. What the
others read are the same documents, in files written for them:

    memmap          one flat file, random documents copied out of it: what no format can beat by much
    ArrayRecord     random documents, 64 a call, with 1 or 16 documents in a chunk, uncompressed
    Grain           its shuffled MapDataset over the file with one in a chunk, as it asks for
    Grain, rows of  ... concatenated and split into rows, and batched: the nearest to what a Batch is

`memory` is the peak of the process, pages of mapped files included. The last columns divide the best warm figure by
ArrayRecord's best and by Grain's best in rows of that length. The disk below may have a cache of its own, so `cold` is
as cold as a process can make it.

2026-11-22, 2 cores, 200 million tokens, without the two ratios:

    million tokens/s                                cold  1 thread  2 threads  iterate  memory, MB  / Array
    memmap                                        365.87    416.85     275.09                  465
    ArrayRecord, 1 in a chunk                      50.77     63.45      74.48                  103
    ArrayRecord, 16 in a chunk                     53.97     71.18      81.10                   76
    Grain, documents                                1.92      2.51       4.65                  284
    Grain, rows of 4096                             2.16      2.85       3.96                  300
    Grain, rows of 512                              2.03      2.82       2.88                  283
    OpenDeep, rows of 4096, concatenate            15.11     22.41      21.16    19.97       1,118
    OpenDeep, rows of 512, concatenate              4.71      6.77       6.59     5.25         965
    OpenDeep, rows of 4096, best_fit               15.88     22.92      21.90    23.14       1,003
    OpenDeep, rows of 512, best_fit                 5.89      6.93       8.98     6.65       1,094
    OpenDeep, rows of 4096, concatenate, FIM 0.1   11.16     14.57      12.88    13.27       1,106
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from packing import document_tokens, in_fresh_process, peak_memory, print_table

LENGTHS = 4096, 512
GROUPS = 1, 16
PACKINGS = "concatenate", "best_fit"
DOCUMENTS_PER_FILE = 20_000
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an which "
# Packing, row length and rate of fill-in-the-middle of what is read.
KINDS = (*((packing, length, 0.0) for packing in PACKINGS for length in LENGTHS), ("concatenate", LENGTHS[0], 0.1))
WARM = ("1 thread", "2 threads", "iterate")


def write_text(directory: Path, tokens: int) -> None:
    """Writes about `tokens` bytes of documents as Parquet."""
    import pyarrow
    import pyarrow.parquet

    directory.mkdir()
    sizes = document_tokens(max(tokens // 1100, 64)).tolist()
    text = WORDS * (max(sizes) // len(WORDS) + 2)
    for number, first in enumerate(range(0, len(sizes), DOCUMENTS_PER_FILE)):
        some = sizes[first : first + DOCUMENTS_PER_FILE]
        texts = [text[i % len(WORDS) :][:size] for i, size in enumerate(some)]
        table = pyarrow.table({"id": [f"<urn:document:{first + i}>" for i in range(len(some))], "text": texts})
        pyarrow.parquet.write_table(table, directory / f"{number:04d}.parquet", row_group_size=2_000)


def configuration(root: Path, packing: str, length: int, fim_rate: float, batch_size: int):
    """The RunConfig that reads the text below `root`, byte by byte as tokens."""
    from opendeep_jax.config.schema import DataConfig, RunConfig, SourceConfig, TrainConfig

    source = SourceConfig("text", str(root / "text"), id_field="id", epochs=1e9)
    data = DataConfig(
        sources=(source,),
        tokenizer="bytes",
        directory=str(root / "data"),
        sequence_length=length,
        packing=packing,
        held_out_fraction=0.0,
        fim_rate=fim_rate,
    )
    return RunConfig(data=data, train=TrainConfig(steps=10**6, batch_size=batch_size))


def prepare_all(root: Path, batch_size: int) -> None:
    """Makes the store, and the plans of all that is measured."""
    from opendeep_jax.data.opening import open_data

    for kind in KINDS:
        open_data(configuration(root, *kind, batch_size), progress=False)


def write_others(root: Path) -> None:
    """Writes the store's documents for the other readers: one flat file, and ArrayRecord files."""
    from array_record.python.array_record_module import ArrayRecordWriter

    from opendeep_jax.data.store import open_store

    (directory,) = (root / "data" / "stores").iterdir()
    store = open_store(directory)
    offsets = np.concatenate([[0], np.cumsum(store.lengths(0, store.documents))])
    np.save(root / "offsets.npy", offsets)
    writers = [ArrayRecordWriter(str(root / f"{n}.array_record"), f"group_size:{n},uncompressed") for n in GROUPS]
    with open(root / "flat.bin", "wb") as flat:
        for first in range(0, store.documents, 1000):
            some = range(first, min(first + 1000, store.documents))
            for tokens in store.read([(document, 0, int(np.diff(offsets)[document])) for document in some]):
                flat.write(tokens)
                for writer in writers:
                    writer.write(tokens.tobytes())
    for writer in writers:
        writer.close()


def rate(take: Callable[[int], int], seconds: float, threads: int = 1) -> float:
    """Tokens a second that `threads` get with `take`, which is given 0, 1, 2, … and says how many tokens it read."""
    numbers = itertools.count()
    begun = time.perf_counter()

    def work(_) -> int:
        tokens = 0
        while time.perf_counter() < begun + seconds:
            tokens += take(next(numbers))
        return tokens

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, range(threads))) / (time.perf_counter() - begun)


def forget(paths: Sequence[Path]) -> None:
    """Asks the kernel to drop these files from its cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(paths: Sequence[Path]) -> None:
    """Brings these files into the kernel's cache."""
    for path in paths:
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass


def speeds(files: Sequence[Path], take: Callable[[int], int], seconds: float) -> dict[str, float]:
    """Tokens a second from a cold file cache, and from a warm one with one and two threads."""
    forget(files)
    cold = rate(take, seconds)
    remember(files)
    return {"cold": cold, "1 thread": rate(take, seconds), "2 threads": rate(take, seconds, 2)}


def measure_ours(root: Path, packing: str, length: int, fim_rate: float, batch_size: int, seconds: float) -> dict:
    """Speeds of `Data.batch` and `Data.iterate`, and the peak memory."""
    from opendeep_jax.data.opening import open_data

    data = open_data(configuration(root, packing, length, fim_rate, batch_size), progress=False)
    files = [path for path in (root / "data").rglob("*") if path.is_file()]
    measured = speeds(files, lambda step: data.batch(step).tokens.size, seconds)
    batches = data.iterate(10**5)
    measured["iterate"] = rate(lambda step: next(batches).tokens.size, seconds)
    return measured | {"memory": peak_memory()}


def measure_memmap(root: Path, seconds: float) -> dict:
    """Speeds of copying 64 random documents at a time."""
    offsets, flat = np.load(root / "offsets.npy"), np.memmap(root / "flat.bin", np.uint16, "r")

    def take(step: int) -> int:
        documents = np.random.default_rng(step).integers(0, len(offsets) - 1, 64).tolist()
        return len(np.concatenate([flat[offsets[document] : offsets[document + 1]] for document in documents]))

    return speeds([root / "flat.bin"], take, seconds) | {"memory": peak_memory()}


def random_reader(path: Path):
    """An ArrayRecordReader with the options for random access."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")


def measure_array_record(root: Path, group: int, seconds: float) -> dict:
    """Speeds of reading 64 random documents at a time."""
    path = root / f"{group}.array_record"
    reader = random_reader(path)
    documents = reader.num_records()

    def take(step: int) -> int:
        records = reader.read(np.random.default_rng(step).integers(0, documents, 64).tolist())
        return len(np.concatenate([np.frombuffer(record, np.uint16) for record in records]))

    return speeds([path], take, seconds) | {"memory": peak_memory()}


def measure_grain(root: Path, length: int, batch_size: int, seconds: float) -> dict:
    """Speeds of Grain: shuffled documents, or with a `length` batches of rows."""
    path = root / "1.array_record"
    measured = {}
    for speed, threads in (("cold", 1), ("1 thread", 1), ("2 threads", 2)):
        (forget if speed == "cold" else remember)([path])
        elements = grain_batches(path, length, batch_size, threads)
        measured[speed] = rate(lambda step, elements=elements: next(elements)["tokens"].size, seconds)
    return measured | {"memory": peak_memory()}


def grain_batches(path: Path, length: int, batch_size: int, threads: int) -> Iterator[dict[str, np.ndarray]]:
    """Grain's shuffled documents without end; concatenated, split into rows and batched if there is a `length`."""
    import grain

    documents = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(str(path))).seed(0).shuffle().repeat()
    documents = documents.map(lambda record: {"tokens": np.frombuffer(record, np.uint16)})
    documents = documents.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=256))
    if not length:
        return iter(documents)
    rows = grain.experimental.ConcatThenSplitIterDataset(documents, length_struct={"tokens": length + 1})
    return iter(rows.batch(batch_size))


class Reader(NamedTuple):
    """One line of the table."""

    name: str
    length: int
    """Of the rows it gives; 0 for documents."""
    measured: dict[str, float]

    @property
    def best(self) -> float:
        """Its best speed from a warm file cache."""
        return max(self.measured[speed] for speed in WARM if speed in self.measured)


def measure_all(root: Path, batch_size: int, seconds: float) -> Iterator[Reader]:
    """All readers, each measured in a process of its own."""
    yield Reader("memmap", 0, in_fresh_process(measure_memmap, root, seconds))
    for group in GROUPS:
        measured = in_fresh_process(measure_array_record, root, group, seconds)
        yield Reader(f"ArrayRecord, {group} in a chunk", 0, measured)
    for length in (0, *LENGTHS):
        measured = in_fresh_process(measure_grain, root, length, batch_size, seconds)
        yield Reader(f"Grain, rows of {length}" if length else "Grain, documents", length, measured)
    for packing, length, fim_rate in KINDS:
        measured = in_fresh_process(measure_ours, root, packing, length, fim_rate, batch_size, seconds)
        rule = f", FIM {fim_rate}" if fim_rate else ""
        yield Reader(f"OpenDeep, rows of {length}, {packing}{rule}", length, measured)


def line(reader: Reader, readers: Sequence[Reader]) -> dict[str, str]:
    """A reader's line of the table."""
    array_record = max(other.best for other in readers if other.name.startswith("ArrayRecord"))
    grain = [other.best for other in readers if other.name.startswith("Grain") and other.length == reader.length]
    speeds = (reader.measured.get(speed) for speed in ("cold", *WARM))
    return {
        "million tokens/s": reader.name,
        **{name: f"{speed / 1e6:.2f}" if speed else "" for name, speed in zip(("cold", *WARM), speeds, strict=True)},
        "memory, MB": f"{reader.measured['memory'] / 1e6:,.0f}",
        "/ ArrayRecord": f"{reader.best / array_record:.2f}",
        "/ Grain": f"{reader.best / max(grain):.2f}",
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all readers, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=300_000_000, help="size of the store")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement")
    parser.add_argument("--batch", type=int, default=64, help="rows in a batch")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where the text is written, and removed")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=given.directory) as temporary:
        root = Path(temporary)
        in_fresh_process(write_text, root / "text", given.tokens)
        in_fresh_process(prepare_all, root, given.batch)
        in_fresh_process(write_others, root)
        readers = list(measure_all(root, given.batch, given.seconds))
    print(f"{given.tokens:,} tokens, batches of {given.batch} rows\n")
    print_table([line(reader, readers) for reader in readers])


if __name__ == "__main__":
    main()
