"""The stages of a curation. Each works on one rank at a time, from files to files, whoever runs it and wherever.

filter      reads a task's documents, drops by quality and language, writes the rest and their hashes
duplicates  decides which copies go
finish      a task again: drops copies and evaluation overlap, masks personal data, writes the result
account     adds up the counts of all tasks, gathers what was dropped, and ends with curation.json
"""

import contextlib
import json
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import replacing
from opendeep_jax.config.storage import write_file, writing
from opendeep_jax.data.curation import duplicates
from opendeep_jax.data.curation.accounting import write_accounting
from opendeep_jax.data.curation.plan import CurationPlan, Task, read_plan
from opendeep_jax.data.curation.recipe import EVALUATION_OVERLAP, Step, filter_steps, final_steps, quiet_datatrove
from opendeep_jax.data.curation.tables import CurationTable, Dropped, read_table
from opendeep_jax.data.curation.words import may_be_english
from opendeep_jax.data.sources import read_part

Advance = Callable[[int], None]

REASONS = {duplicates.EXACT: "exact duplicate", duplicates.NEAR: "near duplicate"}
REPORT_BYTES = 1 << 18  # of progress that are reported at one time


def run_rank(directory: str, stage: str, rank: int, advance: Advance) -> None:
    """Do one rank of a stage, unless it is done. Raises ConfigError for what the user can correct."""
    plan = read_plan(Path(directory))
    if plan.mark(stage, rank).exists():
        return
    quiet_datatrove()
    counts = STAGES[stage](plan, rank, advance)
    if stage != "account":  # which takes the marks away
        write_file(plan.mark(stage, rank), json.dumps(counts))


class _Counts:
    """Counts of one task: documents and bytes in and out, dropped ones by reason, processor seconds by step."""

    def __init__(self, advance: Advance):
        self.totals: Counter[str] = Counter()
        self.dropped: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.licenses: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.languages: Counter[str] = Counter()
        self.masked: Counter[str] = Counter()
        self.overlaps: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self._advance, self._unreported = advance, 0

    def drop(self, reason: str, size: int) -> None:
        self.dropped[reason].update(documents=1, bytes=size)

    def advance(self, size: int) -> None:
        self._unreported += size
        if self._unreported >= REPORT_BYTES:
            self._advance(self._unreported)
            self._unreported = 0

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[step] += time.process_time() - start

    def timed_items(self, step: str, items: Iterator) -> Iterator:
        while True:
            with self.timed(step):
                item = next(items, None)
            if item is None:
                return
            yield item

    def drop_reason(self, steps: dict[str, Step], document) -> str | None:
        for name, step in steps.items():
            with self.timed(name):
                reason = step(document)
            if reason:
                return reason
        return None

    def as_dict(self) -> dict:
        names = "dropped", "licenses", "languages", "masked", "overlaps", "seconds"
        return dict(self.totals) | {name: getattr(self, name) for name in names}


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def _filter(plan: CurationPlan, rank: int, advance: Advance) -> dict:
    """Write RANK.parquet, RANK.exact.npy (uint64 [documents, 2]), RANK.minhash.npy (uint64 [bands, documents])."""
    recipe, task, counts = plan.curation, plan.tasks[rank], _Counts(advance)
    exact, bands = [], []
    with CurationTable(plan.work("filter", f"{rank:05d}.parquet")) as table, _dropped(plan, "filter", rank) as dropped:
        for document, size in _filtered(plan, task, counts, dropped):
            with counts.timed("write"):
                metadata = document.metadata
                language = metadata.get("language", "")
                table.add(document.id, document.text, metadata["url"], metadata["license"], language, size=size)
            with counts.timed("hash"):
                if recipe.exact_deduplication:
                    exact.append(duplicates.text_hash(document.text.encode("utf-8")))
                if recipe.minhash_deduplication:
                    bands.append(duplicates.band_hashes(document.text, recipe))
            counts.totals["documents_kept"] += 1
    if recipe.exact_deduplication:
        _save(plan.work("filter", f"{rank:05d}.exact.npy"), np.array(exact, np.uint64).reshape(-1, 2))
    if recipe.minhash_deduplication:
        hashes = np.array(bands, np.uint64).reshape(-1, recipe.minhash_buckets)
        _save(plan.work("filter", f"{rank:05d}.minhash.npy"), np.ascontiguousarray(hashes.T))
    return counts.as_dict()


