"""The training loop: prepare, resume, step, log, evaluate, save, report; and roll back where a step went wrong."""

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax

from opendeep_jax.checkpoint.checkpoints import Checkpoints, remove_partial_saves
from opendeep_jax.config.load import record_context_length
from opendeep_jax.config.schedule import total_steps
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.display.numbers import human_time
from opendeep_jax.display.progress import ProgressLine
from opendeep_jax.display.tables import key_value_table
from opendeep_jax.faults.injection import inject_faults
from opendeep_jax.faults.interrupt import STEPS_AHEAD, StopRequests, stop_requests
from opendeep_jax.faults.recovery import Recovery, Rollback
from opendeep_jax.faults.replay import Replay, compare_copies
from opendeep_jax.faults.watchdog import Watchdog
from opendeep_jax.models.parameters import Arrays
from opendeep_jax.parallel.distributed import is_primary, primary_first
from opendeep_jax.parallel.mesh import global_rows, make_mesh, put_batch
from opendeep_jax.record.files import finished_summary
from opendeep_jax.record.goodput import GoodputClock, read_goodput
from opendeep_jax.record.record import Record
from opendeep_jax.record.workdir import check_workdir, only_writer
from opendeep_jax.train.branch import finish_branch, remove_unfinished
from opendeep_jax.train.compiling import print_once
from opendeep_jax.train.feed import Feed, Pretraining
from opendeep_jax.train.objective import Objective
from opendeep_jax.train.observer import Observer
from opendeep_jax.train.run_directory import save_run
from opendeep_jax.train.setup import Setup, assemble, check_implementations, use_compilation_cache
from opendeep_jax.train.state import TrainState
from opendeep_jax.train.step import StepOutput
from opendeep_jax.train.summary import check_memory, model_rows, peak_flops


def train(
    config: RunConfig,
    workdir: str | Path,
    feed: Feed | None = None,
    objective: Objective | None = None,
    *,
    frozen: dict[str, Arrays] | None = None,
    recipe: RunConfig | None = None,
    begun: float | None = None,
) -> dict:
    """Train the run in `workdir` from its newest sound checkpoint (or from nothing) to its end; return its summary.

    A run that has ended is left as it is; only its report is written again. In a job of several processes all call
    this; the first one prints and writes, and the others get an empty summary.

    Args:
        feed: gives the batches; None trains on the text of `config.data`.
        objective: is minimized; None takes `objective.pretraining`.
        frozen: weights that do not train, on the mesh of `config.parallel` (`TrainState.frozen`).
        recipe: what the configuration was made from, for `config_diff.txt`; None leaves it to what is there.
        begun: when the program was started, on the clock of `time.perf_counter`; None says now.
    Raises:
        ConfigError: for data or a directory that the run cannot start from, and for a directory that has gone.
        KeyboardInterrupt: after Ctrl-C; the step at hand is finished and saved before.
        Resume: after SIGTERM, likewise, and when another process of the job is lost.
        Stopped: with a diagnosis, where going on would not help.
        OSError: when the disk fills up; the newest whole checkpoint stays.
    """
    begun = time.perf_counter() if begun is None else begun
    workdir, steps = Path(workdir), total_steps(config)
    feed = Pretraining(config, workdir) if feed is None else feed
    with contextlib.ExitStack() as stack:
        primary_first("directory", lambda: stack.enter_context(only_writer(workdir)) if is_primary() else None)
        primary_first("branching", lambda: _finish_branch(config, workdir) if is_primary() else None)
        if (summary := finished_summary(workdir, steps)) is not None:
            if is_primary():
                record_context_length(config, recipe, workdir)
            say(f"finished: all {steps:,} steps are done. Report: {_report(workdir)}")
            return summary
        watchdog = stack.enter_context(Watchdog(workdir, config.faults))
        try:
            record = Record(workdir, is_primary())
            summary = _train(config, record, feed, objective, frozen, recipe, begun, watchdog)
        except Exception as error:
            if lost := watchdog.lost_peer(error):
                raise lost from error
            raise
        say(f"report: {_report(workdir)}")
    return summary


def _finish_branch(config: RunConfig, workdir: Path) -> None:
    """Complete or delete a branch that was killed while it was made."""
    if finish_branch(workdir):
        check_workdir(config, workdir)
    remove_unfinished(workdir)


def say(text: str) -> None:
    """Print, in one process of the job."""
    if is_primary():
        print(text, flush=True)


