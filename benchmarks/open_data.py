"""The round trip: text in Parquet, four sources with licenses -> curated -> tokenized -> packed -> batches.

    python benchmarks/open_data.py [--megabytes=200] [--no-curation] [--tokenizer=bpe:8192] [--packing=best_fit]
                                   [--length=4096] [--batch=64] [--workers=0] [--directory=/tmp]

The text is made of this interpreter's standard library: sentences of its docstrings, and blocks of its code in one of
the sources, drawn at random into documents of log-normal length. Every hundredth document of `web` is an exact copy of
an earlier one, every hundredth another with a word changed, and one in two hundred holds an item of an evaluation set.

Each stage runs in a process of its own, with workers of its own. `memory` is the most that it and they had together,
sampled ten times a second (Linux); what they share is counted for each. Megabytes are those of text: of the curated
text, after curation. Everything is below a temporary directory, and removed.

2026-11-22, 2 cores, 200 MB in 39,535 documents. All 172 near copies and 87 documents with evaluation items were removed
as such, and of 173 exact copies 171: filters had dropped two with their originals.

    stage                seconds  memory, MB   MB/s  million tokens/s
    curate                 128.3         695    1.6
    tokenizer, bpe:8192      1.6         252
    tokenize                 8.3         620   22.6              4.49
    pack, best_fit           0.4         152  456.2             90.58
    batches                  6.9         410                    22.80
"""

import argparse
import ast
import contextlib
import dataclasses
import json
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from packing import PACKINGS, in_fresh_process, print_table

# Name, license, median number of sentences in a document, and how many of them are blocks of code. Filters for prose,
# which drop what is mostly code, are to leave most of it.
SOURCES = (
    ("web", "CC-BY-4.0", 30, 0.0),
    ("encyclopedia", "CC-BY-SA-4.0", 60, 0.0),
    ("books", "CC0-1.0", 600, 0.0),
    ("manuals", "PSF-2.0", 40, 0.05),
)
SENTENCE = re.compile(r"[A-Za-z][A-Za-z ,'-]{30,}[.!?]")
BLOCK_CHARACTERS = 400
FILE_BYTES = 16_000_000
ITEMS = 20


def standard_library() -> tuple[list[str], list[str]]:
    """Sentences of the standard library's docstrings, and short blocks of its code."""
    from opendeep_jax.config.schema import SourceConfig
    from opendeep_jax.data.sources import list_files, list_parts, read_part

    source = SourceConfig()
    sentences, blocks = [], []
    for part in list_parts(source, list_files(source)):
        for document in read_part(source, part, lambda reason, id: None):
            blocks += re.split(r"\n(?=def |class |    def )", document.text)
            with contextlib.suppress(SyntaxError):
                for node in ast.walk(ast.parse(document.text)):
                    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                        sentences += re.split(r"(?<=[.!?])\s+", " ".join((ast.get_docstring(node) or "").split()))
    short = [block for block in blocks if len(block) < BLOCK_CHARACTERS]
    return [text for text in dict.fromkeys(sentences) if SENTENCE.fullmatch(text)], short


