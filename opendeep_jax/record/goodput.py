"""Accounting of a run's time: goodput.jsonl, which only grows, and its totals.

    {"start": "5f0c…", "time": "2026-11-22T12:00:00+00:00", "wall": 1795262400.0, "step": 120, "first_step": 100,
     "skipped": 0, "seconds": {"start": 3.1, "compile": 20.0, "step": 61.2, …}}

`seconds` and `skipped` count from the start of the process that wrote the line, which went on from `first_step`.
Durations are of a clock that nothing sets; only the gaps between two starts are of the wall clock.
"""

import contextlib
import statistics
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opendeep_jax.display.numbers import human_time
from opendeep_jax.record.files import GOODPUT, read_jsonl
from opendeep_jax.record.record import Record, now
from opendeep_jax.record.time_kinds import KINDS, measured


class GoodputClock:
    """Account of every second of this process, each of one kind (`time_kinds`). Not for use by several threads.

        clock = GoodputClock(record, begun, first_step=100)
        with clock.counting("compile"):
            …
        clock.default = "step"  # from here on, what isn't counted as something else
        for step in …:
            with clock.counting("data"):
                batch = next(batches)
            …
            clock.log(step)
        clock.write(step)

    Args:
        record: writes goodput.jsonl, where this process writes.
        begun: when the process was started, on the clock of `time.perf_counter`.
        first_step: the step that training goes on from; set `clock.first_step` where it is known only later.
    """

    def __init__(self, record: Record, begun: float, first_step: int = 0):
        self.record, self.first_step = record, first_step
        self.start = uuid.uuid4().hex[:12]
        self.seconds = dict.fromkeys(measured(), 0.0)
        self.skipped_updates = 0
        self._default, self._kinds, self._mark = "start", [], begun
        self._written = 0.0

    @property
    def default(self) -> str:
        """Kind of all time outside of `counting`: `start` at first."""
        return self._default

    @default.setter
    def default(self, kind: str) -> None:
        self._charge()
        self._default = _known(kind)

    @contextlib.contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        """Give the time in the block to `kind`. A block inside it takes its own time out. ValueError: no such kind."""
        _known(kind)
        self._charge()
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._charge()
            self._kinds.pop()

    def total(self, *kinds: str) -> float:
        """Return the seconds so far of these kinds, or of all."""
        self._charge()
        return sum(self.seconds[kind] for kind in kinds or self.seconds)

    def skipped(self, updates: int = 1) -> None:
        """Note updates that were skipped since the last line: their steps' time is waste."""
        self.skipped_updates += updates

    def rollback(self, from_step: int, to_step: int) -> None:
        """Note a rollback after `from_step`: the run resumes from `to_step`, and the work between is waste."""
        self.write(from_step)
        self.first_step = to_step
        self.write(to_step)

    def log(self, step: int) -> None:
        """Write as `write` does, where the last line is a thousandth of this process's time ago, or a minute."""
        total = self.total()
        if total - self._written >= min(total / 1000, 60.0):
            self.write(step)

    def write(self, step: int) -> None:
        """Append a line: `step` steps are done. Raises OSError where it cannot."""
        self._written = self.total()
        line = {"start": self.start, "time": now(), "wall": time.time(), "step": int(step)}
        line |= {"first_step": int(self.first_step), "skipped": self.skipped_updates}
        seconds = {kind: round(seconds, 4) for kind, seconds in self.seconds.items()}
        self.record.append(GOODPUT, line | {"seconds": seconds})

    def _charge(self) -> None:
        now = time.perf_counter()
        self.seconds[self._kinds[-1] if self._kinds else self._default] += max(now - self._mark, 0.0)
        self._mark = now


def _known(kind: str) -> str:
    if kind not in measured():
        raise ValueError(f"{kind}: time is counted as one of {', '.join(measured())}")
    return kind


@dataclass(frozen=True)
class Goodput:
    """All of a run's time since it was begun, its starts and the gaps between them."""

    seconds: dict[str, float]
    """Seconds of each of KINDS; they add up to `total`."""
    starts: int

    @property
    def total(self) -> float:
        """Seconds from the run's beginning to its last line."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of all time that went into steps whose updates the run still has; from 0 to 1."""
        return self.seconds["step"] / self.total if self.total > 0 else 0.0

    def shares(self) -> list[tuple[str, float, float]]:
        """(kind, seconds, share of the total) of the kinds that took any time, in the order of KINDS."""
        total = self.total
        return [(kind, self.seconds[kind], self.seconds[kind] / total) for kind in KINDS if self.seconds[kind] > 0]

    def __str__(self) -> str:
        """One line to print: `goodput 81.4% of 2 h 05 min: compile 6.0%, checkpoint 0.8%, …`."""
        rest = sorted((row for row in self.shares() if row[0] != "step"), key=lambda row: -row[1])
        losses = ", ".join(f"{kind} {share:.1%}" for kind, _, share in rest if share >= 0.0005)
        return f"goodput {self.goodput:.1%} of {human_time(self.total)}" + (f": {losses}" if losses else "")


def read_goodput(workdir: str | Path) -> Goodput | None:
    """Return what the lines of a run's goodput.jsonl add up to; None where there are none."""
    return account(read_jsonl(Path(workdir) / GOODPUT))


def account(records: Iterable[dict]) -> Goodput | None:
    """Return what the records of a goodput.jsonl add up to; None where none is sound."""
    total = Account()
    for record in records:
        total.add(record)
    return total.goodput()


