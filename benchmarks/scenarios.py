"""Random misfortunes of a run against a plain model of what it should then do.

    python benchmarks/scenarios.py [--scenarios=60] [--seed=0] [--directory=/tmp]

A scenario is a tiny run with random settings (keep policy, spike policy, local tier, how often it logs; begun from its
seed, imported weights or another run's checkpoint) and random misfortunes: batches whose gradients are not finite,
spikes of the loss or the gradient, levels that last, a border between two phases of data; and, between starts, kills,
damaged, deleted or lost checkpoints and other settings. The loop, its files and its compiled step are the real ones,
in this process; only losses and the lengths of gradients are made up, so that the model can say them.

The model (`Model`) knows no JAX: it says how each start ends, which updates are applied, what is skipped, undone and
passed over, which checkpoints stay. Compared are all of these, every logged rate with the schedule's, and the last
weights and moments, bit for bit, with what the compiled step makes of exactly those batches, one after the other. Where
the model says that a run must not begin anew, the checkpoints are then brought back, and it has to go on.

Prints a line for each scenario, and how many of each thing have happened. Ends with 1 where anything differs.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import math
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from opendeep_jax.checkpoint.checkpoints import Checkpoints
from opendeep_jax.config import schema
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.exits import Stopped
from opendeep_jax.data.batch import Batch
from opendeep_jax.faults.health import FEWEST, LOSS_SPREAD, NORM_SPREAD, PATIENCE, RECENT, WINDOW, new_health
from opendeep_jax.parallel import mesh as meshes
from opendeep_jax.record.files import CHECKPOINTS, SKIPPED_BATCHES, checkpoint_steps, read_jsonl
from opendeep_jax.record.origin import write_origin
from opendeep_jax.record.skipped_batches import read_skipped_batches
from opendeep_jax.train import loop
from opendeep_jax.train import setup as train_setup
from opendeep_jax.train import step as train_step
from opendeep_jax.train.setup import assemble
from opendeep_jax.train.state import TrainState

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


# The real thing


class Killed(BaseException):
    """A process ends in the middle."""


@contextlib.contextmanager
def replaced(**changes: Any) -> Iterator[None]:
    """Replaces attributes of modules: keywords are names with two underscores for the dot."""
    with contextlib.ExitStack() as stack:
        for name, value in changes.items():
            module, _, attribute = name.partition("__")
            stack.enter_context(
                mock.patch.object({"loop": loop, "setup": train_setup, "step": train_step}[module], attribute, value)
            )
        yield


class Bench:
    """One model, its text and its compiled programs, for all scenarios."""

    def __init__(self, directory: Path):
        self.directory, self.compiled, self.rows = directory, {}, {}
        text = directory / "text"
        text.mkdir(parents=True)
        for i in range(20):
            (text / f"{i}.md").write_text(f"Number {i}: " + " ".join(f"{i * j % 17} words" for j in range(60)))
        self.mesh = meshes.make_mesh(schema.ParallelConfig(), jax.devices()[:1])
        config = self.config(draw(0))
        with jax.set_mesh(self.mesh):
            setup = assemble(config, self.mesh)
            self.template, self.first = setup.template, jax.device_get(setup.first_state())
        self.gradients = train_step.batch_gradients

    def config(self, s: Scenario, **checkpoint: Any) -> schema.RunConfig:
        """The run of a scenario."""
        attention = schema.AttentionConfig(kind="gqa", num_heads=2, num_kv_heads=1, head_dim=4)
        sizes = {"vocab_size": 264, "hidden_size": 8, "num_layers": 1, "num_dense_layers": 1, "mlp_size": 8}
        source = schema.SourceConfig("text", str(self.directory / "text" / "*.md"), license="CC0-1.0", epochs=1000.0)
        phases = schema.DataPhase("first", BORDER * ROWS * LENGTH), schema.DataPhase("second")
        local = str(self.directory / "local") if s.checkpoint.local_every else ""
        return schema.RunConfig(
            name="scenario",
            model=schema.ModelConfig(**sizes, dtype="float32", attention=attention),
            data=schema.DataConfig(
                (source,), "bytes", str(self.directory / "data"), LENGTH, phases=phases, held_out_fraction=0, workers=1
            ),
            optimizer=schema.OptimizerConfig("adamw", RATE, "cosine", WARMUP, final_fraction=LEAST),
            train=schema.TrainConfig(
                steps=STEPS, batch_size=ROWS, log_every=s.log_every, sample_every=0, compilation_cache=""
            ),
            checkpoint=dataclasses.replace(s.checkpoint, local_directory=local, **checkpoint),
            faults=schema.FaultsConfig(s.rollback_after, s.policy, ZSCORE, max_rollbacks=3),
            hardware=schema.HardwareConfig(peak_tflops=1.0),
        )

    def made_up(self, config, definition, objective, state, batch):
        """Gradients of length 1 and the loss that the batch's first position names, or what it names besides."""
        code = batch.positions[0, 0]
        positions = batch.positions.at[0, 0].set(0)
        rest = dataclasses.replace(batch, positions=positions)
        grads, measured = self.gradients(config, definition, objective, state, rest)
        length = jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in grads.values()))
        scale = jnp.where(code == NAN, jnp.nan, jnp.where(code == LONG, 100.0, 1.0)) / length
        loss = 2 + jnp.float32(0.01) * (7 * (state.step + 1) % 5) + jnp.maximum(code - 2, 0).astype(jnp.float32)
        measured = measured._replace(metrics=measured.metrics | {"loss": loss})
        return {name: grad * scale for name, grad in grads.items()}, measured

    @contextlib.contextmanager
    def patched(self, s: Scenario, kill: int | None) -> Iterator[None]:
        """The loop as it is, but for made-up batches, programs that are shared, and a death before step `kill`."""

        def assembled(config, mesh, *objective_and_frozen):
            made = assemble(config, mesh, *objective_and_frozen)
            made.programs.compiled = self.compiled.setdefault(s.policy == "skip", {})
            return made

        def inject(take_step, config, workdir):
            def faulty(batch_of, state, step):
                if step == kill:
                    raise Killed
                return take_step(lambda at, state: coded(step, batch_of(at, state)), state, step)

            return faulty

        def coded(step, rows):
            self.rows[step] = rows
            return self.coded(rows, s.codes.get(step, 0))

        with (
            replaced(
                loop__make_mesh=lambda _: self.mesh,
                loop__assemble=assembled,
                loop__inject_faults=inject,
                setup__create_state=lambda *_: self.placed(self.first),
                loop___report=lambda _: None,
                step__batch_gradients=self.made_up,
            ),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            yield

    def coded(self, rows: Batch, code: int) -> Batch:
        positions = np.array(rows.positions)
        positions[0, 0] = code
        return dataclasses.replace(rows, positions=positions)

    def placed(self, state: TrainState) -> TrainState:
        return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, self.template)

    def begun_from(self, s: Scenario) -> TrainState:
        """The state that the scenario's run begins from, in the hosts' memory."""
        if s.origin == "random":
            return self.first
        params = {name: value * np.float32(0.5) for name, value in self.first.params.items()}
        step = BRANCHED_AT if s.origin == "branch" else 0
        health = jax.device_get(new_health(step))
        return self.first._replace(step=np.int32(step), params=params, health=health)

    def prepare(self, s: Scenario, workdir: Path) -> None:
        """Makes the work directory of a run that does not begin from its seed."""
        workdir.mkdir()
        if s.origin != "random":
            with jax.set_mesh(self.mesh):
                write_origin(workdir, s.origin, BRANCHED_AT if s.origin == "branch" else 0)
                with Checkpoints(workdir, self.config(s).checkpoint) as checkpoints:
                    checkpoints.save(self.placed(self.begun_from(s)))

    def start(self, s: Scenario, workdir: Path, kill: int | None, changes: dict) -> str:
        """How a start of the run ends."""
        try:
            with self.patched(s, kill):
                loop.train(self.config(s, **changes), workdir)
        except Killed:
            return "killed"
        except Stopped:
            return "stopped"
        except ConfigError as error:
            if "checkpoint" not in str(error):
                raise
            return "refused"
        return "done"

    def replay(self, s: Scenario, applied: tuple[int, ...]) -> TrainState:
        """What the compiled step makes of these batches alone, one after the other."""
        config = self.config(s)
        with jax.set_mesh(self.mesh):
            state = self.placed(self.begun_from(s))
            setup = assemble(config, self.mesh)
            setup.programs.compiled = self.compiled[s.policy == "skip"]
            program, skip = setup.programs.of(ROWS, LENGTH), setup.skip_batch()
            for step in range(int(state.step) + 1, STEPS + 1):
                if step in applied:
                    rows = self.coded(self.rows[step], s.codes.get(step, 0))
                    state = state._replace(health=self.placed_health(step))
                    state, _ = program(state, meshes.put_batch(rows, self.mesh, ROWS))
                else:
                    state = skip(state, math.nan, math.nan)
            return jax.device_get(state)

    def placed_health(self, step: int):
        """A window in which nothing is a spike."""
        return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), new_health(step), self.template.health)


