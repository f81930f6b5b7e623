"""Random scenarios, and the plain model of what a run should do in them: see `scenarios.py`. Knows no JAX."""

import collections
import dataclasses
import math
import random
import statistics

import numpy as np

from opendeep_jax.config import schema
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.faults.health import FEWEST, LOSS_SPREAD, NORM_SPREAD, PATIENCE, RECENT, WINDOW

STEPS, BORDER, ROWS, LENGTH = 56, 30, 2, 16
"""The border is after step 30."""
BRANCHED_AT = 10
RATE, WARMUP, LEAST = 1e-2, 4, 0.1
ZSCORE = 12.0
NAN, LONG = 1, 2
"""What befalls a batch: a gradient of NaN, or one a hundred times as long; from 3 on, a loss higher by two less."""


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A run and what befalls it."""

    seed: int
    origin: str
    policy: str
    rollback_after: int
    log_every: int
    checkpoint: schema.CheckpointConfig
    codes: dict[int, int]
    """What befalls the batch of each step (from 1), but for those with nothing."""
    starts: tuple[tuple[int, str, dict], ...]
    """(the step before which the process is killed, what is done to the files then, settings of the next start)."""


def draw(seed: int) -> Scenario:
    """Return the scenario of a seed."""
    r = random.Random(seed)
    codes = {}
    if r.random() < 0.4:
        codes |= dict.fromkeys(range(BORDER + 1, STEPS + 1), r.randint(3, 8))
    if r.random() < 0.4:
        level = r.randint(20, STEPS - 10)
        codes |= dict.fromkeys(range(level, r.randint(level + 2, STEPS) + 1), r.randint(10, 14))
    for _ in range(r.randint(0, 3)):
        codes[r.randint(1, STEPS)] = r.choice([LONG, 30, 100, 400])
    for _ in range(r.randint(0, 3)):
        first = r.randint(1, STEPS - 1)
        codes |= dict.fromkeys(range(first, min(first + r.choice([0, 1, 7, 10, 13]), STEPS) + 1), NAN)
    local = r.random() < 0.3
    kept = {"keep": r.choice([0, 1, 1, 2, 3]), "keep_every": r.choice([0, 0, 12])}
    config = schema.CheckpointConfig(every=r.choice([2, 4, 7, 20]), local_every=3 * local, **kept)
    starts = []
    for kill in sorted(r.sample(range(1, STEPS + 1), r.randint(0, 4))):
        more = {"keep": r.choice([0, 1, 2])} if r.random() < 0.3 else {}
        harm = r.choice(["", "", "newest damaged", "all damaged", "all deleted", "local lost", "one deleted"])
        starts.append((kill, harm, more))
    return Scenario(
        seed,
        r.choice(["random", "random", "import", "branch"]),
        r.choice(["record", "skip", "rollback", "ignore"]),
        r.choice([0, 2, 4, 8]),
        r.choice([1, 1, 2, 3, 5]),
        config,
        codes,
        tuple(starts),
    )


def loss_of(step: int, code: int) -> float:
    """The loss of a step (from 1)."""
    return float(np.float32(2 + 0.01 * (7 * step % 5)) + np.float32(max(code - 2, 0)))


# The model


@dataclasses.dataclass(frozen=True)
class State:
    """What a checkpoint has: the updates that made the weights, and what steps are compared with."""

    step: int
    applied: tuple[int, ...] = ()
    window: tuple[tuple[float, float, bool], ...] = ()
    """(loss, norm, high) of each of the last steps."""
    last_update: int = 0
    stretch: int = 0


class Rollback(Exception):
    """The model's run goes back."""


