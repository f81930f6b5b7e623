"""The runs of a sweep as child processes of this one: so many at once, started again where that helps.

A run that has its result is never started. Children die with this process, also by SIGKILL; what they had begun goes
on from its checkpoint the next time.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.exits import INTERRUPTED, RESUME
from opendeep_jax.config.files import write_atomically
from opendeep_jax.jobs.child import child_command, cores_of, gpus_of
from opendeep_jax.jobs.sweep.plan import RECIPE, Sweep, SweepRun
from opendeep_jax.jobs.sweep.progress import SweepProgress
from opendeep_jax.jobs.sweep.results import read_result

RESTARTS = 20
"""Times that a run which asks for it (exit status 75) is started again by one sweep command."""
LOCK_SECONDS = 30.0
"""A killed process keeps its locks until it is wholly gone."""
POLL_SECONDS = 0.1
LAST_LINES = 12
"""Lines of a failed run's output that are kept as its reason."""

Command = Callable[[SweepRun], list[str]]


def train_command(sweep: Sweep) -> Command:
    """Return what starts a run: `opendeep train` on the sweep's recipe with the run's own settings."""
    opendeep = [sys.executable, "-m", "opendeep_jax"]
    return lambda run: [*opendeep, "train", *sweep.shared, f"--workdir={run.workdir}", *run.arguments]


def prepare_data(sweep: Sweep, runs: Sequence[SweepRun]) -> None:
    """Prepare every text and tokenizer that the runs need, once, so that they need not wait for each other.

    Raises ConfigError, with what was printed, where that fails: no run has begun then.
    """
    distinct = {(run.config.data, run.config.model.vocab_size): run for run in reversed(runs)}
    for run in reversed(distinct.values()):
        command = [sys.executable, "-m", "opendeep_jax", "data", "prepare", f"--config={sweep.directory / RECIPE}"]
        done = subprocess.run([*command, *run.arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            lines = "\n".join(done.stderr.strip().splitlines()[-LAST_LINES:])
            raise ConfigError(f"The text of {run.name} cannot be prepared, and no run has begun:\n{lines}")


def run_here(runs: Sequence[SweepRun], parallel: int, command: Command) -> int:
    """Run those of `runs` that have no result, at most `parallel` at once, in their order.

    Ctrl-C and SIGTERM are handed on to the children, which save what they have. Returns 0 when all have ended, RESUME
    after SIGTERM and INTERRUPTED after Ctrl-C. A run that fails leaves NAME.failed, and the others go on.
    """
    waiting = [run for run in runs if read_result(run).state != "finished"]
    slots: list[_Child | None] = [None] * parallel
    with _stop_signals() as received, SweepProgress(runs) as progress:
        try:
            passed_on = 0
            while any(slots) or (waiting and not received):
                for slot, child in enumerate(slots):
                    if child is None and waiting and not received:
                        run = waiting.pop(0)
                        slots[slot] = _Child(run, command(run), slot, parallel)
                        progress.run_started(run)
                    elif child is not None and child.has_ended(stopping=bool(received)):
                        slots[slot] = None
                        progress.run_ended(child.run)
                running = [child for child in slots if child is not None]
                if len(received) > passed_on:  # the second time without saving
                    passed_on = len(received)
                    for child in running:
                        child.signal(received[0] if passed_on == 1 else signal.SIGKILL)
                progress.show([child.run for child in running])
                time.sleep(POLL_SECONDS)
        finally:
            for child in filter(None, slots):
                child.signal(signal.SIGKILL)
    if not received:
        return 0
    return INTERRUPTED if received[0] == signal.SIGINT else RESUME


@contextlib.contextmanager
def locked(directory: Path, what: str, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock on a directory; raise ConfigError if another process still has it after so many seconds."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    deadline = time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{directory}: another process {what} there. Wait for its end or stop it, or give another "
                        "--workdir."
                    ) from error
                time.sleep(POLL_SECONDS)
            except OSError:
                break  # some network file systems have no locks
        yield
    finally:
        os.close(descriptor)


class _Child:
    """A run's process."""

    def __init__(self, run: SweepRun, command: list[str], slot: int, parallel: int):
        self.run, self.command, self.slot, self.parallel = run, command, slot, parallel
        self.restarts = 0
        self._start()

    def _start(self) -> None:
        with locked(self.run.workdir, "is training"):
            pass  # what a killed sweep has left is gone
        self.run.sibling_file(".failed").unlink(missing_ok=True)
        log = self.run.sibling_file(".log")
        self.begins = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as output:
            # A session of its own: a terminal's Ctrl-C reaches the sweep alone, which hands it on once.
            self.process = subprocess.Popen(
                child_command(self.command, signal.SIGKILL, cores_of(self.slot, self.parallel)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | gpus_of(self.slot, self.parallel),
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        """Send a signal to the process, and SIGKILL to all of its session."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if number == signal.SIGKILL else os.kill)(self.process.pid, number)

    def has_ended(self, stopping: bool) -> bool:
        """Return whether the run has ended, well or not; one that asks to be started again is."""
        status = self.process.poll()
        if status is None:
            return False
        if stopping or read_result(self.run).state == "finished":
            return True
        if status == RESUME and self.restarts < RESTARTS:
            self.restarts += 1
            self._start()
            return False
        write_atomically(self.run.sibling_file(".failed"), f"{_ending(status)}\n{self._last_lines()}\n")
        return True

    def _last_lines(self) -> str:
        with open(self.run.sibling_file(".log"), "rb") as log:
            log.seek(self.begins)
            text = log.read()[-20_000:].decode("utf-8", "replace")
        return "\n".join(text.strip().splitlines()[-LAST_LINES:])


def _ending(status: int) -> str:
    if status < 0:
        hint = ", as the kernel does when memory runs out" if -status == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-status).name}{hint}"
    return "ended without a result" if status == 0 else f"exit status {status}"


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Record Ctrl-C and SIGTERM in the yielded list instead of stopping."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