def rate_of(step: int) -> float:
    """The learning rate that the schedule has for a step (from 1)."""
    if step <= WARMUP:
        return RATE * step / WARMUP
    done = (step - 1 - WARMUP) / (STEPS - WARMUP)
    return RATE * (LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * done)))


def harm(what: str, workdir: Path, model: Model, bench: Bench) -> None:
    """Does to a run's files, and to the model's, what befalls them between two starts."""
    directory = workdir / CHECKPOINTS
    if what == "local lost":
        shutil.rmtree(bench.directory / "local", ignore_errors=True)
        model.local = {}
    steps = {"newest damaged": checkpoint_steps(directory)[-1:], "one deleted": checkpoint_steps(directory)[:1]}.get(
        what
    )
    for step in checkpoint_steps(directory) if steps is None and what.startswith("all") else steps or ():
        if what.endswith("deleted"):
            shutil.rmtree(directory / str(step))
            del model.durable[step]
            model.damaged.discard(step)
        else:
            for file in (directory / str(step)).rglob("*"):
                if file.is_file():
                    file.write_bytes(bytes(file.stat().st_size))
            model.damaged.add(step)


def play(s: Scenario, bench: Bench) -> Model:
    """Plays a scenario, and returns the model of it. Raises AssertionError where the run does otherwise."""
    workdir, model = bench.directory / f"scenario-{s.seed}", Model(s)
    bench.prepare(s, workdir)
    shutil.rmtree(bench.directory / "local", ignore_errors=True)
    plans, changes, aside = [*s.starts, (None, "", {})], {}, bench.directory / "copy"
    for kill, what, more in plans:
        said, did = model.start(kill), bench.start(s, workdir, kill, changes)
        assert did == said, f"the start ends as {did}, and should as {said}"
        model.happened[said] += 1
        if said in ("done", "stopped"):
            break
        changes = more
        model.config = dataclasses.replace(s.checkpoint, **more)
        before, sound, broken = dict(model.durable), workdir / CHECKPOINTS, set(model.damaged)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(sound, aside)
        harm(what, workdir, model, bench)
        if what and model.ever_saved and not (set(model.durable) - model.damaged or model.local):
            lines = read_jsonl(workdir / "metrics.jsonl")
            said, did = model.start(None), bench.start(s, workdir, None, changes)
            assert (said, did) == ("refused", "refused"), f"a run that lost its checkpoints ends as {did}"
            assert read_jsonl(workdir / "metrics.jsonl") == lines, "a refused start changed the metrics"
            model.happened["refused"] += 1
            shutil.rmtree(sound, ignore_errors=True)
            shutil.copytree(aside, sound)
            model.durable, model.damaged = before, broken
    check(s, model, workdir, bench, said)
    shutil.rmtree(workdir)
    return model


