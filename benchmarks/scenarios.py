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
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from scenario_model import (
    BORDER,
    BRANCHED_AT,
    LEAST,
    LENGTH,
    LONG,
    NAN,
    RATE,
    ROWS,
    STEPS,
    WARMUP,
    ZSCORE,
    Model,
    Scenario,
    draw,
)

from opendeep_jax.checkpoint.checkpoints import Checkpoints
from opendeep_jax.config import schema
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.exits import Stopped
from opendeep_jax.data.batch import Batch
from opendeep_jax.faults.health import new_health
from opendeep_jax.parallel import mesh as meshes
from opendeep_jax.record.files import CHECKPOINTS, SKIPPED_BATCHES, checkpoint_steps, read_jsonl
from opendeep_jax.record.origin import write_origin
from opendeep_jax.record.skipped_batches import read_skipped_batches
from opendeep_jax.train import loop
from opendeep_jax.train import setup as train_setup
from opendeep_jax.train import step as train_step
from opendeep_jax.train.setup import assemble
from opendeep_jax.train.state import TrainState

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
