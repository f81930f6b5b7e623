"""curation.json: every document that came in, and where it went."""

import dataclasses
import importlib.metadata
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import SourceConfig
from opendeep_jax.config.storage import write_file
from opendeep_jax.data.curation.plan import CurationPlan

VERSION = 2
"""Version of the accounting, and of all that decides the result: another one lets nothing old be used again."""

ENGINES = ("datatrove", "rensa", "fasttext-numpy2-wheel", "pyarrow")


def write_accounting(plan: CurationPlan) -> None:
    """Add up the counts of all tasks and write curation.json.

    By source: documents_in = documents_out + those dropped, and bytes_in = bytes_out + bytes_trimmed + those dropped,
    where a step trims bytes that takes lines out of a text, or masks (which may add some: then it is negative).
    """
    filtered, finished = plan.counts("filter"), plan.counts("finish")
    sources, seconds = {}, Counter()
    for i, source in enumerate(plan.sources):
        ranks = [rank for rank, task in enumerate(plan.tasks) if task.source == i]
        counts = [stage[rank] for stage in (filtered, finished) for rank in ranks]
        totals = {
            name: sum(count.get(name, 0) for count in counts)
            for name in ("documents_in", "bytes_in", "documents_out", "bytes_out", "bytes_trimmed", "not_english")
        }
        sources[source.name] = {
            "license": source.license,
            "citation": source.citation,
            "path": source.path,
            **totals,
            **{name: _sum_each(count[name] for count in counts) for name in ("dropped", "licenses")},
            **{name: _sum(count[name] for count in counts) for name in ("masked", "languages")},
        }
    for count in (*filtered, *finished):
        seconds.update(count["seconds"])
    overlaps = _sum(count["overlaps"] for count in finished)
    content = {
        "version": VERSION,
        "recipe": dataclasses.asdict(plan.curation),
        "engines": _versions(),
        "sources": sources,
        "evaluation_sets": {
            name: numbers | {"documents_removed": overlaps.get(name, 0)} for name, numbers in plan.evaluation.items()
        },
        "duplicate_clusters": {},
        "seconds": {},
    }
    if any(stage == "duplicates" for stage, _ in plan.stages()):
        decided = json.loads(plan.mark("duplicates", 0).read_text("utf-8"))
        content["duplicate_clusters"] = decided["clusters"]
        seconds.update(decided["seconds"])
    content["seconds"] = {step: round(value, 3) for step, value in sorted(seconds.items())}
    write_file(plan.directory / "curation.json", json.dumps(content, indent=1))


def read_accounting(sources: Sequence[SourceConfig]) -> dict:
    """Return the content of curation.json, of the sources that `curate` gave. Raises ConfigError if it is not there."""
    directory = Path(sources[0].path).parent
    accounting = load_accounting(directory)
    if accounting is None:
        raise ConfigError(f"{directory / 'curation.json'} is missing or damaged. Delete {directory} and curate again.")
    return accounting


def load_accounting(directory: Path) -> dict | None:
    """Return the content of curation.json, or None if the curation in `directory` is not finished."""
    try:
        return json.loads((directory / "curation.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _sum(counters) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return dict(sorted(total.items()))


def _sum_each(groups) -> dict[str, dict[str, int]]:
    totals: dict[str, Counter[str]] = {}
    for group in groups:
        for name, counter in group.items():
            totals.setdefault(name, Counter()).update(counter)
    return {name: dict(total) for name, total in sorted(totals.items())}


def _versions() -> dict[str, str]:
    found = {}
    for name in ENGINES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found
