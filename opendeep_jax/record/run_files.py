"""A run's work directory read back: its records as columns over tokens or steps, whatever part of them exists."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opendeep_jax.record import metrics
from opendeep_jax.record.events import read_events
from opendeep_jax.record.goodput import Goodput, read_goodput

ROUTING_LINES = 300  # lines of experts.jsonl that are read: with 58 layers of 256 experts one takes some 200 kB


@dataclass(frozen=True)
class RunFiles:
    """What the files of a work directory say; empty where they are missing or unreadable."""

    workdir: Path
    config: dict
    diff: str
    """Difference of the configuration from its recipe."""
    summary: dict
    environment: dict
    origin: dict
    """What the run began from: another run's checkpoint, imported weights, or its seed."""
    steps: list[dict]
    """Lines of metrics.jsonl."""
    evaluations: list[dict]
    experts: list[dict]
    samples: list[dict]
    events: list[dict]
    goodput: Goodput | None

    @property
    def name(self) -> str:
        """The run's name, or its directory's."""
        return str(self.config.get("name") or self.workdir.resolve().name)

    @property
    def has_tokens(self) -> bool:
        """Whether time is counted in tokens (else in steps)."""
        return any(is_number(record.get("tokens")) for record in self.steps)

    def time(self, records: list[dict]) -> np.ndarray:
        """When each record was made, in tokens trained, or in steps where tokens are not logged."""
        steps = column(records, "step")
        if not self.has_tokens:
            return steps
        logged = [record for record in self.steps if is_number(record.get("tokens"))]
        between = np.interp(steps, column(logged, "step"), column(logged, "tokens"))
        tokens = column(records, "tokens")
        return np.where(np.isfinite(tokens), tokens, between)

    def number(self, key: str, records: list[dict] = ()) -> float | None:
        """A field of summary.json, else of the last record that has it as a finite number."""
        found = (record[key] for record in (self.summary, *reversed(records)) if is_number(record.get(key)))
        return next(found, None)

    def routing(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """`load` (over its layer's mean) or `bias` of every expert: time [T], values [T, MoE layers, experts].

        Values that are not finite are NaN. Records of another shape than the last are left out.
        """
        records = [record for record in self.experts if record.get(key)]
        values = [_matrix(record[key]) for record in records]
        shape = values[-1].shape if values else ()
        kept = [i for i, value in enumerate(values) if value.ndim == 2 and value.shape == shape]
        stacked = np.stack([values[i] for i in kept]) if kept else np.zeros((0, 0, 0))
        return self.time([records[i] for i in kept]), stacked


def read_run(workdir: str | Path) -> RunFiles:
    """Reads what there is of a run's files. A missing or broken file counts as an empty one."""
    workdir = Path(workdir)
    diff = workdir / "config_diff.txt"
    return RunFiles(
        workdir=workdir,
        config=_read_json(workdir / "config.json"),
        diff=diff.read_text(encoding="utf-8", errors="replace") if diff.exists() else "",
        summary=_read_json(workdir / "summary.json"),
        environment=_read_json(workdir / "environment.json"),
        origin=_read_json(workdir / "origin.json"),
        steps=metrics.read_jsonl(workdir / metrics.SCALARS),
        evaluations=metrics.read_jsonl(workdir / metrics.EVALUATION),
        experts=metrics.read_jsonl(workdir / metrics.EXPERTS, limit=ROUTING_LINES),
        samples=metrics.read_jsonl(workdir / metrics.SAMPLES),
        events=read_events(workdir),
        goodput=read_goodput(workdir),
    )


def read_data(workdir: str | Path) -> dict:
    """Return what the data.json of a work directory says; empty where there is none yet."""
    return _read_json(Path(workdir) / "data.json")


def is_number(value) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def column(records: list[dict], key: str) -> np.ndarray:
    """One field of every record as float64 [records]; NaN where it is missing or not finite."""
    return np.array([record[key] if is_number(record.get(key)) else np.nan for record in records], dtype=float)


def _matrix(rows: list) -> np.ndarray:
    try:
        return np.array(rows, dtype=float)
    except (TypeError, ValueError):
        return np.empty(0)


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
