"""`opendeep data where` and `when` on a store whose manifests take 10 GB: seconds of the whole command.

    python benchmarks/where_at_scale.py [--gigabytes=10] [--batch=64] [--rounds=5] [--copy] [--directory=/tmp]

One real shard of 8,000 documents and one with a planted document are made; the store is the first of them as often as
it takes for its manifests to reach the size, with the second in the midst. Its files are hard links, its shards.arrow
and store.json are genuine, and so are the run and the packing plans over all its documents. Only the text exists once.
`--copy` copies each shard's documents.arrow, so that the file cache holds no more of it than it would of another store;
that takes the space. All is below a temporary directory, and removed.

Commands run as a user runs them, `python -m opendeep_jax data ...`, imports included. `cold` is after the kernel was
told to forget the store and the plans, without the interpreter's own files.

2026-11-22, 2 cores, 62.8 million documents in 7,852 shards, 10.0 GB of manifests and 1.1 GB of plans, linked:

    opendeep data ...         documents  cold, s  warm, s  slowest, s
    where --step=N (64 rows)        262     1.20     0.90        1.04
    where --step=N --row=0            5     0.49     0.36        0.39
    when --doc=ID                     1     3.27     2.64        2.75
"""

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from packing import document_tokens, in_fresh_process, print_table
from read_batches import WORDS, forget

PLANTED = "<urn:planted:document>"
DOCUMENTS = 8_000
LENGTH = 4096


