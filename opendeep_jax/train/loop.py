"""The training loop: prepare, resume, step, log, evaluate, save, report; and go back where a step went wrong."""

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from opendeep_jax.checkpoint.checkpoints import Checkpoints, NoneSound, remove_partial_saves
from opendeep_jax.config.load import check_workdir, record_context_length
from opendeep_jax.config.schedule import stage_at, total_steps
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.data.pipeline import Data, open_data
from opendeep_jax.data.prepared import check_data
from opendeep_jax.data.provenance import DATA_FILE
from opendeep_jax.display.numbers import human_time
from opendeep_jax.display.progress import ProgressLine
from opendeep_jax.display.tables import key_value_table
from opendeep_jax.faults.injection import inject_faults
from opendeep_jax.faults.interrupt import STEPS_AHEAD, StopRequests, stop_requests
from opendeep_jax.faults.recovery import GoBack, Recovery
from opendeep_jax.faults.replay import Replay, compare_copies
from opendeep_jax.faults.watchdog import Watchdog
from opendeep_jax.parallel.distributed import is_primary, primary_first
from opendeep_jax.parallel.mesh import global_rows, make_mesh, put_batch, rows_here
from opendeep_jax.record.events import record_event
from opendeep_jax.record.goodput import Clock, read_goodput
from opendeep_jax.record.report import write_report
from opendeep_jax.train.branch import finish_branch, remove_unfinished, with_own_tokenizer
from opendeep_jax.train.compiling import say_once
from opendeep_jax.train.observer import Observer
from opendeep_jax.train.run_directory import finished_summary, only_writer, save_run
from opendeep_jax.train.setup import Programs, assemble, check_implementations, use_compilation_cache
from opendeep_jax.train.state import TrainState
from opendeep_jax.train.step import StepOutput
from opendeep_jax.train.summary import check_memory, data_rows, model_rows, peak_flops


