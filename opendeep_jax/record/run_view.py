"""A run as it is now, from the files in its directory: state, curves, events, goodput, phase. No NumPy.

`refresh()` reads what is new since the last call, and keeps state of bounded size: so one view serves a report that is
written once, a page that is written again every few seconds, and a terminal.
"""

import datetime
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import CONFIG_FILE, DIFF_FILE, load_run_config
from opendeep_jax.config.schedule import rate_piece_at, stage_at, stages, tokens_before, total_steps
from opendeep_jax.display.numbers import human_count, human_time
from opendeep_jax.record.events import with_new_kind
from opendeep_jax.record.files import (
    DATA,
    ENVIRONMENT,
    EVALUATION,
    EVENTS,
    EXPERTS,
    GOODPUT,
    HEARTBEAT,
    METRICS,
    ORIGIN,
    SAMPLES,
    SUMMARY,
    Tail,
    last_record,
    number,
    read_object,
)
from opendeep_jax.record.goodput import Account, Goodput
from opendeep_jax.record.heartbeat import BEAT_SECONDS

FILES = (CONFIG_FILE, DATA, SUMMARY, METRICS, EVALUATION, EXPERTS, EVENTS, GOODPUT, HEARTBEAT)
"""Files of a run whose age tells whether it is alive."""
ENDINGS = ("stopped", "preempted", "interrupted", "hang", "lost_peer")
"""Kinds of events after which a process ends."""
HELD_OUT = "held_out_bits_per_byte"
POINTS = 300
EVENTS_KEPT, TEXTS_KEPT = 200, 400
SAMPLED, EXPERTS_SAMPLED = 6000, 300
"""Lines that are read of a long history; with 58 layers of 256 experts, one of experts.jsonl takes some 200 kB."""
QUIET_SECONDS = 60.0
SILENT_BEATS = 6
"""A process that gives signs of life (`record/heartbeat.py`) and misses so many of them is gone, or its machine is."""
DOING = {"compile": "compiling", "data preparation": "preparing text", "restore": "restoring"}
"""Words for what takes a process minutes before and between steps."""


class Curve:
    """A series of any length in at most 2 * POINTS stretches, each with its first x and its least, mean and largest y.

    Stretches are merged by twos when they become too many, so no spike is lost and all have the same number of values.
    """

    def __init__(self):
        self._stretches: list[list[float]] = []  # [x, least, sum, largest, count]
        self._length = 1

    def add(self, x: float | None, y: float | None) -> None:
        """Add a value; skipped unless both are numbers."""
        if x is None or y is None:
            return
        if self._stretches and self._stretches[-1][4] < self._length:
            _merge(self._stretches[-1], [x, y, y, y, 1])
            return
        if len(self._stretches) >= 2 * POINTS:
            self._stretches = _halved(self._stretches)
            self._length *= 2
        self._stretches.append([x, y, y, y, 1])

    def __len__(self) -> int:
        return len(self._stretches)

    def points(self, count: int = POINTS) -> list[tuple[float, float, float, float]]:
        """Return (x, least, mean, largest) of at most `count` stretches, in order."""
        found = [list(stretch) for stretch in self._stretches]
        while len(found) > max(count, 1):
            found = _halved(found)
        return [(x, low, total / n, high) for x, low, total, high, n in found]

    def means(self, count: int = POINTS) -> list[float]:
        """Return the means of at most `count` stretches, in order."""
        return [mean for _, _, mean, _ in self.points(count)]


def _halved(stretches: list[list[float]]) -> list[list[float]]:
    for first, second in zip(stretches[::2], stretches[1::2], strict=False):
        _merge(first, second)
    return stretches[::2]


def _merge(into: list[float], other: list[float]) -> None:
    into[1], into[2] = min(into[1], other[1]), into[2] + other[2]
    into[3], into[4] = max(into[3], other[3]), into[4] + other[4]