class Model:
    """What a run should do, in plain Python."""

    def __init__(self, scenario: Scenario):
        self.s, self.config, self.happened = scenario, scenario.checkpoint, collections.Counter()
        self.origin = BRANCHED_AT if scenario.origin == "branch" else 0
        began = State(self.origin, last_update=self.origin)
        self.durable = {} if scenario.origin == "random" else {self.origin: began}
        self.local: dict[int, State] = {}
        self.damaged: set[int] = set()
        self.ever_saved = scenario.origin != "random"
        self.windows: list[dict] = []
        self.lines: dict[int, bool] = {}

    def passed(self, step: int) -> bool:
        return any(w["first"] <= step <= w["last"] for w in self.windows)

    def judge(self, state: State, loss: float, norm: float) -> tuple[bool, bool, State]:
        """(applied, spike, the state after it) of the step after `state`."""
        stretch = int(state.step >= BORDER)
        window = state.window if stretch == state.stretch else ()
        finite, spike, high = math.isfinite(norm), False, False
        for place, value, spread in ((0, loss, LOSS_SPREAD), (1, norm, NORM_SPREAD)):
            values = [entry[place] for entry in window]
            if len(values) < FEWEST or not finite:
                continue
            median = statistics.median(values)
            mad = 1.4826 * statistics.median(abs(other - median) for other in values)
            if (value - median) / max(mad, spread[0] * abs(median), spread[1]) > ZSCORE:
                high = True
                alike = sum(e[2] and e[place] - median >= (value - median) / 2 for e in window)
                spike |= alike < PATIENCE and sum(e[2] for e in window[-RECENT:]) < PATIENCE
        if finite:
            window = (*window, (loss, norm, high))[-WINDOW:]
        applied = finite and not (spike and self.s.policy == "skip")
        step, last = state.step + 1, state.last_update
        updates = (*state.applied, step) if applied else state.applied
        return applied, spike, State(step, updates, window, step if applied else last, stretch)

    def leave_out(self, state: State) -> State:
        step = state.step + 1
        known = {at: (loss, norm) for w in self.windows for at, loss, norm in w["taken_in"]}
        _, _, after = self.judge(state, *known.get(step, (math.nan, math.nan)))
        return dataclasses.replace(after, applied=state.applied, last_update=state.last_update)

    def restore(self, before: int | None = None) -> State | None:
        """The newest sound state; None begins from the seed. Raises ConfigError where that must not be."""
        tiers = [(step, 0, self.durable) for step in self.durable] + [(step, 1, self.local) for step in self.local]
        for step, _, tier in sorted(tiers, key=lambda one: one[:2], reverse=True):
            if before is not None and tier[step].last_update >= before:
                continue
            if tier is self.durable and step in self.damaged:
                del self.durable[step]
                self.damaged.discard(step)
                self.happened["checkpoints quarantined"] += 1
                continue
            self.local = {at: state for at, state in self.local.items() if at <= step}
            return tier[step]
        if self.ever_saved:
            raise ConfigError("none")
        return None

    def prune(self) -> None:
        config, steps = self.config, sorted(self.durable)
        for step in steps:
            newest = not config.keep or step in steps[-config.keep :]
            every = config.keep_every and step % config.keep_every == 0
            if not newest and not every and step != self.origin:
                del self.durable[step]

    def start(self, kill: int | None) -> str:
        """How a start ends that is killed before the step `kill`."""
        try:
            state = self.restore() or State(0)
            self.begin(state)
            while True:
                try:
                    return self.train(state, kill)
                except Rollback as fault:
                    first, last, taken_in = fault.args
                    state = self.restore(first) or State(0)
                    self.durable = {step: s for step, s in self.durable.items() if step <= state.step}
                    self.happened["rollbacks"] += 1
                    if sum(w["last_update"] == state.last_update for w in self.windows) >= 3:
                        return "stopped"
                    window = {"first": first, "last": last, "to_step": state.step, "last_update": state.last_update}
                    self.windows.append(window | {"taken_in": [e for e in taken_in if first <= e[0] <= last]})
                    self.begin(state)
        except ConfigError:
            return "refused"

    def begin(self, state: State) -> None:
        self.lines = {step: was for step, was in self.lines.items() if 0 < step <= state.step}

    def train(self, state: State, kill: int | None) -> str:
        s, start = self.s, state.step
        skipped = [at for at in range(state.last_update + 1, start + 1) if not self.passed(at)]
        judged, finite = [], []
        for step in range(start + 1, STEPS + 1):
            if step == kill:
                return "killed"
            ran = not self.passed(step)
            if ran:
                code = s.codes.get(step, 0)
                norm = {NAN: math.nan, LONG: 100.0}.get(code, 1.0)
                applied, spike, state = self.judge(state, loss_of(step, code), norm)
                judged.append((step, applied, spike and s.policy != "ignore", loss_of(step, code), norm))
            else:
                state = self.leave_out(state)
            logs = step % s.log_every == 0
            durable = step % self.config.every == 0 or step == STEPS
            local = bool(self.config.local_every) and step % self.config.local_every == 0
            if ran and (logs or step in (start + 1, STEPS)):
                self.lines[step] = not applied
            if durable or local or logs or step == start + 1:
                last = judged[-1][0] if judged else 0
                for at, was_applied, was_spike, loss, norm in judged:
                    skipped = [] if was_applied else [*skipped, at]
                    self.happened["skipped updates"] += not was_applied
                    self.happened["spikes"] += was_spike
                    if was_applied and not was_spike:
                        finite.clear()
                    elif math.isfinite(norm):
                        finite.append([at, loss, norm])
                    if was_spike and s.policy == "rollback":
                        raise Rollback(at, at, finite)
                    if s.rollback_after and len(skipped) >= s.rollback_after:
                        raise Rollback(skipped[0], last, finite)
                judged.clear()
            if durable and step not in self.durable:
                self.durable[step] = state
                self.prune()
            elif local and not durable:
                self.local = {step: state}
            self.ever_saved |= durable or local
        self.last = state
        return "done"