def train(config: RunConfig, workdir: str | Path, recipe: RunConfig | None = None, begun: float | None = None) -> dict:
    """Trains the run in `workdir` from its newest sound checkpoint (or from nothing) to its end; returns its summary.

    A run that has ended is left as it is; only its report is written again. In a job of several processes all call
    this; the first one prints and writes, and the others get an empty summary.

    Args:
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
            summary = _train(config, workdir, recipe, steps, begun, watchdog)
        except Exception as error:
            if lost := watchdog.lost_peer(error):
                raise lost from error
            raise
        say(f"report: {_report(workdir)}")
    return summary


def _finish_branch(config: RunConfig, workdir: Path) -> None:
    """What a branch that was killed when it began has left is moved to its places, or deleted."""
    if finish_branch(workdir):
        check_workdir(config, workdir)
    remove_unfinished(workdir)


def say(text: str) -> None:
    """Prints, in one process of the job."""
    if is_primary():
        print(text, flush=True)


def _report(workdir: Path) -> Path | None:
    return write_report(workdir) if is_primary() else None


@dataclass(frozen=True)
class Run:
    """Everything that takes part in the loop."""

    config: RunConfig
    steps: int
    mesh: Mesh
    programs: Programs
    skip_batch: Callable[..., TrainState]
    data: Data
    checkpoints: Checkpoints
    observer: Observer
    recovery: Recovery
    replay: Replay
    progress: ProgressLine
    watchdog: Watchdog
    clock: Clock
    stop: StopRequests


def train_steps(run: Run, state: TrainState, start: int) -> TrainState:
    """Trains from the state after step `start` to the run's end; returns the last state.

    Raises:
        GoBack: where a step went wrong in a way that only an earlier state cures.
        KeyboardInterrupt, Resume: after a signal; the state is saved.
    """
    config, observer, recovery = run.config, run.observer, run.recovery
    under_way: deque[jax.Array] = deque()
    batches = run.data.iterate(start, lambda rows: rows_here(run.mesh, global_rows(config, rows, run.mesh)))
    take_step = inject_faults(functools.partial(_take_step, run), config, recovery.workdir)
    first = not recovery.went_back
    for step in range(start + 1, run.steps + 1):
        run.watchdog.doing("data", step)
        state, output = take_step(batches, state, step)
        if output is not None:
            under_way.append(output.metrics["loss"])
            if first or len(under_way) > STEPS_AHEAD:
                jax.block_until_ready(under_way.popleft())
        if first:
            run.progress.message(f"first step after {human_time(time.perf_counter() - observer.begun)}")
            first = False
        observer.step = step
        stops = run.stop.after(step) and step < run.steps
        saves = _saves(config, step, run.steps, stops)
        if output is not None and is_due(step, config.train.log_every, start + 1, run.steps):
            run.progress.update(step, **observer.log(step, output))
            for kind, text in observer.noticed():
                recovery.event(kind, step, text)
        if any(saves) or is_due(step, config.train.log_every, start + 1):
            run.clock.skipped(recovery.review())
            run.clock.log(step)
        if is_due(step, config.evaluation.every) and step < run.steps:
            run.watchdog.doing("evaluation")
            run.progress.update(step, **observer.evaluate(step, state, config.evaluation.batches))
        if is_due(step, config.train.sample_every):
            run.watchdog.doing("evaluation")
            run.progress.message(observer.sample(step, state))
        if any(saves) or is_due(step, config.faults.check_replicas_every):
            _save(run, state, step, saves)
        if stops:
            run.checkpoints.wait()
            ending = run.stop.end()
            kind = "interrupted" if isinstance(ending, KeyboardInterrupt) else "preempted"
            recovery.event(kind, step, f"stopped by {run.stop.signal} after step {step:,}, which is saved.")
            raise ending
    return state


def _take_step(
    run: Run, batches: Iterator[Batch], state: TrainState, step: int
) -> tuple[TrainState, StepOutput | None]:
    """Begins a step on this process's rows; the device does the rest while the loop goes on. No output where the run
    has gone back before the step and skips its batch."""
    config, recovery = run.config, run.recovery
    with run.clock.counting("data"):
        rows = next(batches)
    if recovery.passes_over(step):
        run.observer.leave_out(step)
        return run.skip_batch(state, *recovery.taken_in(step)), None
    shape = batch_shape(config, step)
    if not run.programs.has(*shape):
        with run.observer.aside(state, "compile"):
            run.watchdog.doing("compile", step)
            run.observer.inputs.forget()
            run.programs.of(*shape)
    batch = put_batch(rows, run.mesh, global_rows(config, shape[0], run.mesh))
    if is_due(step, config.faults.replay_every):
        with run.observer.aside(state, "other"):
            run.watchdog.doing("replay", step)
            _refuse(run.replay.compare(state, batch))
    run.watchdog.doing("step", step)
    state, output = run.programs.of(*shape)(state, batch)
    recovery.note(step, output.check)
    return state, output


def batch_shape(config: RunConfig, step: int) -> tuple[int, int]:
    """Rows and length of the batch of `step` (from 1), without rows of padding."""
    stage = stage_at(config, step - 1)
    return stage.batch_size, stage.length


def _save(run: Run, state: TrainState, step: int, saves: "Saves") -> None:
    """Saves the state, if that is due, after its copies on the devices were found to be equal."""
    with run.observer.aside(state, "checkpoint"):
        run.watchdog.doing("checkpoint")
        _refuse(compare_copies(state, f"step {step:,} was saved"))
        if any(saves):
            run.clock.write(step)
            saved = run.checkpoints.save(state, run.observer.measure(step), durable=saves.durable)
            run.observer.saved(step, saved)
            for note in saved.notes if saved else ():
                run.recovery.event("local_checkpoint", step, note)


class Saves(NamedTuple):
    """Which checkpoints are due."""

    durable: bool
    local: bool


def _saves(config: RunConfig, step: int, steps: int, stops: bool) -> Saves:
    saving = config.checkpoint
    return Saves(stops or is_due(step, saving.every, steps), is_due(step, saving.local_every))


def _refuse(corruption: str | None) -> None:
    if corruption:
        raise GoBack(corruption)


def is_due(step: int, every: int, *also: int) -> bool:
    """Whether something done every so many steps (0: never), and at some steps besides, is due at `step`."""
    return step in also or (every > 0 and step % every == 0)


def _train(
    config: RunConfig, workdir: Path, recipe: RunConfig | None, steps: int, begun: float, watchdog: Watchdog
) -> dict:
    use_compilation_cache(config)
    of_text = with_own_tokenizer(config, workdir)
    if not (workdir / DATA_FILE).exists():  # else the text is there already
        primary_first("text", lambda: check_data(of_text))
    mesh, peak = make_mesh(config.parallel), peak_flops(config)
    clock = Clock(workdir, begun, writes=is_primary())
    primary_first("partial saves", lambda: remove_partial_saves(workdir) if is_primary() else None)
    with (
        jax.set_mesh(mesh),
        ThreadPoolExecutor(1) as pool,
        Checkpoints(workdir, config.checkpoint) as checkpoints,
    ):
        check_implementations(config)
        setup = assemble(config, mesh)
        template, programs = setup.template, setup.programs
        say(key_value_table(model_rows(config, template, mesh, peak, checkpoints.steps())))
        check_memory(config, template, mesh.size)
        # Text is tokenized while the step is compiled.
        opening = pool.submit(primary_first, "data", functools.partial(open_data, of_text, is_primary(), workdir))
        sources = workdir, checkpoints, template, setup.first_state, watchdog, clock
        state, start = _newest(*sources)
        # With a running clock, unless the bars of the text's preparation are on the terminal at the same time.
        programs.say = (say_once if (workdir / DATA_FILE).exists() else say) if is_primary() else None
        if start < steps:
            watchdog.doing("compile", start + 1)
            with clock.counting("compile"):
                programs.of(*batch_shape(config, start + 1))
        if start == 0:
            _begin(workdir, checkpoints, state)
        watchdog.doing("data preparation")
        data = opening.result()
        say(key_value_table(data_rows(config, data.describe())))
        primary_first("record", lambda: save_run(config, recipe, data, workdir) if is_primary() else None)
        clock.first_step = start
        observer = Observer(config, workdir, data, setup.skeleton, mesh, peak, start, begun, clock)
        with contextlib.closing(observer), ProgressLine(steps, start, quiet=not is_primary()) as progress:
            programs.say = progress.message if is_primary() else None  # above the line, which is there from now on
            recovery = Recovery(workdir, config.faults, data.prepared, progress.message, is_primary())
            recovery.begin(start, int(state.health.last_update))
            saving = checkpoints, observer, recovery, Replay(setup.local_digests, mesh)
            with stop_requests() as stop:
                skip = setup.skip_batch()
                run = Run(config, steps, mesh, programs, skip, data, *saving, progress, watchdog, clock, stop)
                while True:
                    try:
                        state = train_steps(run, state, start)
                        break
                    except GoBack as error:
                        fault = error.with_traceback(None)  # whose frames hold the state: there may be no room for two
                    state, at = None, observer.step
                    checkpoints.wait()
                    state, start = _newest(*sources, fault.first)
                    if fault.first is not None:  # what was saved later belongs to what is undone
                        checkpoints.discard_from(start + 1)
                    if start == 0:
                        _begin(workdir, checkpoints, state)
                    recovery.go_back(fault, at, start, int(state.health.last_update))
                    observer.go_back(start)
            watchdog.doing("evaluation", steps)
            progress.update(steps, **observer.evaluate(steps, state, config.evaluation.final_batches))
            with clock.counting("checkpoint"):
                checkpoints.wait()  # a run is finished when its last checkpoint is whole
            clock.write(steps)
            summary = observer.finish(steps)
        say(str(read_goodput(workdir)))
        return summary


def _newest(
    workdir: Path,
    checkpoints: Checkpoints,
    template: TrainState,
    beginning: Callable[[], TrainState],
    watchdog: Watchdog,
    clock: Clock,
    before: int | None = None,
) -> tuple[TrainState, int]:
    """The state to go on from, and its step: of the newest sound checkpoint without an update of step `before` or
    later, or the first one, where there never was a checkpoint."""
    watchdog.doing("restore")
    try:
        with clock.counting("restore"):
            restored = checkpoints.restore(template, before)
    except NoneSound as error:
        if is_primary():
            record_event(workdir, "unsound_checkpoint", 0, str(error))
        raise
    if restored is None:
        return beginning(), 0
    state, notes = restored
    for note in notes:
        say(note)
        if is_primary():
            record_event(workdir, "unsound_checkpoint", int(state.step), note)
    return state, int(state.step)


def _begin(workdir: Path, checkpoints: Checkpoints, state: TrainState) -> None:
    """Says that a run begins again, where it does, and whether with the weights that it began with before."""
    again = checkpoints.begin(state)
    if again:
        say(again)
        if is_primary():
            record_event(workdir, "begun_again", 0, again)