class RunView:
    """View of a run from its files; `refresh()` reads what was appended since the last call.

    Args:
        workdir: the run directory. Files that are missing or broken count as empty.
        details: keep what only the report of a single run shows: samples, environment, the history of experts.
        whole: read all of a long history, not a part of its lines.
    """

    def __init__(self, workdir: str | Path, details: bool = False, whole: bool = False):
        self.workdir, self.details = Path(workdir), details
        self.name = self.workdir.resolve().name
        self.config = None
        """RunConfig; None where it cannot be read."""
        self.settings: dict = {}
        """The configuration as config.json has it."""
        self.diff = ""
        self.summary: dict = {}
        self.origin: dict = {}
        self.environment: dict = {}
        self.load: list[list[float]] = []
        """Load of each expert over its layer's mean, as last logged: [MoE layers][experts]."""
        self.goodput: Goodput | None = None
        files = [METRICS, EVALUATION, EVENTS, GOODPUT, *([EXPERTS, SAMPLES] if details else [])]
        drawn = {} if whole else {METRICS: SAMPLED, EVALUATION: SAMPLED, EXPERTS: EXPERTS_SAMPLED}
        self._tails = {name: Tail(self.workdir / name, drawn.get(name, 0)) for name in files}
        self._seen: dict[str, tuple] = {}
        for name in self._tails:
            self._reset(name)

    def refresh(self) -> "RunView":
        """Read what is new, and return the view. Nothing that the files hold, or lack, makes it fail."""
        for name, tail in self._tails.items():
            if tail.restarted():
                self._reset(name)
            for record in tail.read():
                self._add(name, record)
        self.goodput = self._account.goodput()
        if self._changed(CONFIG_FILE):
            self._read_config()
        for name, field in ((SUMMARY, "summary"), (ORIGIN, "origin"), (ENVIRONMENT, "environment")):
            if (self.details or name != ENVIRONMENT) and self._changed(name):
                setattr(self, field, read_object(self.workdir / name))
        if self.details:
            self.load = _matrix(self.experts[-1].get("load")) if self.experts else []
        elif self._changed(EXPERTS):
            self.load = _matrix((last_record(self.workdir / EXPERTS) or {}).get("load"))
        return self

    # What is known

    @property
    def step(self) -> int:
        """The last logged step."""
        return int(self.last.get("step", 0))

    @property
    def total(self) -> int | None:
        """Steps of the whole run; None where its configuration cannot be read."""
        return total_steps(self.config) if self.config else None

    @property
    def is_finished(self) -> bool:
        """True when all steps are done and the summary is written."""
        steps = number(self.summary.get("steps"))
        return steps is not None and steps >= max(self.step, self.total or 0)

    def number(self, name: str) -> float | None:
        """Return a field of summary.json, else of the last line that has it as a finite number."""
        values = (self.summary.get(name), self.last.get(name), self.evaluated.get(name))
        return next((value for value in map(number, values) if value is not None), None)

    def x_of(self, steps: Sequence[float]) -> list[float]:
        """Return steps as the curves count them: in tokens, where tokens are logged."""
        known = self._tokens.points(2 * POINTS)
        if not known:
            return list(steps)
        xs, ys = [x for x, *_ in known], [least for _, least, *_ in known]
        return [_interpolated(step, xs, ys) for step in steps]

    def state(self, now: float | None = None) -> tuple[str, str]:
        """Return (kind, words): `finished`, `stopped` (its last event says so), `running`, `quiet` or `empty`."""
        if self.is_finished:
            return "finished", "finished"
        times = {name: modified for name in FILES if (modified := _modified(self.workdir / name))}
        if not times:
            return "empty", "nothing there yet"
        age = max((time.time() if now is None else now) - max(times.values()), 0.0)
        sign = read_object(self.workdir / HEARTBEAT)
        if sign.get("ended") is True and times.get(METRICS, 0) <= times.get(HEARTBEAT, 0) + 30:
            return "stopped", "stopped"
        ended = self._ended()
        # Events count in whole seconds.
        if (beaten := number(sign.get("time"))) is not None and not (ended is not None and ended >= int(beaten)):
            if age > SILENT_BEATS * BEAT_SECONDS:
                return "quiet", f"no sign for {human_time(age)}"
            return "running", DOING.get(str(sign.get("doing")), "running" if self.step else "starting")
        if ended is not None and max(times.get(METRICS, 0), times.get(EVALUATION, 0)) <= ended + 30:
            return "stopped", "stopped"
        # Evaluations, saves and compilation are longer than a step; a few windows of the log are patience enough.
        if age > max(QUIET_SECONDS, 5 * max(self._intervals, default=0.0)):
            return "quiet", f"no sign for {human_time(age)}"
        return "running", "running" if self.step else "starting"

    def _ended(self) -> float | None:
        """Return when the last event happened, in seconds since 1970, where it ends a process."""
        if not self.events or self.events[-1].get("kind") not in ENDINGS:
            return None
        try:
            return datetime.datetime.fromisoformat(self.events[-1].get("time")).timestamp()
        except (TypeError, ValueError, OverflowError):
            return None

    def seconds_left(self, now: float | None = None) -> float | None:
        """Return what the steps left take at the present speed; None where it is unknown or the run has stopped."""
        if self.config is None or not self._speeds or self.state(now)[0] != "running":
            return None
        speed = sorted(self._speeds)[len(self._speeds) // 2]
        left = tokens_before(self.config, total_steps(self.config)) - tokens_before(self.config, self.step)
        return left / speed if left > 0 and speed > 0 else None

    def phase(self) -> tuple[str, str]:
        """Return what the last logged step was made of, and the place in the learning rate's schedule, in words.

        ("", "") where that is not known.
        """
        if self.config is None:
            return "", ""
        at = min(max(self.step - 1, 0), total_steps(self.config) - 1)
        try:
            return data_phase(self.config, at), rate_phase(self.config, at)
        except (ArithmeticError, AssertionError, StopIteration):  # a configuration that no check has seen
            return "", ""

    def tokens_text(self) -> str:
        """Return the tokens trained so far; empty where they are not logged."""
        tokens = number(self.last.get("tokens"))
        return f"{human_count(tokens)} tokens" if tokens is not None else ""

    # How it gets known

    def _reset(self, name: str) -> None:
        """Discard what was read of a file."""
        if name == METRICS:
            self.curves: dict[str, Curve] = defaultdict(Curve)
            """A curve for each number of metrics.jsonl, over tokens, or steps where tokens are not logged."""
            self.last: dict = {}
            """Each number as last logged; the loss is None where it is not finite."""
            self.not_finite: list[dict] = []
            """Lines with numbers that are not finite."""
            self._tokens = Curve()
            self._speeds, self._intervals = deque(maxlen=20), deque(maxlen=20)
        elif name == EVALUATION:
            self.held_out, self.held_out_now, self.evaluated = Curve(), None, {}
        elif name == EVENTS:
            self.events, self.event_count = deque(maxlen=EVENTS_KEPT), 0
        elif name == EXPERTS:
            self.experts: list[dict] = []
            """Lines of experts.jsonl, evenly spread when there are many, and the last."""
            self._stride, self._experts_seen = 1, 0
        elif name == SAMPLES:
            self.samples = deque(maxlen=TEXTS_KEPT)
        else:
            self._account = Account()

    def _add(self, name: str, record: dict) -> None:
        match name:
            case "metrics.jsonl":
                self._add_step(record)
            case "evaluation.jsonl":
                x = number(record.get("tokens", record.get("step")))
                self.held_out_now = number(record.get(HELD_OUT))
                self.held_out.add(x, self.held_out_now)
                self.evaluated |= {key: value for key, value in record.items() if number(value) is not None}
                self.not_finite += [record] * bool(record.get("non_finite"))
            case "events.jsonl":
                self.events.append(with_new_kind(record))
                self.event_count += 1
            case "experts.jsonl":
                if self.experts and (self._experts_seen - 1) % self._stride:
                    self.experts.pop()  # a line between two of the stride is kept only while it is the last
                self.experts.append(record)
                self._experts_seen += 1
                if len(self.experts) > 2 * EXPERTS_SAMPLED:
                    self.experts, self._stride = self.experts[::2], 2 * self._stride
            case "samples.jsonl":
                self.samples.append(record)
            case _:
                self._account.add(record)

    def _add_step(self, record: dict) -> None:
        step = number(record.get("step"))
        if step is None:
            return
        tokens = number(record.get("tokens"))
        self._tokens.add(step, tokens)
        numbers = {key: value for key, value in record.items() if number(value) is not None}
        for key, value in numbers.items():
            self.curves[key].add(step if tokens is None else tokens, value)
        if "tokens_per_second" in numbers:
            self._speeds.append(numbers["tokens_per_second"])
        if "step_seconds" in numbers:
            self._intervals.append(numbers["step_seconds"] * max(step - self.step, 1))
        self.last.update(numbers)
        self.last["loss"] = number(record.get("loss"))  # one that is not finite must be seen
        self.not_finite += [record] * bool(record.get("non_finite"))

    def _changed(self, name: str) -> bool:
        try:
            found = (self.workdir / name).stat()
            mark = (found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError:
            mark = ()
        changed = self._seen.get(name, ()) != mark
        self._seen[name] = mark
        return changed

    def _read_config(self) -> None:
        self.settings = read_object(self.workdir / CONFIG_FILE)
        try:
            self.diff = (self.workdir / DIFF_FILE).read_text(encoding="utf-8", errors="replace")
        except OSError:
            self.diff = ""
        try:
            self.config = load_run_config(self.workdir)
            total_steps(self.config)
        except (ConfigError, ArithmeticError, AssertionError, TypeError, ValueError):
            self.config = None
        name = self.config.name if self.config else self.settings.get("name")
        self.name = str(name or self.workdir.resolve().name)


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _interpolated(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    after = next((i for i, other in enumerate(xs) if other >= x), len(xs) - 1)
    if xs[after] <= x or not after:
        return ys[after]
    share = (x - xs[after - 1]) / (xs[after] - xs[after - 1])
    return ys[after - 1] + share * (ys[after] - ys[after - 1])


def _matrix(rows) -> list[list[float]]:
    """Return loads as [layers][experts]; what is no number counts as 0, and what is no matrix gives []."""
    if not isinstance(rows, list) or not all(isinstance(row, list) and row for row in rows):
        return []
    return [[float(number(value) or 0.0) for value in row] for row in rows]


def stage_shares(view: RunView) -> Iterator[tuple[str, float, bool]]:
    """Yield the stages of data phases and batch ramp: their steps in words, their share of the run, and whether it is
    the present one."""
    total, at = view.total or 0, max(view.step - 1, 0)
    for stage in stages(view.config) if total else ():
        first, end = stage.first_step, min(stage.first_step + stage.steps, total)
        if end > first:
            yield f"steps {first + 1:,.0f} to {end:,.0f}", (end - first) / total, first <= at < end


def data_phase(config, step: int) -> str:
    """Return what the batch of `step` (from 0) is made of: `longer texts (2 of 2), batch ramp 1 of 3, 16 × 4,096
    tokens`."""
    stage, phases = stage_at(config, step), config.data.phases
    parts = [f"{phases[stage.phase].name} ({stage.phase + 1} of {len(phases)})"] if len(phases) > 1 else []
    ramp = len(config.train.batch_ramp)
    if ramp and (place := stages(config).index(stage)) < ramp:
        parts.append(f"batch ramp {place + 1} of {ramp}")
    return ", ".join([*parts, f"{stage.batch_size:,} × {stage.length:,} tokens"])


def rate_phase(config, step: int) -> str:
    """Return the place of `step` (from 0) in the learning rate's schedule: `warm-up, step 12 of 100`, `cosine`."""
    if step < config.optimizer.warmup_steps:
        return f"warm-up, step {step + 1:,} of {config.optimizer.warmup_steps:,}"
    return rate_piece_at(config, step).name