def _filtered(plan: CurationPlan, task: Task, counts: _Counts, dropped: Dropped) -> Iterator:
    """(datatrove document, bytes of its text) for each document of a task that passes the filters."""
    from datatrove.data import Document

    source, steps = plan.sources[task.source], filter_steps(plan.curation)

    def skip(reason: str, id: str) -> None:
        counts.totals["documents_in"] += 1
        counts.drop(reason, 0)

    for part in task.parts:
        for record in counts.timed_items("read", read_part(source, part, skip)):
            size = _size(record.text)
            counts.totals.update(documents_in=1, bytes_in=size)
            counts.advance(size)
            document = Document(record.text, record.id, metadata={"url": record.url, "license": record.license})
            reason = counts.drop_reason(steps, document)
            if document.text is not record.text:
                new_size = _size(document.text)
                counts.totals["bytes_trimmed"] += size - new_size
                size = new_size
            if reason:
                if reason.partition(":")[0] in plan.curation.quality and not may_be_english(record.text):
                    counts.totals["not_english"] += 1
                counts.drop(reason, size)
                dropped.add(reason, id=record.id, source=source.name, text=document.text)
            else:
                yield document, size


@contextlib.contextmanager
def _dropped(plan: CurationPlan, stage: str, rank: int) -> Iterator[Dropped]:
    directory = plan.work(stage, f"{rank:05d}.dropped")
    shutil.rmtree(directory, ignore_errors=True)  # what an attempt that was killed left there
    with Dropped(directory) as dropped:
        yield dropped


def _save(path: Path, array: np.ndarray) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, array)


def _duplicates(plan: CurationPlan, rank: int, advance: Advance) -> dict:
    """Write decisions.npy, uint8 [documents], and offsets.npy, int64 [ranks + 1]."""
    start, recipe, ranks = time.process_time(), plan.curation, range(len(plan.tasks))
    offsets = np.cumsum([0, *(counts.get("documents_kept", 0) for counts in plan.counts("filter"))])
    decisions = np.zeros(offsets[-1], np.uint8)
    exact = near = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if recipe.exact_deduplication:
        hashes = [np.load(plan.work("filter", f"{rank:05d}.exact.npy")) for rank in ranks]
        exact = duplicates.exact_copies(np.concatenate(hashes))
        decisions[exact[0]] = duplicates.EXACT
    if recipe.minhash_deduplication:
        paths = [plan.work("filter", f"{rank:05d}.minhash.npy") for rank in ranks]
        bands = ([np.load(path, mmap_mode="r")[band] for path in paths] for band in range(recipe.minhash_buckets))
        near = duplicates.near_copies(bands, decisions != duplicates.KEPT)
        decisions[near[0]] = duplicates.NEAR
    _save(plan.work("duplicates", "decisions.npy"), decisions)
    _save(plan.work("duplicates", "offsets.npy"), offsets)
    clusters = duplicates.cluster_sizes(exact, near)
    return {"clusters": clusters, "seconds": {"duplicates": time.process_time() - start}}


