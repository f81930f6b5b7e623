"""One run as it is now, from the files it writes: state, numbers, curves, events, goodput, phase."""

import datetime
import os
import time
from collections import deque
from pathlib import Path

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import CONFIG_FILE, load_run_config
from opendeep_jax.config.schedule import stage_at, stages, step_at_tokens, tokens_before, total_steps
from opendeep_jax.display.numbers import human_count, human_time
from opendeep_jax.jobs.watch.files import Curve, Tail, last_record, number, read_object
from opendeep_jax.record.events import EVENTS
from opendeep_jax.record.goodput import GOODPUT, Goodput, Ledger
from opendeep_jax.record.heartbeat import BEAT_SECONDS, HEARTBEAT
from opendeep_jax.record.metrics import EVALUATION, EXPERTS, SCALARS

SUMMARY, ORIGIN = "summary.json", "origin.json"
FILES = (CONFIG_FILE, "data.json", SUMMARY, SCALARS, EVALUATION, EXPERTS, EVENTS, GOODPUT, HEARTBEAT)
"""What a run writes that is looked at."""

ENDINGS = ("stopped", "preempted", "interrupted", "hang", "lost_peer")
"""Kinds of events after which a process ends."""

CURVES = (
    "loss", "grad_norm", "tokens_per_second", "mfu", "learning_rate", "expert_load_max_over_mean",
)  # fmt: skip
HELD_OUT = "held_out_bits_per_byte"
EVENTS_KEPT = 200
QUIET_SECONDS = 60.0
SILENT_BEATS = 6
"""A process that gives signs of life (`record/heartbeat.py`) and misses so many of them is gone, or its machine is."""

DOING = {"compile": "compiling", "data preparation": "preparing text", "restore": "restoring"}
"""Words for what takes a process minutes before and between steps."""