def write_sources(root: Path, megabytes: int) -> dict[str, int]:
    """Writes the sources below `root/text` and `root/items.jsonl`; gives what was planted, and all bytes of text."""
    sentences, blocks = standard_library()
    chance = random.Random(0)
    words = sorted({word for sentence in sentences for word in sentence.split() if word.isalpha()})
    items = [" ".join(chance.choices(words, k=40)) + "." for _ in range(ITEMS)]
    (root / "items.jsonl").write_text("".join(json.dumps({"question": item}) + "\n" for item in items), "utf-8")
    facts = {"bytes": 0, "documents": 0, "exact copies": 0, "near copies": 0, "with evaluation items": 0}
    for name, license, median, share in SOURCES:
        code = chance.choices(blocks, k=int(len(sentences) * share))
        documents = _documents(chance, [*sentences, *code], median)
        if name == "web":
            documents = _plant(documents, chance, items, facts)
        _write_parquet(root / "text" / name, name, license, documents, megabytes * 1_000_000 // len(SOURCES), facts)
    return facts


def _documents(chance: random.Random, pieces: list[str], median: int) -> Iterator[str]:
    while True:
        drawn = chance.choices(pieces, k=max(5, int(median * chance.lognormvariate(0, 0.8))))
        yield "\n\n".join(" ".join(drawn[first : first + 5]) for first in range(0, len(drawn), 5))


def _plant(documents: Iterator[str], chance: random.Random, items: list[str], facts: dict[str, int]) -> Iterator[str]:
    earlier = []
    for number, text in enumerate(documents):
        if number % 100 == 49:
            facts["exact copies"] += 1
            text = earlier[number // 200]
        elif number % 100 == 99:
            facts["near copies"] += 1
            words = max(earlier[number // 200 : number // 200 + 20], key=len).split(" ")
            words[len(words) // 2] = f"otherwise{number}"
            text = " ".join(words)
        elif number % 200 == 20:
            facts["with evaluation items"] += 1
            text = f"{text}\n\n{chance.choice(items)}"
        elif len(earlier) < 50_000:
            earlier.append(text)
        yield text


def _write_parquet(
    directory: Path, name: str, license: str, documents: Iterator[str], size: int, facts: dict[str, int]
) -> None:
    import pyarrow
    import pyarrow.parquet

    directory.mkdir(parents=True)
    written = number = 0
    while written < size:
        texts, file_bytes = [], 0
        while file_bytes < min(FILE_BYTES, size - written):
            texts.append(next(documents))
            file_bytes += len(texts[-1].encode("utf-8"))
        ids = [f"{name}-{number + i}" for i in range(len(texts))]
        urls = [f"https://example.org/{id}" for id in ids]
        columns = {"id": ids, "url": urls, "license": [license] * len(texts), "text": texts}
        path = directory / f"{number:08d}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=500)
        written, number = written + file_bytes, number + len(texts)
    facts["bytes"] += written
    facts["documents"] += number


def configuration(root: Path, given: argparse.Namespace):
    """The RunConfig of the round trip."""
    from opendeep_jax.config.schema import (
        CurationConfig,
        DataConfig,
        ModelConfig,
        OptimizerConfig,
        RunConfig,
        SourceConfig,
        TrainConfig,
    )

    curation = CurationConfig(
        quality=("gopher_repetition", "gopher_quality"),
        exact_deduplication=True,
        minhash_deduplication=True,
        mask_personal_data=True,
        evaluation_sets=(str(root / "items.jsonl"),),
    )
    fields = {"id_field": "id", "url_field": "url", "license_field": "license", "epochs": 1e9}
    data = DataConfig(
        sources=tuple(SourceConfig(name, str(root / "text" / name), **fields) for name, *_ in SOURCES),
        tokenizer=given.tokenizer,
        directory=str(root / "data"),
        sequence_length=given.length,
        packing=given.packing,
        curation=curation if given.curation else CurationConfig(),
        workers=given.workers,
    )
    return RunConfig(
        model=ModelConfig(vocab_size=1 << 18),
        data=data,
        optimizer=OptimizerConfig(warmup_steps=0),
        train=TrainConfig(steps=10**6, batch_size=given.batch),
    )


def curate(config) -> tuple[tuple, dict]:
    """The sources after curation, and its account."""
    from opendeep_jax.data.curation import curate, read_accounting

    sources = curate(config.data, progress=False)
    return tuple(sources), read_accounting(sources)


def train_tokenizer(config) -> Any:
    """The tokenizer, trained or opened."""
    from opendeep_jax.data.tokenizers import prepare_tokenizer

    return prepare_tokenizer(config, progress=False)


def tokenize(config, tokenizer, root: Path) -> tuple[tuple, int, int]:
    """Makes the store of each source; gives sources that are these stores, and their bytes and tokens."""
    from opendeep_jax.config.schema import SourceConfig
    from opendeep_jax.data.sources import list_files, list_parts
    from opendeep_jax.data.storing.prepare import prepare_store

    stores = []
    for source in config.data.sources:
        parts, directory = list_parts(source, list_files(source)), root / "stores" / source.name
        facts = {"curation": None}
        stores.append(prepare_store(directory, source, parts, tokenizer, facts, config.data.workers))
    sources = tuple(
        SourceConfig(source.name, str(store.directory), epochs=source.epochs)
        for source, store in zip(config.data.sources, stores, strict=True)
    )
    totals = (sum(store.manifest[name] for store in stores) for name in ("bytes", "tokens"))
    return sources, *totals


def pack(config) -> dict[str, float]:
    """Makes the plans of the stores; gives their rates of padding and truncation, over all rows."""
    from opendeep_jax.data.opening import open_data

    plans = list(open_data(config, progress=False).plans.values())
    rows = sum(plan.rows for plan in plans)
    return {key: sum(plan.manifest[key] * plan.rows for plan in plans) / rows for key in ("padding", "truncated")}


def read(config, seconds: float) -> tuple[int, float]:
    """Tokens that `Data.iterate` gives in about so many seconds, and the seconds."""
    from opendeep_jax.data.opening import open_data

    batches = open_data(config, progress=False).iterate()
    tokens, begun = 0, time.perf_counter()
    while time.perf_counter() < begun + seconds:
        tokens += next(batches).tokens.size
    return tokens, time.perf_counter() - begun


class Stages:
    """Runs stages, each in a fresh process, and keeps a line of the table for each."""

    def __init__(self):
        self.lines: list[dict[str, str]] = []

    def run(self, name: str, function: Callable, *arguments: Any) -> Any:
        """Runs one stage; its speed comes with `speed`."""
        with tree_memory() as peak:
            begun = time.perf_counter()
            result = in_fresh_process(function, *arguments)
            self.seconds = time.perf_counter() - begun
        self.lines.append({"stage": name, "seconds": f"{self.seconds:.1f}", "memory, MB": f"{peak[0] / 1e6:,.0f}"})
        return result

    def speed(self, text_bytes: int = 0, tokens: int = 0, seconds: float = 0.0) -> None:
        """Says what the last stage has worked on, and how long, if not all of its time."""
        seconds = seconds or self.seconds
        self.lines[-1]["MB/s"] = f"{text_bytes / seconds / 1e6:.1f}" if text_bytes else ""
        self.lines[-1]["million tokens/s"] = f"{tokens / seconds / 1e6:.2f}" if tokens else ""


@contextlib.contextmanager
def tree_memory() -> Iterator[list[int]]:
    """Samples the memory of this process and its descendants: the list's one number is the most bytes so far."""
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.1):
            peak[0] = max(peak[0], sum(map(_resident, _descendants(os.getpid()))))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text("utf-8", "replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [root]
    for process in found:  # which grows
        found += children.get(process, [])
    return found


def _resident(process: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{process}/statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the text, runs all stages, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="text of all sources together")
    parser.add_argument("--curation", action=argparse.BooleanOptionalAction, default=True, help="curate the text first")
    parser.add_argument("--tokenizer", default="bpe:8192", help="as data.tokenizer")
    parser.add_argument("--packing", choices=PACKINGS, default="best_fit", help="as data.packing")
    parser.add_argument("--length", type=int, default=4096, help="positions in a row")
    parser.add_argument("--batch", type=int, default=64, help="rows in a batch")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 is one for each core")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long batches are read")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where all is written, and removed again")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=given.directory) as temporary:
        round_trip(Path(temporary), given)


def round_trip(root: Path, given: argparse.Namespace) -> None:
    """All stages below `root`."""
    from opendeep_jax.config.schema import CurationConfig

    stages, text = Stages(), in_fresh_process(write_sources, root, given.megabytes)
    planted = ", ".join(f"{count:,} {name}" for name, count in text.items())
    print(f"{len(SOURCES)} sources: {planted}\n", flush=True)
    config = configuration(root, given)
    if given.curation:
        sources, account = stages.run("curate", curate, config)
        stages.speed(text["bytes"])
        data = dataclasses.replace(config.data, sources=sources, curation=CurationConfig())
        config = dataclasses.replace(config, data=data)
    tokenizer = stages.run(f"tokenizer, {given.tokenizer}", train_tokenizer, config)
    stages.speed()
    stores, text_bytes, tokens = stages.run("tokenize", tokenize, config, tokenizer, root)
    stages.speed(text_bytes, tokens)
    data = dataclasses.replace(config.data, sources=stores, tokenizer=tokenizer.path or tokenizer.name)
    config = dataclasses.replace(config, data=data)
    rates = stages.run(f"pack, {given.packing}", pack, config)
    stages.speed(text_bytes, tokens)
    stages.speed(0, *stages.run("batches", read, config, given.seconds))
    print_table(stages.lines)
    print(f"\n{text_bytes:,} bytes, {tokens:,} tokens; padding {rates['padding']:.3%}, cut {rates['truncated']:.3%}")
    if given.curation:
        print("\ndropped:")
        for source, counts in account["sources"].items():
            reasons = (f"{dropped['documents']:,} {reason}" for reason, dropped in counts["dropped"].items())
            print(f"  {source}, of {counts['documents_in']:,}: {', '.join(reasons) or 'none'}")


if __name__ == "__main__":
    main()