def check(s: Scenario, model: Model, workdir: Path, bench: Bench, ending: str) -> None:
    """Compares what a run has left with the model."""
    windows = [(w["first"], w["last"], w["to_step"]) for w in read_skipped_batches(workdir)]
    assert windows == [(w["first"], w["last"], w["to_step"]) for w in model.windows], "passed over"
    assert checkpoint_steps(workdir / CHECKPOINTS) == sorted(model.durable), "checkpoints"
    assert (workdir / SKIPPED_BATCHES).exists() == bool(windows)
    if ending != "done":
        return
    lines = {line["step"]: line for line in read_jsonl(workdir / "metrics.jsonl")}
    assert {step: bool(line["skipped"]) for step, line in lines.items()} == model.lines, "logged steps"
    for step, line in lines.items():
        assert math.isclose(line["learning_rate"], rate_of(step), rel_tol=1e-5), f"the rate of step {step}"
    assert json.loads((workdir / "summary.json").read_text())["steps"] == STEPS
    with jax.set_mesh(bench.mesh), Checkpoints(workdir) as checkpoints:
        state, notes = checkpoints.restore(bench.template)
    wanted = bench.replay(s, model.last.applied)
    assert not notes and int(state.step) == STEPS and int(state.health.last_update) == model.last.last_update
    for name in ("params", "opt_state"):
        leaves = zip(jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(wanted, name)), strict=True)
        assert all(np.asarray(one).tobytes() == np.asarray(other).tobytes() for one, other in leaves), name


def main(argv: Sequence[str]) -> int:
    """Plays the scenarios and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", default=None)
    given = parser.parse_args(argv)
    total, wrong = collections.Counter(), 0
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        bench = Bench(Path(directory) / "bench")
        for seed in range(given.seed, given.seed + given.scenarios):
            s = draw(seed)
            try:
                model, result = play(s, bench), "as it should"
                total.update(model.happened)
            except AssertionError as error:
                wrong, result = wrong + 1, f"WRONG: {error}"
            harms = ", ".join(f"{what or 'killed'} before {kill}" for kill, what, _ in s.starts) or "undisturbed"
            print(f"{seed:4d}  {s.origin:7s} {s.policy:9s} keep={s.checkpoint.keep}  {harms}: {result}", flush=True)
    print(", ".join(f"{count} {name}" for name, count in sorted(total.items())))
    print(f"{given.scenarios - wrong} of {given.scenarios} scenarios as they should be")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