def _report(workdir: Path) -> Path | None:
    if not is_primary():
        return None
    from opendeep_jax.record.report import write_report  # at the end, as matplotlib takes long to load

    return write_report(workdir)


@dataclass(frozen=True)
class Loop:
    """Everything that takes part in the loop."""

    setup: Setup
    steps: int
    skip_batch: Callable[..., TrainState]
    feed: Feed
    checkpoints: Checkpoints
    observer: Observer
    recovery: Recovery
    replay: Replay
    progress: ProgressLine
    watchdog: Watchdog
    clock: GoodputClock
    stop: StopRequests


def train_steps(loop: Loop, state: TrainState, start: int) -> TrainState:
    """Train from the state after step `start` to the run's end; return the last state.

    Raises:
        Rollback: where a step went wrong in a way that only an earlier state cures.
        KeyboardInterrupt, Resume: after a signal; the state is saved.
    """
    config, observer, recovery = loop.setup.config, loop.observer, loop.recovery
    log_every, saving = config.train.log_every, config.checkpoint
    take_step = inject_faults(functools.partial(_take_step, loop), config, recovery.record.workdir)
    under_way: deque[jax.Array] = deque()
    first = not recovery.rolled_back
    for step in range(start + 1, loop.steps + 1):
        state, output = take_step(loop.feed.batch, state, step)
        if output is not None:
            under_way.append(output.metrics["loss"])
            if first or len(under_way) > STEPS_AHEAD:
                jax.block_until_ready(under_way.popleft())
        if first:
            loop.progress.message(f"first step after {human_time(time.perf_counter() - observer.begun)}")
            first = False
        observer.step = step
        stops = loop.stop.after(step) and step < loop.steps
        durable, local = stops or is_due(step, saving.every, loop.steps), is_due(step, saving.local_every)
        if output is not None and is_due(step, log_every, start + 1, loop.steps):
            loop.progress.update(step, **observer.log(step, output))
            for kind, text in observer.noticed():
                recovery.event(kind, step, text)
        if durable or local or is_due(step, log_every, start + 1):
            loop.clock.skipped(recovery.review())
            loop.clock.log(step)
        if is_due(step, config.evaluation.every) and step < loop.steps:
            loop.progress.update(step, **observer.evaluate(step, state, config.evaluation.batches))
        if is_due(step, config.train.sample_every):
            loop.progress.message(observer.sample(step, state))
        if durable or local or is_due(step, config.faults.check_replicas_every):
            _save(loop, state, step, durable, local)
        if stops:
            loop.checkpoints.wait()
            ending = loop.stop.end()
            kind = "interrupted" if isinstance(ending, KeyboardInterrupt) else "preempted"
            recovery.event(kind, step, f"stopped by {loop.stop.signal} after step {step:,}, which is saved.")
            raise ending
    return state


def _take_step(
    loop: Loop, batch_of: Callable[[int, TrainState], Batch], state: TrainState, step: int
) -> tuple[TrainState, StepOutput | None]:
    """Begin a step on this process's rows; the device does the rest while the loop goes on. No output where the run was
    rolled back before the step and skips its batch."""
    config, programs = loop.setup.config, loop.setup.programs
    loop.watchdog.doing("data", step)
    if loop.recovery.skips(step):
        loop.observer.skip(step)
        return loop.skip_batch(state, *loop.recovery.taken_in(step)), None
    with loop.clock.counting("data"):
        rows = batch_of(step - 1, state)
    shape = loop.feed.shape(step - 1)
    if not programs.has(*shape):
        with loop.observer.aside(state, "compile", step=step):
            loop.observer.inputs.reset()
            programs.of(*shape)
    batch = put_batch(rows, loop.setup.mesh, global_rows(config, shape[0], loop.setup.mesh))
    if is_due(step, config.faults.replay_every):
        with loop.observer.aside(state, "other", "replay", step):
            _refuse(loop.replay.compare(state, batch))
    loop.watchdog.doing("step", step)
    state, output = programs.of(*shape)(state, batch)
    loop.recovery.note(step, output.check)
    return state, output