class Account:
    """Sum of a run's time, line by line, so that who watches a run reads each line once."""

    def __init__(self):
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._last: dict | None = None
        self._starts: dict[str, dict] = {}
        # Stretches of steps that still count: [from, to, step seconds, data seconds].
        self._kept: list[list[float]] = []

    def add(self, record: dict) -> None:
        """Add one line. One that is broken is skipped."""
        if not _is_valid(record):
            return
        seconds, before = record["seconds"], self._starts.get(record["start"])
        if before is None:
            self._roll_back(record["first_step"])
            if self._last is not None:  # a wall clock that was set back gives a gap of nothing
                gap = record["wall"] - sum(seconds.values()) - self._last["wall"]
                self._seconds["restart"] += max(gap, 0.0)
            before = dict[str, Any](step=record["first_step"], seconds={}, skipped=0)
        spent = {kind: max(seconds.get(kind, 0.0) - before["seconds"].get(kind, 0.0), 0.0) for kind in measured()}
        for kind, value in spent.items():
            self._seconds[kind] += value
        self._starts[record["start"]] = self._last = record
        first, last = before["step"], record["step"]
        if last < first:
            self._waste(spent["step"], spent["data"])
            self._roll_back(last)
            return
        skipped = record.get("skipped", 0) - before.get("skipped", 0)
        share = min(max(skipped / (last - first), 0.0), 1.0) if last > first else 0.0
        self._waste(share * spent["step"], share * spent["data"])
        self._kept.append([first, last, (1 - share) * spent["step"], (1 - share) * spent["data"]])

    def goodput(self) -> Goodput | None:
        """Return the sums so far; None before the first sound line."""
        return Goodput(dict(self._seconds), len(self._starts)) if self._starts else None

    def _roll_back(self, step: int) -> None:
        """Count the work after `step` as waste: the run was rolled back there."""
        while self._kept and self._kept[-1][1] > step:
            first, last, computing, waiting = self._kept.pop()
            lost = (last - step) / (last - first) if first < step else 1.0
            self._waste(lost * computing, lost * waiting)
            if lost < 1:
                self._kept.append([first, step, (1 - lost) * computing, (1 - lost) * waiting])

    def _waste(self, computing: float, waiting: float) -> None:
        for kind, seconds in (("step", computing), ("data", waiting)):
            seconds = min(seconds, self._seconds[kind])  # no sum falls below nothing by rounding
            self._seconds[kind] -= seconds
            self._seconds["waste"] += seconds


def _is_valid(record: dict) -> bool:
    seconds = record.get("seconds")
    numbers = [record.get("wall"), record.get("step"), record.get("first_step"), record.get("skipped", 0)]
    if not isinstance(seconds, dict) or not isinstance(record.get("start"), str):
        return False
    numbers += seconds.values()
    return all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e15 for n in numbers)


STARVED_SHARE, SLOW_FACTOR = 0.2, 1.5
FEWEST_WINDOWS, WINDOWS = 5, 64


class InputWatch:
    """Detector of steps that wait for input, one logging window at a time.

    A device computes while the loop waits for a batch, so waiting alone is no harm. What the device still has to do is
    seen at the log, where the loop waits for it: for one step at least, the one just begun. So a device was busy for no
    more than that wait, times the steps of the window; the rest of the time it had nothing to do.
    """

    def __init__(self):
        self._state = self._seen = "good"
        self._speeds: deque[float] = deque(maxlen=WINDOWS)

    def reset(self) -> None:
        """Forget the measured speed, because the size of steps changes."""
        self._speeds.clear()

    def window(self, steps: int, seconds: float, data_seconds: float, device_seconds: float) -> tuple[str, str] | None:
        """Check a logging window; return (kind, text) for `record_event` where the state has changed, else None.

        Two windows in a row have to agree. Kinds: `starved`, `slow`, `recovered_speed`.

        Args:
            steps: in the window.
            seconds: it took, without compilation, evaluations, samples and saves.
            data_seconds: of those, how long the loop waited for batches.
            device_seconds: of those, how long it waited at the log for the window's last step to be done.
        """
        if steps <= 0 or seconds <= 0:
            return None
        each = seconds / steps
        usual = statistics.median(self._speeds) if len(self._speeds) >= FEWEST_WINDOWS else None
        state = "good"
        idle_seconds = seconds - steps * device_seconds  # at least
        if min(data_seconds, idle_seconds) > STARVED_SHARE * seconds:
            state = "starved"
        elif usual is not None and each > SLOW_FACTOR * usual:
            state = "slow"
        if state == "good":
            self._speeds.append(each)  # a slow stretch must not become the measure
        changed = state == self._seen != self._state
        self._seen = state
        if not changed:
            return None
        self._state = state
        waited = f"{data_seconds / seconds:.0%} of the time"
        if state == "starved":
            return state, (
                f"The devices wait for data: the loop waited for batches {waited} over the last {steps:,} steps and "
                "found the devices idle. Look at data.workers, and at the disk that data.directory is on."
            )
        if state == "slow" and usual is not None:
            return state, (
                f"Steps take {human_time(each)}, {each / usual:.1f} times the {human_time(usual)} they took, and not "
                f"for want of data (waited for {waited}): a device or a link is slow, or something shares them."
            )
        return "recovered_speed", f"Steps take {human_time(each)} again, with {waited} spent waiting for data."
