"""The training loop: prepare, resume, step, log, evaluate, save, report."""

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import save_run_config
from opendeep_jax.config.schedule import batch_size_at, total_steps
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.data.files import write_file
from opendeep_jax.data.pipeline import Data, check_data, open_data
from opendeep_jax.models.parameters import skeleton
from opendeep_jax.parallel.mesh import batch_sharding, make_mesh, put_batch
from opendeep_jax.train.checkpoint import TOKENIZER_FILE, Checkpoints, remove_partial_saves
from opendeep_jax.train.observer import SUMMARY, Observer
from opendeep_jax.train.optimizer import make_optimizer
from opendeep_jax.train.progress import Progress, human_time, startup_summary
from opendeep_jax.train.report import write_report
from opendeep_jax.train.state import TrainState, abstract_state, create_state
from opendeep_jax.train.step import make_train_step
from opendeep_jax.train.summary import data_rows, model_rows, peak_flops

DATA_FILE = "data.json"


def train(config: RunConfig, workdir: str | Path, recipe: RunConfig | None = None) -> dict:
    """Trains the run in `workdir` from its newest checkpoint (or from nothing) to its end; returns its summary.

    Args:
        recipe: what the configuration was made from, for `config_diff.txt`.
    Raises:
        ConfigError: for data or a directory that the run cannot start from.
        OSError: when the disk fills up; the newest whole checkpoint stays.
    """
    begun = time.perf_counter()
    workdir = Path(workdir)
    use_compilation_cache(config)
    check_data(config)
    mesh, bones = make_mesh(config.parallel), skeleton(config.model)
    steps, peak = total_steps(config), peak_flops(config)
    optimizer = make_optimizer(config, bones.axes())
    with (
        jax.set_mesh(mesh),
        ThreadPoolExecutor(1) as pool,
        Checkpoints(workdir, config.checkpoint) as checkpoints,
    ):
        opening = pool.submit(open_data, config)  # tokenizes while the step is compiled
        remove_partial_saves(workdir)
        template, found = abstract_state(config, optimizer, bones, mesh), checkpoints.steps()
        print(startup_summary(model_rows(config, template, mesh, peak, found)), flush=True)
        state = checkpoints.restore(template) if found else create_state(config, optimizer, template)
        start = int(state.step)
        step_function = jax.jit(make_train_step(config, bones, optimizer), donate_argnums=0)
        programs = Programs(config, step_function, template, mesh)
        programs.at(start)
        data = opening.result()
        print(startup_summary(data_rows(config, data.describe())), flush=True)
        save_run(config, recipe or config, data, workdir)
        if start >= steps and (workdir / SUMMARY).exists():
            print(f"finished: all {steps:,} steps are done. Report: {write_report(workdir)}")
            return json.loads((workdir / SUMMARY).read_text())
        observer = Observer(config, workdir, data, bones, mesh, peak, start)
        with Progress(steps, start) as progress, contextlib.closing(observer.writer):
            batches = data.iterate(start, jax.process_index(), jax.process_count())
            for step in range(start + 1, steps + 1):
                state, metrics = programs.at(step - 1)(state, put_batch(next(batches), mesh))
                if step == start + 1:
                    jax.block_until_ready(metrics["loss"])
                    progress.message(f"first step after {human_time(time.perf_counter() - begun)}")
                if is_due(step, config.train.log_every, start + 1, steps):
                    progress.update(step, **observer.log(step, metrics))
                if is_due(step, config.evaluation.every) and step < steps:
                    progress.update(step, **observer.evaluate(step, state, config.evaluation.batches))
                if is_due(step, config.train.sample_every):
                    progress.message(observer.sample(step, state))
                if is_due(step, config.checkpoint.every, steps):
                    with observer.aside(state):
                        checkpoints.save(state)
            progress.update(steps, **observer.evaluate(steps, state, config.evaluation.final_batches))
        summary = observer.finish(steps, time.perf_counter() - begun)
    print(f"report: {write_report(workdir)}")
    return summary


def is_due(step: int, every: int, *also: int) -> bool:
    """Whether something done every so many steps (0: never), and at some steps besides, is due at `step`."""
    return step in also or (every > 0 and step % every == 0)


def use_compilation_cache(config: RunConfig) -> None:
    """Keeps compiled programs in `train.compilation_cache`, so that the next start is quick."""
    if config.train.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.train.compilation_cache).absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class Programs:
    """The compiled training step for each batch size of the run, made when it is first needed."""

    def __init__(self, config: RunConfig, step_function, template: TrainState, mesh: Mesh):
        self.config, self.step_function, self.template, self.mesh = config, step_function, template, mesh
        self.compiled: dict[int, jax.stages.Compiled] = {}

    def at(self, step: int) -> jax.stages.Compiled:
        """The program of `step` (from 0), compiled for the batch that it has."""
        length = self.config.data.sequence_length
        rows = batch_size_at(self.config.train, length, step)
        if rows not in self.compiled:
            sharding = batch_sharding(self.mesh)
            whole = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=sharding)
            mask = jax.ShapeDtypeStruct((rows, length), jnp.bool_, sharding=sharding)
            batch = Batch(whole, whole, mask, whole, whole)
            self.compiled[rows] = self.step_function.lower(self.template, batch).compile()
        return self.compiled[rows]


def save_run(config: RunConfig, recipe: RunConfig, data: Data, workdir: Path) -> None:
    """Writes what the run is made of: configuration, data and tokenizer.

    Raises:
        ConfigError: where the directory's run was trained on other text; its batches could not be made again.
    """
    here = data.describe()
    path = workdir / DATA_FILE
    if path.exists() and (there := json.loads(path.read_text()))["content_hash"] != here["content_hash"]:
        raise ConfigError(
            f"--workdir={workdir}: its run was trained on {there['train_tokens']:,} tokens (hash "
            f"{there['content_hash'][:12]}), and its sources and tokenizer now give {here['train_tokens']:,} others "
            f"(hash {here['content_hash'][:12]}). Bring the sources back as they were, or give another --workdir."
        )
    write_file(path, json.dumps(here, indent=2) + "\n")
    if data.tokenizer.path:
        write_file(workdir / TOKENIZER_FILE, Path(data.tokenizer.path).read_text(encoding="utf-8"))
    save_run_config(config, recipe, workdir)