class Run:
    """A run's directory, looked at again and again: `look()` takes in what is new since the last time."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self.name = workdir.resolve().name
        self.config = None
        self.summary: dict = {}
        self.origin: dict = {}
        self.experts: list[list[float]] = []
        self.goodput: Goodput | None = None
        drawn, whole = (SCALARS, EVALUATION), (EVENTS, GOODPUT)
        self._tails = {name: Tail(workdir / name, samples=name in drawn) for name in (*drawn, *whole)}
        self._seen: dict[str, tuple] = {}
        for name in self._tails:
            self._forget(name)

    def look(self) -> None:
        """Reads what is new. Nothing that the files hold, or lack, makes it fail."""
        for name, tail in self._tails.items():
            if tail.restarted():
                self._forget(name)
            for record in tail.read():
                self._take(name, record)
        self.goodput = self._ledger.goodput()
        if self._changed(CONFIG_FILE):
            self._read_config()
        if self._changed(SUMMARY):
            self.summary = read_object(self.workdir / SUMMARY)
        if self._changed(ORIGIN):
            self.origin = read_object(self.workdir / ORIGIN)
        if self._changed(EXPERTS):
            self.experts = _matrix((last_record(self.workdir / EXPERTS) or {}).get("load"))

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
        """Whether all steps are done and the summary is written."""
        steps = number(self.summary.get("steps"))
        return steps is not None and steps >= max(self.step, self.total or 0)

    def state(self, now: float | None = None) -> tuple[str, str]:
        """(kind, words): `finished`, `stopped` (its last event says so), `running`, `quiet` or `empty`."""
        if self.is_finished:
            return "finished", "finished"
        times = {name: modified for name in FILES if (modified := _modified(self.workdir / name))}
        if not times:
            return "empty", "nothing there yet"
        age = max((time.time() if now is None else now) - max(times.values()), 0.0)
        sign = read_object(self.workdir / HEARTBEAT)
        if sign.get("ended") is True and times.get(SCALARS, 0) <= times.get(HEARTBEAT, 0) + 30:
            return "stopped", "stopped"
        if (beaten := number(sign.get("time"))) is not None and not self._ended_after(beaten):
            if age > SILENT_BEATS * BEAT_SECONDS:
                return "quiet", f"no sign for {human_time(age)}"
            return "running", DOING.get(str(sign.get("doing")), "running" if self.step else "starting")
        if self.events and self.events[-1].get("kind") in ENDINGS:
            ended = _seconds_of(self.events[-1].get("time"))
            if ended is not None and max(times.get(SCALARS, 0), times.get(EVALUATION, 0)) <= ended + 30:
                return "stopped", "stopped"
        # Evaluations, saves and compilation are longer than a step; a few windows of the log are patience enough.
        if age > max(QUIET_SECONDS, 5 * max(self._intervals, default=0.0)):
            return "quiet", f"no sign for {human_time(age)}"
        return "running", "running" if self.step else "starting"

    def _ended_after(self, seconds: float) -> bool:
        """Return whether the last event ends a process, and is later than a sign of life of that machine's clock."""
        if not self.events or self.events[-1].get("kind") not in ENDINGS:
            return False
        ended = _seconds_of(self.events[-1].get("time"))
        return ended is not None and ended >= int(seconds)  # events count in whole seconds

    def seconds_left(self, now: float | None = None) -> float | None:
        """Return what the steps left take at the present speed; None where that is not known, or nobody does them."""
        if self.config is None or not self._speeds or self.state(now)[0] != "running":
            return None
        speed = sorted(self._speeds)[len(self._speeds) // 2]
        left = tokens_before(self.config, self.total) - tokens_before(self.config, self.step)
        return left / speed if left > 0 and speed > 0 else None

    def phase(self) -> tuple[str, str]:
        """What the last logged step was made of, and where the learning rate's schedule is; ("", "") if not known."""
        if self.config is None:
            return "", ""
        at = min(max(self.step - 1, 0), self.total - 1)
        try:
            return data_phase(self.config, at), rate_phase(self.config, at)
        except (ArithmeticError, AssertionError, StopIteration):  # a configuration that no check has seen
            return "", ""

    # How it gets known

    def _forget(self, name: str) -> None:
        if name == SCALARS:
            self.last: dict = {}
            self.curves = {key: Curve() for key in CURVES}
            self._speeds, self._intervals = deque(maxlen=15), deque(maxlen=15)
        elif name == EVALUATION:
            self.held_out, self.held_out_now = Curve(), None
        elif name == EVENTS:
            self.events, self.event_count = deque(maxlen=EVENTS_KEPT), 0
        else:
            self._ledger = Ledger()

    def _take(self, name: str, record: dict) -> None:
        if name == SCALARS:
            step = number(record.get("step"))
            if step is None:
                return
            x = number(record.get("tokens"))
            for key, curve in self.curves.items():
                curve.add(step if x is None else x, number(record.get(key)))
            if (speed := number(record.get("tokens_per_second"))) is not None:
                self._speeds.append(speed)
            if (each := number(record.get("step_seconds"))) is not None:
                self._intervals.append(each * max(step - self.step, 1))
            self.last.update({key: value for key, value in record.items() if number(value) is not None})
            self.last["loss"] = number(record.get("loss"))  # one that is not finite must be seen
        elif name == EVALUATION:
            x, bits = number(record.get("tokens", record.get("step"))), number(record.get(HELD_OUT))
            self.held_out.add(x, bits)
            self.held_out_now = bits
        elif name == EVENTS:
            self.events.append(record)
            self.event_count += 1
        else:
            self._ledger.add(record)

    def _changed(self, name: str) -> bool:
        try:
            found = os.stat(self.workdir / name)
            mark = (found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError:
            mark = ()
        changed = self._seen.get(name, ()) != mark
        self._seen[name] = mark
        return changed

    def _read_config(self) -> None:
        try:
            self.config = load_run_config(self.workdir)
            total_steps(self.config)
        except (ConfigError, ArithmeticError, AssertionError, TypeError, ValueError):
            self.config = None
        name = self.config.name if self.config else read_object(self.workdir / CONFIG_FILE).get("name")
        self.name = str(name or self.workdir.resolve().name)


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _seconds_of(time) -> float | None:
    try:
        return datetime.datetime.fromisoformat(time).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _matrix(rows) -> list[list[float]]:
    """Loads as [layers][experts]; what is no number counts as 0, and what is no matrix gives []."""
    if not isinstance(rows, list) or not all(isinstance(row, list) and row for row in rows):
        return []
    return [[float(number(value) or 0.0) for value in row] for row in rows]


def data_phase(config, step: int) -> str:
    """What the batch of `step` (from 0) is made of: `longer texts (2 of 2), batch ramp 1 of 3, 16 × 4,096 tokens`."""
    stage, phases = stage_at(config, step), config.data.phases
    parts = [f"{phases[stage.phase].name} ({stage.phase + 1} of {len(phases)})"] if len(phases) > 1 else []
    ramp = len(config.train.batch_ramp)
    if ramp and (place := stages(config).index(stage)) < ramp:
        parts.append(f"batch ramp {place + 1} of {ramp}")
    return ", ".join([*parts, f"{stage.batch_size:,} × {stage.length:,} tokens"])


def rate_phase(config, step: int) -> str:
    """Where the learning rate of `step` (from 0) is: `warm-up, step 12 of 100`, `cosine`, `decay`, `phase 2 of 5`."""
    optimizer, steps = config.optimizer, total_steps(config)
    if step < optimizer.warmup_steps:
        return f"warm-up, step {step + 1:,} of {optimizer.warmup_steps:,}"
    if optimizer.schedule == "wsd":
        return "decay" if step >= steps - max(round(steps * optimizer.decay_fraction), 1) else "stable"
    if optimizer.schedule != "phases":
        return optimizer.schedule
    tokens = tokens_before(config, optimizer.warmup_steps)
    for place, phase in enumerate(optimizer.phases, 1):
        tokens += phase.tokens
        if place == len(optimizer.phases) or step < round(step_at_tokens(config, tokens)):
            return f"{phase.shape} (phase {place} of {len(optimizer.phases)})"
    return ""


def tokens_text(run: Run) -> str:
    """Tokens trained so far, as a person reads them; empty where they are not logged."""
    tokens = number(run.last.get("tokens"))
    return f"{human_count(tokens)} tokens" if tokens is not None else ""