def _finish(plan: CurationPlan, rank: int, advance: Advance) -> dict:
    """Write the task's file of the result, and RANK.dropped."""
    from datatrove.data import Document

    task, counts = plan.tasks[rank], _Counts(advance)
    source = plan.sources[task.source]
    steps = final_steps(plan.curation, plan.work("evaluation"), counts.masked)
    path = plan.source_directory(task.source) / f"{task.number:05d}.parquet"
    rows = counts.timed_items("write", read_table(plan.work("filter", f"{rank:05d}.parquet")))
    with CurationTable(path) as table, _dropped(plan, "finish", rank) as dropped:
        for (id, text, url, license, language), decision in zip(rows, _decisions(plan, rank), strict=False):
            size = _size(text)
            counts.advance(size)
            document = Document(text, id)
            reason = REASONS.get(decision) or counts.drop_reason(steps, document)
            if reason:
                counts.drop(reason, size)
                why = {}
                if reason == EVALUATION_OVERLAP:
                    counts.overlaps[document.metadata["evaluation_set"]] += 1
                    why = document.metadata
                dropped.add(reason, id=id, source=source.name, **why, text=text)
                continue
            new_size = _size(document.text)
            with counts.timed("write"):
                table.add(id, document.text, url, license, language, size=new_size)
            counts.totals.update(documents_out=1, bytes_out=new_size, bytes_trimmed=size - new_size)
            counts.licenses[license].update(documents=1, bytes=new_size)
            counts.languages.update([language] if language else [])
    return counts.as_dict()


def _decisions(plan: CurationPlan, rank: int) -> Iterator[int]:
    path = plan.work("duplicates", "decisions.npy")
    if not path.exists():
        while True:
            yield duplicates.KEPT
    begin, end = np.load(path.with_name("offsets.npy"), mmap_mode="r")[rank : rank + 2]
    yield from np.load(path, mmap_mode="r")[begin:end].tolist()


def _account(plan: CurationPlan, rank: int, advance: Advance) -> dict:
    _gather_dropped(plan)
    for path in plan.directory.glob("*/.*"):  # what attempts that were killed left there
        if path.is_file():
            path.unlink(missing_ok=True)
    write_accounting(plan)
    shutil.rmtree(plan.directory / "work", ignore_errors=True)
    return {}


def _gather_dropped(plan: CurationPlan) -> None:
    """Join the tasks' files of each reason: gzip files one after the other are one gzip file."""
    files = defaultdict(list)
    for stage in ("filter", "finish"):
        for rank in range(len(plan.tasks)):
            for path in sorted(plan.work(stage, f"{rank:05d}.dropped").glob("*.jsonl.gz")):
                files[path.name].append(path)
    for name, paths in files.items():
        whole = plan.directory / "dropped" / name
        with writing(whole):
            whole.parent.mkdir(exist_ok=True)
            with replacing(whole) as temporary, open(temporary, "wb") as sink:
                for path in paths:
                    with open(path, "rb") as part:
                        shutil.copyfileobj(part, sink, 1 << 20)


STAGES: dict[str, Callable[[CurationPlan, int, Advance], dict]] = {
    "filter": _filter,
    "duplicates": _duplicates,
    "finish": _finish,
    "account": _account,
}


MOST_NOT_ENGLISH = 0.1
"""Share of a source's documents that quality filters may drop without being asked about their language."""


def refuse_nothing_left(accounting: dict) -> None:
    """Raise ConfigError if a source has lost all its documents, or many to thresholds of another language."""
    for name, source in accounting["sources"].items():
        foreign, recipe = source.get("not_english", 0), accounting["recipe"]
        if foreign > MOST_NOT_ENGLISH * source["documents_in"] and not recipe["languages"]:
            raise ConfigError(
                f"Of the {source['documents_in']} documents of source {name!r}, {foreign} that are not in English were "
                f"dropped by data.curation.quality ({', '.join(recipe['quality'])}), whose thresholds are those of "
                "papers on English text and mean nothing for other languages. Leave quality out for this text; or say "
                "that the others are to go, with --data.curation.languages en and a --data.curation.language_model."
            )
        if not source["documents_out"]:
            reasons = sorted(source["dropped"].items(), key=lambda item: -item[1]["documents"])
            summary = ", ".join(f"{reason} ({counts['documents']})" for reason, counts in reasons[:3])
            raise ConfigError(
                f"Curation left none of the {source['documents_in']} documents of source {name!r}: {summary}. Loosen "
                "data.curation, or take the source out of data.sources."
            )
