"""Tokenizing text into a store, against the `tokenizers` library alone with the same threads on the same text.

    python benchmarks/tokenizing.py [--megabytes=100] [--workers=2] [--tokenizer=bpe:8192 | path] [--rounds=3]

The library is timed on texts in memory, handed over in the same batches, up to its ids; ours from the source's files
to the finished store: reading, hashing and writing included. The text is this interpreter's standard library, repeated
with changed words up to the size asked for. Rounds alternate, and the best of each counts; where other programs share
the machine, the rate per second of processor time tells more.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

BATCH_CHARACTERS = 1 << 20
FILE_BYTES = 4 << 20


def write_text(directory: Path, size: int) -> None:
    """Writes `size` bytes of text as .jsonl files of 4 MB."""
    from opendeep_jax.config.schema import SourceConfig
    from opendeep_jax.data.sources import list_files, list_parts, read_part

    source = SourceConfig()
    parts = list_parts(source, list_files(source))
    texts = [document.text for part in parts for document in read_part(source, part, lambda reason, id: None)]
    directory.mkdir()
    written = number = 0
    while written < size:
        lines, file_bytes = [], 0
        while file_bytes < FILE_BYTES and written + file_bytes < size:
            copy, place = divmod(number, len(texts))
            text = texts[place].replace("self", f"self{copy}") if copy else texts[place]
            lines.append(json.dumps({"text": text}))
            file_bytes += len(text.encode("utf-8"))
            number += 1
        (directory / f"{written // FILE_BYTES:05d}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        written += file_bytes


class Measured(NamedTuple):
    """What one measurement found; larger is faster."""

    bytes_per_second: float
    bytes_per_processor_second: float
    peak_memory: int
    """Bytes, of the largest process."""


def library_alone(directory: Path, tokenizer: Path) -> Measured:
    """The library's fastest call, in a process of its own with RAYON_NUM_THREADS set."""
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(tokenizer))
    library.encode_special_tokens = True
    texts = [json.loads(line)["text"] for path in sorted(directory.iterdir()) for line in open(path, encoding="utf-8")]
    batches, batch, characters = [], [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            batches.append(batch)
            batch, characters = [], 0
    batches.append(batch)
    library.encode_batch_fast(texts[:4], add_special_tokens=False)
    stop = stopwatch()
    for batch in batches:
        for encoding in library.encode_batch_fast(batch, add_special_tokens=False):
            _ = encoding.ids
    return stop(sum(len(text.encode("utf-8")) for text in texts))


def prepared(directory: Path, tokenizer: Path, workers: int) -> Measured:
    """`prepare_store`, from nothing to the finished store."""
    from opendeep_jax.config.schema import SourceConfig
    from opendeep_jax.data.sources import list_files, list_parts
    from opendeep_jax.data.storing.prepare import prepare_store
    from opendeep_jax.text.files import load_tokenizer

    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        opened = load_tokenizer(tokenizer)
        stop = stopwatch()
        source = SourceConfig("text", str(directory))
        parts = list_parts(source, list_files(source))
        store = prepare_store(Path(temporary, "store"), source, parts, opened, {}, workers)
        return stop(store.manifest["bytes"])


def stopwatch() -> Callable[[int], Measured]:
    """Starts the clocks; the function it gives stops them, for the bytes that were done."""
    both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN

    def processor() -> float:
        return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, both))

    begun, processor_begun = time.perf_counter(), processor()

    def stop(size: int) -> Measured:
        seconds, processor_seconds = time.perf_counter() - begun, processor() - processor_begun
        memory = max(resource.getrusage(who).ru_maxrss * 1024 for who in both)
        return Measured(size / seconds, size / processor_seconds, memory)

    return stop


def in_process(*arguments: str, threads: int) -> Measured:
    """Runs one measurement in a fresh interpreter."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    run = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return Measured(*json.loads(run.stdout))


def main(arguments: argparse.Namespace) -> None:
    """Measures both and prints a table."""
    from opendeep_jax.config.schema import SourceConfig
    from opendeep_jax.data.sources import list_files, list_parts, read_part
    from opendeep_jax.text.files import train_bpe

    with tempfile.TemporaryDirectory() as temporary:
        text, tokenizer = Path(temporary, "text"), Path(arguments.tokenizer)
        write_text(text, arguments.megabytes * 1_000_000)
        if arguments.tokenizer.startswith("bpe:"):
            source, tokenizer = SourceConfig("text", str(text)), Path(temporary, "tokenizer.json")
            part = list_parts(source, list_files(source))[0]
            texts = [document.text for document in read_part(source, part, lambda reason, id: None)]
            tokenizer.write_text(train_bpe(texts, int(arguments.tokenizer.removeprefix("bpe:"))), "utf-8")
        common = [f"--text={text}", f"--tokenizer={tokenizer}", f"--workers={arguments.workers}"]
        rows: dict[str, list[Measured]] = {"tokenizers alone": [], "opendeep data prepare": []}
        for _ in range(arguments.rounds):
            for name, measurement in zip(rows, ("library", "prepare"), strict=True):
                rows[name].append(in_process(f"--measure={measurement}", *common, threads=arguments.workers))
    print(f"{arguments.megabytes} MB of text, {arguments.workers} threads or processes, {arguments.tokenizer}")
    print(f"{'':24}{'MB/s':>8}{'ratio':>8}{'MB/CPU s':>12}{'ratio':>8}{'memory of the largest process, MB':>36}")
    base = [max(column) for column in zip(*rows["tokenizers alone"], strict=True)]
    for name, found in rows.items():
        wall, processor, memory = (max(column) for column in zip(*found, strict=True))
        print(
            f"{name:24}{wall / 1e6:8.2f}{wall / base[0]:8.2f}{processor / 1e6:12.2f}{processor / base[1]:8.2f}"
            f"{memory / 1e6:36.0f}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="size of the text")
    parser.add_argument("--workers", type=int, default=2, help="threads of the library, processes of ours")
    parser.add_argument("--tokenizer", default="bpe:8192", help="bpe:SIZE, or the path of a tokenizer.json")
    parser.add_argument("--rounds", type=int, default=3, help="how often both are measured")
    parser.add_argument("--measure", choices=["library", "prepare"], help=argparse.SUPPRESS)
    parser.add_argument("--text", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.measure:
        main(given)
    else:
        places = Path(given.text), Path(given.tokenizer)
        measured = library_alone(*places) if given.measure == "library" else prepared(*places, given.workers)
        print(json.dumps(measured))