def write_shards(root: Path, documents: int) -> None:
    """Makes the store `root/two` of two shards: one of `documents` documents, and one with the planted document."""
    import pyarrow
    import pyarrow.parquet

    from opendeep_jax.config.schema import SourceConfig
    from opendeep_jax.data.sources import list_files, list_parts
    from opendeep_jax.data.storing.prepare import prepare_store
    from opendeep_jax.text.files import byte_tokenizer

    (root / "text").mkdir()
    sizes = document_tokens(documents).tolist()
    text = WORDS * (max(sizes) // len(WORDS) + 2)
    ids = [f"<urn:uuid:{number:08x}-79b2-4f6c-9d2e-1b8f3a5c7d9e>" for number in range(documents)]
    for name, some in (("common", ids), ("planted", [*ids[:99], PLANTED])):
        table = {
            "id": some,
            "url": [f"https://www.example.org/a/path/of/the/usual/length/{id[10:18]}.html" for id in some],
            "license": ["CC-BY-4.0" if i % 3 else "CC0-1.0" for i in range(len(some))],
            "text": [text[i % len(WORDS) :][:size] for i, size in zip(range(len(some)), sizes, strict=False)],
        }
        pyarrow.parquet.write_table(pyarrow.table(table), root / "text" / f"{name}.parquet")
    fields = {"id_field": "id", "url_field": "url", "license_field": "license"}
    source = SourceConfig("web", str(root / "text"), **fields)
    parts = list_parts(source, list_files(source))
    prepare_store(root / "two", source, parts, byte_tokenizer(), {"curation": None}, workers=1, shard_bytes=1)


def repeat_shards(root: Path, size: int, copy: bool) -> None:
    """Makes the store `root/store`, whose manifests take `size` bytes, of the shards of `root/two`."""
    import pyarrow

    from opendeep_jax.data.store import index_facts, open_store
    from opendeep_jax.data.storing.shards import write_arrow, write_json

    two, store = open_store(root / "two"), root / "store"
    both = two.index.to_pylist()
    shards = -(-size // two.files(0)["documents.arrow"]["size"])
    rows, first_document, first_token = [], 0, 0
    for number in range(shards + 1):
        which = int(number == shards // 2)
        of, shard = both[which], store / "shards" / f"{number:08d}"
        for name in two.files(which):
            (shard / name).parent.mkdir(parents=True, exist_ok=True)
            put = shutil.copyfile if copy and name == "documents.arrow" else os.link
            put(two.shard_directory(which) / name, shard / name)
        rows.append(of | {"name": shard.name, "first_document": first_document, "first_token": first_token})
        first_document, first_token = first_document + of["documents"], first_token + of["tokens"]
    columns = {field.name: pyarrow.array([row[field.name] for row in rows], field.type) for field in two.index.schema}
    index = store / "shards.arrow"
    write_arrow(index, columns, {})
    facts = index_facts(index)
    totals = {"shards": len(rows), "documents": first_document, "tokens": first_token}
    totals |= {"bytes": sum(row["bytes"] for row in rows), "content_hash": facts["sha256"], "index": facts}
    write_json(store / "store.json", two.manifest | totals)


def make_run(root: Path, batch_size: int) -> dict[str, int]:
    """Packs the store and writes the work directory `root/run`; gives counts of what there is."""
    from opendeep_jax.config.load import save_run_config
    from opendeep_jax.config.schema import DataConfig, OptimizerConfig, RunConfig, SourceConfig, TrainConfig
    from opendeep_jax.data.describe import describe
    from opendeep_jax.data.prepared import prepare

    data = DataConfig(
        sources=(SourceConfig("web", str(root / "store")),),
        tokenizer="bytes",
        directory=str(root / "data"),
        sequence_length=LENGTH,
    )
    optimizer = OptimizerConfig(warmup_steps=0)
    config = RunConfig(data=data, optimizer=optimizer, train=TrainConfig(steps=1, batch_size=batch_size))
    (plan,) = prepare(config, progress=False)[1].plans.values()
    steps = plan.rows // batch_size
    config = dataclasses.replace(config, train=TrainConfig(steps=steps, batch_size=batch_size))
    tokenizer, prepared = prepare(config, progress=False)
    (root / "run").mkdir()
    save_run_config(config, config, root / "run")
    (root / "run" / "data.json").write_text(json.dumps(describe(prepared, tokenizer)), "utf-8")
    store = prepared.stores[0]
    return {"documents": store.documents, "shards": store.shards, "rows": plan.rows, "steps": steps}


def bytes_of(paths: Sequence[Path]) -> int:
    """Sum of the files' sizes, as their names show them."""
    return sum(path.stat().st_size for path in paths)


def run(arguments: Sequence[str]) -> tuple[float, list[dict]]:
    """Seconds of one command, and the JSON lines that it prints."""
    command = [sys.executable, "-m", "opendeep_jax", "data", *arguments]
    begun = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - begun, [json.loads(line) for line in done.stdout.splitlines()]


def measure(commands: Sequence[list[str]], files: Sequence[Path], name: str) -> dict[str, str]:
    """A line of the table: the first command after the kernel forgot `files`, the others with what is there then."""
    forget(files)
    cold, printed = run(commands[0])
    warm = [run(command)[0] for command in commands]
    return {
        "opendeep data ...": name,
        "documents": f"{len(printed):,}",
        "cold, s": f"{cold:.2f}",
        "warm, s": f"{statistics.median(warm):.2f}",
        "slowest, s": f"{max(warm):.2f}",
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the store and its plans, asks, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the store's manifests")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="documents in a shard")
    parser.add_argument("--batch", type=int, default=64, help="rows in a batch")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are asked for")
    parser.add_argument("--copy", action="store_true", help="copy each documents.arrow in place of linking it")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where the store is made, and removed")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=given.directory) as temporary:
        root = Path(temporary)
        in_fresh_process(write_shards, root, given.documents)
        in_fresh_process(repeat_shards, root, int(given.gigabytes * 1e9), given.copy)
        counts = in_fresh_process(make_run, root, given.batch)
        manifests = [*root.glob("store/*.*"), *root.glob("store/shards/*/documents.arrow")]
        plans = list(root.glob("data/plans/*/*"))
        counts |= {"bytes of manifests": bytes_of(manifests), "bytes of plans": bytes_of(plans)}
        print(", ".join(f"{number:,} {name}" for name, number in counts.items()) + "\n")

        files = [path for path in (root / "store").rglob("*") if path.is_file()] + plans
        workdir = f"--workdir={root / 'run'}"
        steps = [counts["steps"] * i // given.rounds for i in range(given.rounds)]
        where = [["where", workdir, f"--step={step}"] for step in steps]
        when = ["when", workdir, f"--doc={PLANTED}"]
        rows = [measure(where, files, f"where --step=N ({given.batch} rows)")]
        rows.append(measure([[*command, "--row=0"] for command in where], files, "where --step=N --row=0"))
        rows.append(measure(list(itertools.repeat(when, given.rounds)), files, "when --doc=ID"))
        print_table(rows)

        seen = run(when)[1][0]["seen"][0]
        pieces = run(["where", workdir, f"--step={seen['step']}", f"--row={seen['row']}"])[1]
        found = "too" if PLANTED in (piece["id"] for piece in pieces) else "DOES NOT"
        print(f"\n`when` finds the planted document in step {seen['step']:,}; `where` {found}")


if __name__ == "__main__":
    main()
