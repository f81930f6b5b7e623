"""The training loop: prepare, resume, step, log, evaluate, save, report."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schedule import total_steps
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.pipeline import open_data
from opendeep_jax.data.prepared import check_data
from opendeep_jax.data.provenance import DATA_FILE
from opendeep_jax.models.parameters import skeleton
from opendeep_jax.parallel.mesh import make_mesh, put_batch
from opendeep_jax.train.checkpoint import Checkpoints, remove_partial_saves
from opendeep_jax.train.interrupt import stop_requests
from opendeep_jax.train.observer import Observer
from opendeep_jax.train.optimizer import make_optimizer
from opendeep_jax.train.programs import Programs, check_implementations, use_compilation_cache
from opendeep_jax.train.progress import Progress, human_time, startup_summary
from opendeep_jax.train.report import write_report
from opendeep_jax.train.run_directory import finished_summary, only_writer, save_run
from opendeep_jax.train.state import abstract_state, create_state
from opendeep_jax.train.step import make_train_step
from opendeep_jax.train.summary import check_memory, data_rows, model_rows, peak_flops


def train(config: RunConfig, workdir: str | Path, recipe: RunConfig | None = None, begun: float | None = None) -> dict:
    """Trains the run in `workdir` from its newest checkpoint (or from nothing) to its end; returns its summary.

    A run that has ended is left as it is; only its report is written again.

    Args:
        recipe: what the configuration was made from, for `config_diff.txt`.
        begun: when the program was started, on the clock of `time.perf_counter`; None says now.
    Raises:
        ConfigError: for data or a directory that the run cannot start from, and a job of several processes.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; the step at hand is finished and saved before.
        OSError: when the disk fills up; the newest whole checkpoint stays.
    """
    begun = time.perf_counter() if begun is None else begun
    workdir = Path(workdir)
    if jax.process_count() > 1:
        raise ConfigError(
            f"This job has {jax.process_count()} processes, and this version trains in one process, over all devices "
            "of one machine. Start it on a single host."
        )
    with only_writer(workdir):
        steps = total_steps(config)
        if (summary := finished_summary(workdir, steps)) is not None:
            print(f"finished: all {steps:,} steps are done. Report: {write_report(workdir)}")
            return summary
        summary = _train(config, workdir, recipe or config, steps, begun)
        print(f"report: {write_report(workdir)}")
    return summary


def _train(config: RunConfig, workdir: Path, recipe: RunConfig, steps: int, begun: float) -> dict:
    use_compilation_cache(config)
    if not (workdir / DATA_FILE).exists():  # else the text is there already
        check_data(config)
    mesh, bones, peak = make_mesh(config.parallel), skeleton(config.model), peak_flops(config)
    optimizer = make_optimizer(config, bones.axes())
    remove_partial_saves(workdir)
    with (
        jax.set_mesh(mesh),
        ThreadPoolExecutor(1) as pool,
        Checkpoints(workdir, config.checkpoint) as checkpoints,
    ):
        check_implementations(config)
        template, found = abstract_state(config, optimizer, bones, mesh), checkpoints.steps()
        print(startup_summary(model_rows(config, template, mesh, peak, found)), flush=True)
        check_memory(config, template, mesh.size)
        opening = pool.submit(open_data, config, workdir=workdir)  # tokenizes while the step is compiled
        state = checkpoints.restore(template) if found else create_state(config, optimizer, template)
        start = found[-1] if found else 0  # not state.step: the state is still being made while the step is traced
        step_function = jax.jit(make_train_step(config, bones, optimizer), donate_argnums=0)
        programs = Programs(config, step_function, template, mesh)
        if start < steps:
            programs.at(start)
        data = opening.result()
        print(startup_summary(data_rows(config, data.describe())), flush=True)
        save_run(config, recipe, data, workdir)
        observer = Observer(config, workdir, data, bones, mesh, peak, start, begun)
        batches = data.iterate(start)
        with contextlib.closing(observer.writer), Progress(steps, start) as progress:
            with stop_requests() as stop_requested:
                for step in range(start + 1, steps + 1):
                    if not programs.has(step - 1):
                        with observer.aside(state):
                            programs.at(step - 1)
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
                    stop = stop_requested() and step < steps
                    if stop or is_due(step, config.checkpoint.every, steps):
                        with observer.aside(state):
                            checkpoints.save(state)
                    if stop:
                        raise KeyboardInterrupt
            progress.update(steps, **observer.evaluate(steps, state, config.evaluation.final_batches))
        checkpoints.wait()  # a run is finished when its last checkpoint is whole
        return observer.finish(steps)


def is_due(step: int, every: int, *also: int) -> bool:
    """Whether something done every so many steps (0: never), and at some steps besides, is due at `step`."""
    return step in also or (every > 0 and step % every == 0)
