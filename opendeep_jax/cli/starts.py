"""The starts of one job, counted: a job that fails at every start is not started a hundred times.

Launchers give a job's name (OPENDEEP_JOB); a job of another name counts from nothing, and so does one that has ended
for good. Each process keeps a file of its own, WORKDIR/starts/PROCESS.json. A new checkpoint is progress, and begins
the count again. Without a launcher nothing is counted, and nothing written.
"""

import contextlib
import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from opendeep_jax.config.exits import Resume, Stopped, StopRequested
from opendeep_jax.config.files import write_atomically
from opendeep_jax.record.files import CHECKPOINTS, checkpoint_steps

DIRECTORY = "starts"
MOST_CRASHES = 2
"""Python errors in a row, without progress, that end a job."""
MOST_LOSSES = 5
"""Starts in a row, without progress, that ended in a kill, an abort, a hang or a lost peer, that end a job."""


_excuses: list[Callable[[], None]] = []  # of the start under way


@dataclass
class Starts:
    """The starts of a job since its last progress."""

    job: str = ""
    step: int = 0
    """Of the newest checkpoint, when the last start began."""
    crashes: int = 0
    losses: int = 0
    """The start under way counts as lost until it ends otherwise."""


def newest_step(workdir: Path) -> int:
    """Return the step of the newest checkpoint in a work directory; 0 where there is none."""
    with contextlib.suppress(OSError):
        return max(checkpoint_steps(workdir / CHECKPOINTS), default=0)
    return 0


@contextlib.contextmanager
def counted(
    workdir: str | Path, process: str, environ: Mapping[str, str], is_bug: Callable[[BaseException], bool]
) -> Iterator[None]:
    """Counts the start that the block is.

    Args:
        process: this process's name in the job, the same at each start.
        is_bug: tells a Python error from an exception that has a status of its own.
    Raises:
        Stopped: before the block where the last MOST_LOSSES starts got nowhere, and in place of the error that ends
            the MOST_CRASHES-th start without progress.
    """
    job = environ.get("OPENDEEP_JOB", "")
    if not job:
        yield
        return
    workdir = Path(workdir)
    file = workdir / DIRECTORY / f"{process}.json"
    starts = _read(file)
    if (step := newest_step(workdir)) != starts.step or starts.job != job:
        starts = Starts(job, step)
    if starts.losses >= MOST_LOSSES:
        _forget(file)
        raise Stopped(_diagnosis(starts, f"{starts.losses} starts", "a kill, an abort, a hang or a lost peer"))
    lost_before = starts.losses

    def excuse() -> None:
        starts.losses = lost_before
        _write(file, starts)

    starts.losses += 1
    _write(file, starts)
    _excuses.append(excuse)
    try:
        yield
    except BaseException as error:
        if is_bug(error):
            if newest_step(workdir) != step:
                starts.step, starts.crashes = newest_step(workdir), 0
            starts.crashes += 1
            excuse()
            if starts.crashes >= MOST_CRASHES:
                _forget(file)
                traceback.print_exception(error)
                name = f"a Python error ({type(error).__name__})"
                raise Stopped(_diagnosis(starts, f"{starts.crashes} starts", name)) from error
        elif isinstance(error, StopRequested | KeyboardInterrupt):
            excuse()
        elif not isinstance(error, Resume):  # final: whoever starts it again has mended something
            _forget(file)
        raise
    finally:
        _excuses.remove(excuse)
    _forget(file)


def told_to_stop() -> None:
    """Sees to it that the start under way does not count: it is to end because a signal asks for it."""
    for excuse in _excuses:
        excuse()


def _diagnosis(starts: Starts, times: str, cause: str) -> str:
    return (
        f"{times} of job {starts.job} in a row ended in {cause}, without a new checkpoint after step {starts.step:,}; "
        "another would end so too. See what each of them said last, and mend that; then submit the job again."
    )


def _forget(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)
        file.parent.rmdir()  # if it is empty


def _read(file: Path) -> Starts:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return Starts(str(values["job"]), int(values["step"]), int(values["crashes"]), int(values["losses"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Starts()


def _write(file: Path, starts: Starts) -> None:
    with contextlib.suppress(OSError):  # a full disk must not hide what the run has to say of it
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(asdict(starts)) + "\n")