def _save(loop: Loop, state: TrainState, step: int, durable: bool, local: bool) -> None:
    """Save the state, if that is due, after its copies on the devices were found to be equal."""
    with loop.observer.aside(state, "checkpoint"):
        _refuse(compare_copies(state, f"step {step:,} was saved"))
        if durable or local:
            loop.clock.write(step)
            saved = loop.checkpoints.save(state, loop.observer.measure(step), durable=durable)
            loop.observer.saved(step, saved)
            for note in saved.notes if saved else ():
                loop.recovery.event("local_checkpoint", step, note)


def _refuse(corruption: str | None) -> None:
    if corruption:
        raise Rollback(corruption)


def is_due(step: int, every: int, *also: int) -> bool:
    """Return whether something done every so many steps (0: never), and at some steps besides, is due at `step`."""
    return step in also or (every > 0 and step % every == 0)


def _train(
    config: RunConfig,
    record: Record,
    feed: Feed,
    objective: Objective | None,
    frozen: dict[str, Arrays] | None,
    recipe: RunConfig | None,
    begun: float,
    watchdog: Watchdog,
) -> dict:
    steps, workdir = total_steps(config), record.workdir
    use_compilation_cache(config)
    feed.check()
    mesh, peak, clock = make_mesh(config.parallel), peak_flops(config), GoodputClock(record, begun)
    recovery = Recovery(record, config.faults, feed.documents, say)
    primary_first("partial saves", lambda: remove_partial_saves(workdir) if is_primary() else None)
    with (
        jax.set_mesh(mesh),
        ThreadPoolExecutor(1) as pool,
        Checkpoints(workdir, config.checkpoint) as checkpoints,
    ):
        check_implementations(config)
        setup = assemble(config, mesh, objective, frozen)
        programs = setup.programs
        say(key_value_table(model_rows(config, setup.template, mesh, peak, checkpoints.steps())))
        check_memory(config, setup.template, mesh.size)
        opening = pool.submit(feed.open, setup)  # text is tokenized while the step is compiled

        def restore(before: int | None = None) -> tuple[TrainState, int]:
            """Return the state to go on from, and its step: of the newest sound checkpoint, or the run's first."""
            watchdog.doing("restore")
            with clock.counting("restore"):
                state = recovery.restore(checkpoints, setup.template, before)
            state = setup.first_state() if state is None else state
            return state, int(state.step)

        state, start = restore()
        # With a running clock, unless the bars of the text's preparation are on the terminal at the same time.
        programs.say = (print_once if feed.is_ready else say) if is_primary() else None
        if start < steps:
            watchdog.doing("compile", start + 1)
            with clock.counting("compile"):
                programs.of(*feed.shape(start))
        if start == 0:
            recovery.begin_again(checkpoints, state)
        watchdog.doing("data preparation")
        opening.result()
        say(key_value_table(feed.startup_rows()))
        primary_first("record", lambda: _save_run(config, recipe, feed, record) if is_primary() else None)
        clock.first_step = start
        observer = Observer(config, record, feed, mesh, peak, start, begun, clock, watchdog)
        with contextlib.closing(observer), ProgressLine(steps, start, quiet=not is_primary()) as progress:
            recovery.say = progress.message
            programs.say = progress.message if is_primary() else None  # above the line, which is there from now on
            recovery.begin(start, int(state.health.last_update))
            parts = feed, checkpoints, observer, recovery, Replay(setup.local_digests, mesh), progress, watchdog, clock
            with stop_requests() as stop:
                loop = Loop(setup, steps, setup.skip_batch(), *parts, stop)
                while True:
                    try:
                        state = train_steps(loop, state, start)
                        break
                    except Rollback as error:
                        fault = error.with_traceback(None)  # whose frames hold the state: there may be no room for two
                    state, at = None, observer.step
                    checkpoints.wait()
                    state, start = restore(fault.first)
                    if fault.first is not None:  # what was saved later belongs to what is undone
                        checkpoints.discard_from(start + 1)
                    if start == 0:
                        recovery.begin_again(checkpoints, state)
                    recovery.rollback(fault, at, start, int(state.health.last_update))
                    observer.rollback(start)
            progress.update(steps, **observer.evaluate(steps, state, config.evaluation.final_batches))
            with clock.counting("checkpoint"):
                checkpoints.wait()  # a run is finished when its last checkpoint is whole
            clock.write(steps)
            summary = observer.finish(steps)
        say(str(read_goodput(workdir)))
        return summary


def _save_run(config: RunConfig, recipe: RunConfig | None, feed: Feed, record: Record) -> None:
    feed.save(record)
    save_run(config, recipe, record)
