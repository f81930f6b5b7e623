"""The plan of a curation, on disk where every worker reads it: sources, recipe, and the tasks the work is cut into.

CURATED/<key>/
    curation.json      the accounting, written last: the directory is whole
    <source>/00000.parquet ...      what is left, a file for each task
    dropped/<reason>.jsonl.gz       what is not
    work/              while it is going on, and gone afterwards:
        plan.json      this
        <stage>/00000.json          what a task of a stage counted, written last: it is done
        <stage>/00000.*             what it made
        evaluation/    hashes of the evaluation sets' n-grams
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

from opendeep_jax.config.schema import CurationConfig, SourceConfig
from opendeep_jax.config.storage import file_name, write_file
from opendeep_jax.data.sources import Part, SourceFile

TASK_BYTES = 64 << 20
"""Most text in a task, and so, before anything is dropped, in a file of the result."""
FEWEST_TASKS, SMALLEST_TASK = 64, 4 << 20
"""A corpus that would give fewer tasks gets smaller ones, so that all workers have some; but not below this."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Consecutive parts of one source."""

    source: int
    number: int
    """Place of the task among those of its source; the name of its file."""
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes of text, estimated."""
        return sum(part.size for part in self.parts)


@dataclasses.dataclass(frozen=True)
class CurationPlan:
    """One curation. A rank is the place of a task in `tasks`, which are in order of source and file."""

    directory: Path
    curation: CurationConfig
    sources: tuple[SourceConfig, ...]
    tasks: tuple[Task, ...]
    evaluation: dict[str, dict[str, int]]
    """Items and n-grams of each evaluation set."""

    def work(self, stage: str, name: str = "") -> Path:
        """Return a file or directory of a stage."""
        return self.directory / "work" / stage / name

    def mark(self, stage: str, rank: int) -> Path:
        """Return the file that says a task of a stage is done."""
        return self.work(stage, f"{rank:05d}.json")

    def counts(self, stage: str) -> list[dict]:
        """Return what the tasks of a stage that is done counted, by rank."""
        return [json.loads(self.mark(stage, rank).read_text("utf-8")) for rank in range(len(self.tasks))]

    def source_directory(self, source: int) -> Path:
        """Return where the curated files of a source are."""
        return self.directory / file_name(self.sources[source].name)

    def stages(self) -> list[tuple[str, int]]:
        """(name, number of ranks) of each stage, in order; each needs all ranks of those before it."""
        recipe = self.curation
        search = [("duplicates", 1)] if recipe.minhash_deduplication or recipe.exact_deduplication else []
        return [("filter", len(self.tasks)), *search, ("finish", len(self.tasks)), ("account", 1)]


def recipe_of(curation: CurationConfig) -> dict:
    """Return a recipe for hashes and manifests, as it was when there was a choice of MinHash engines."""
    fields = dataclasses.asdict(curation).items()
    names = {"minhash_ngram": {"minhash_engine": "rensa"}}
    return {key: value for name, field in fields for key, value in (names.get(name, {}) | {name: field}).items()}


def cut_tasks(parts: Sequence[Sequence[Part]]) -> tuple[Task, ...]:
    """Return the parts of all sources as tasks. They depend on the parts alone, never on the number of workers."""
    total = sum(part.size for of_source in parts for part in of_source)
    limit = min(TASK_BYTES, max(total // FEWEST_TASKS, SMALLEST_TASK))
    tasks = []
    for source, of_source in enumerate(parts):
        groups: list[list[Part]] = []
        size = limit
        for part in of_source:
            if size + part.size > limit:
                groups.append([])
                size = 0
            groups[-1].append(part)
            size += part.size
        tasks += [Task(source, number, tuple(group)) for number, group in enumerate(groups)]
    return tuple(tasks)


def write_plan(plan: CurationPlan) -> None:
    """Write plan.json. Raises ConfigError if it cannot be written."""
    content = dataclasses.asdict(plan) | {"directory": ""}
    write_file(plan.directory / "work" / "plan.json", json.dumps(content))
    read_plan.cache_clear()


@functools.lru_cache(1)
def read_plan(directory: Path) -> CurationPlan:
    """Return the plan that was written for `directory`. Raises OSError or ValueError if it was not."""
    content = json.loads((directory / "work" / "plan.json").read_text("utf-8"))
    tasks = tuple(Task(task["source"], task["number"], tuple(map(_part, task["parts"]))) for task in content["tasks"])
    sources = tuple(SourceConfig(**_tuples(source)) for source in content["sources"])
    return CurationPlan(
        directory, CurationConfig(**_tuples(content["curation"])), sources, tasks, content["evaluation"]
    )


def _part(values: list) -> Part:
    file, *rest = values
    return Part(SourceFile(*file), *rest)


def _tuples(fields: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
