"""Makes every fault that docs/faults.md speaks of in a tiny real run: how long until it is found, and how the run ends.

    python benchmarks/faults.py [--only=nan,disk] [--json] [--directory=/tmp]

Each run is `opendeep train` on two devices, in one process or in two, and is given the same command again while it ends
with a status that asks for it. `after` is from the fault to the paragraph or the event, seen from outside; for harm
done to files, from the next start, whose imports it includes. `ends` compares the last state with an undisturbed run's.
Who may not mount file systems is not shown a full disk and a directory that may not be written. Ends with 1 where a
fault was not found, or a run did not end as it should.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from kills import PATIENCE, POLL_SECONDS, ended, said, start, steps_done, tiny_run

from opendeep_jax.checkpoint.tools import checkpoint_path, differences
from opendeep_jax.config.exits import MEND, OK, RESUME
from opendeep_jax.record.events import read_events
from opendeep_jax.record.files import checkpoint_steps, read_jsonl

STEPS = 60
HANG_SECONDS, PEER_SECONDS = 20, 5
EQUAL = "bitwise equal"
LAST_WORDS = 10.0
"""Seconds after the end of all processes in which something may still be said of it."""
OF_THE_STEP = ("nan_gradient", "loss_spike")
"""Drills that leave no mark of when they struck."""


class Row(NamedTuple):
    """A line of the table."""

    fault: str
    found_by: str
    after: float | None
    """Seconds; None where it was not found."""
    statuses: str
    """Exit statuses of the starts, in order; of processes of one start, with a + between."""
    ends: str
    sound: bool
    """Whether all was as it should be."""
    paragraph: str


class Scene:
    """A directory for all runs, and the settings that they share."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.settings = [*tiny_run(directory, STEPS), f"--data.directory={directory}/data", "--parallel.data=2"]
        self.settings += ["--checkpoint.every=10", f"--faults.peer_seconds={PEER_SECONDS}"]
        self.whole = directory / "whole"

    def start(self, workdir: Path, *flags: str, processes: int = 1) -> list[subprocess.Popen]:
        """Gives the run's command; always two devices. `flags` may name another work directory: then only standard
        error goes beside this one."""
        return start([*self.settings, *flags], workdir, processes, 2 // processes)

    def finish(self, workdir: Path, *flags: str, processes: int = 1, starts: int = 3) -> list[str]:
        """Gives the command until the run has ended well, at most so often; the statuses."""
        statuses = []
        while starts and (not statuses or set(statuses[-1].split("+")) != {str(OK)}):
            job = self.start(workdir, *flags, processes=processes)
            statuses.append("+".join(str(process.wait()) for process in job))
            starts -= 1
        return statuses

    def ends(self, workdir: Path) -> str:
        """How the run's last state compares with that of the undisturbed one."""
        if not (steps := checkpoint_steps(workdir / "checkpoints")) or steps[-1] != STEPS:
            return f"at step {steps_done(workdir)}"
        arrays = differences(checkpoint_path(self.whole), checkpoint_path(workdir))
        return EQUAL if not arrays else "with other weights"


def event(workdir: Path, kind: str) -> str | None:
    """The text of the first event of this kind, if there is one."""
    return next((event["text"] for event in read_events(workdir, kind)), None)


def paragraph(workdir: Path, fragment: str, processes: int = 1) -> str | None:
    """The line of standard error that has this fragment, if there is one."""
    return next((line for line in said(workdir, processes).splitlines() if fragment in line), None)


def struck(workdir: Path, drill: str) -> float | None:
    """When a drill struck, by the mark that it leaves."""
    return next((path.stat().st_mtime for path in (workdir / "drills").glob(f"{drill}*")), None)


def begun(workdir: Path, step: int) -> float | None:
    """About when a step began: when the one before it was logged, which waits for it."""
    return time.time() if steps_done(workdir) >= step - 1 else None


def watch(
    job: list[subprocess.Popen], moment: Callable[[], float | None], found: Callable[[], str | None]
) -> tuple[float | None, str]:
    """Seconds from the moment of a fault until it is found, and what is said of it."""
    at, text, limit = None, None, time.monotonic() + PATIENCE
    while text is None and time.monotonic() < limit:
        if all(process.poll() is not None for process in job):
            limit = min(limit, time.monotonic() + LAST_WORDS)
        at, text = at or moment(), found()
        time.sleep(POLL_SECONDS)
    return (None if text is None or at is None else max(time.time() - at, 0.0)), text or ""


class Drill(NamedTuple):
    """A fault that a run makes itself, and what is to come of it."""

    fault: str
    drill: str
    tells: str
    """The event's kind, or a fragment of the paragraph on standard error."""
    statuses: str
    ends: str
    flags: tuple[str, ...] = ()
    processes: int = 1


OTHER = "with other weights"  # of updates that were left out
DRILLS = {
    "nan": Drill("NaN gradient, once", "nan_gradient@25", "non_finite", "0", OTHER),
    "nans": Drill("NaN gradients, ten in a row", "nan_gradient@25-34", "rollback", "0", OTHER),
    "spike": Drill("loss spike", "loss_spike@45", "spike", "0", OTHER, ("--faults.spike_zscore=3",)),
    "bit": Drill("flipped bit in a weight", "flipped_bit@25", "rollback", "0", EQUAL),
    "hang": Drill("hang", "hang@25", "hang", "75, 0", EQUAL, (f"--faults.hang_seconds={HANG_SECONDS}",)),
    "killed": Drill("killed peer", "sigkill@25:1", "lost_peer", "75+-9, 0+0", EQUAL, processes=2),
    "first": Drill("killed process 0", "sigkill@25:0", "opendeep train: process", "-9+-6, 0+0", EQUAL, processes=2),
    "stopped": Drill("stopped peer", "sigstop@25:1", "lost_peer", "75+-9, 0+0", EQUAL, processes=2),
    "sigterm": Drill("SIGTERM to one of two", "sigterm@25:1", "preempted", "75+75, 0+0", EQUAL, processes=2),
}
"""Status -6 is how JAX ends a process whose coordinator is gone."""


def drilled(scene: Scene, name: str) -> Row:
    """A run with one of DRILLS."""
    fault, drill, tells, statuses, ends, flags, processes = DRILLS[name]
    workdir, flags = scene.directory / name, (*flags, "--faults.drill", drill)
    kind, _, place = drill.partition("@")
    job = scene.start(workdir, *flags, processes=processes)

    def moment() -> float | None:
        return begun(workdir, int(re.match(r"\d+", place)[0])) if kind in OF_THE_STEP else struck(workdir, kind)

    def found() -> str | None:
        return paragraph(workdir, tells, processes) if " " in tells else event(workdir, tells)

    after, text = watch(job, moment, found)
    if kind == "sigstop":  # it sleeps until someone ends it
        job[0].wait()
        job[1].kill()
    first = "+".join(str(process.wait()) for process in job)
    got = first if first == str(OK) else ", ".join([first, *scene.finish(workdir, *flags, processes=processes)])
    end, lines = scene.ends(workdir), read_jsonl(workdir / "metrics.jsonl")
    sound = after is not None and (got, end) == (statuses, ends) and lines[-1]["loss"] is not None
    return Row(fault, "paragraph" if " " in tells else f"event {tells}", after, got, end, sound, text)


def damaged(scene: Scene, name: str, fault: str, harm: Callable[[Path], None]) -> Row:
    """A run that is stopped, and the newest of whose checkpoints is harmed before it goes on."""
    workdir = scene.directory / name
    flags = ("--faults.drill", "sigterm@35")
    (first,) = scene.finish(workdir, *flags, starts=1)
    item = checkpoint_path(workdir) / "optimizer"
    harm(max((path for path in item.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
    at = time.time()
    job = scene.start(workdir, *flags)
    after, text = watch(job, lambda: at, lambda: event(workdir, "corrupt_checkpoint"))
    got, end = f"{first}, {job[0].wait()}", scene.ends(workdir)
    sound = after is not None and (got, end) == (f"{RESUME}, {OK}", EQUAL)
    return Row(fault, "event corrupt_checkpoint", after, got, end, sound, text)


def flip(file: Path) -> None:
    """Flips a bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def truncate(file: Path) -> None:
    """Cuts a file in half."""
    os.truncate(file, file.stat().st_size // 2)


def mounted(scene: Scene, name: str) -> Path | None:
    """A new file system of 300 MiB in memory; None where it cannot be mounted."""
    path = scene.directory / name
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "none", path], capture_output=True)
    return path if done.returncode == 0 else None


def full_disk(scene: Scene, name: str) -> Row | None:
    """A disk that something else fills up while the run trains, and that has space again later."""
    if (disk := mounted(scene, name)) is None:
        return None
    try:
        workdir, elsewhere = disk / "run", scene.directory / "full"
        job = scene.start(elsewhere, f"--workdir={workdir}")
        while steps_done(workdir) < 15 and not ended(job):
            time.sleep(POLL_SECONDS)
        with open(disk / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(bytes(65536)):
                pass
        at = time.time()
        after, text = watch(job, lambda: at, lambda: paragraph(elsewhere, "opendeep: "))
        first = job[0].wait()
        (disk / "ballast").unlink()
        got = ", ".join([str(first), *scene.finish(workdir)])
        end = scene.ends(workdir)
        sound = after is not None and (got, end) == (f"{MEND}, {OK}", EQUAL)
        return Row("full disk", "paragraph", after, got, end, sound, text)
    finally:
        subprocess.run(["umount", disk], check=True)


def read_only(scene: Scene, name: str) -> Row | None:
    """A work directory on a file system that may not be written."""
    if (disk := mounted(scene, name)) is None:
        return None
    try:
        shutil.copytree(scene.whole, disk / "run")
        (disk / "run" / "summary.json").unlink()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        at = time.time()
        job = scene.start(scene.directory / "refused", f"--workdir={disk / 'run'}")
        after, text = watch(job, lambda: at, lambda: paragraph(scene.directory / "refused", "opendeep: "))
        got, end = str(job[0].wait()), scene.ends(disk / "run")
        sound = after is not None and (got, end) == (str(MEND), EQUAL)
        return Row("read-only directory", "paragraph", after, got, end, sound, text)
    finally:
        subprocess.run(["umount", disk], check=True)


def two_runs(scene: Scene, name: str) -> Row:
    """The same command twice at the same time."""
    workdir = scene.directory / name
    job = scene.start(workdir)
    while steps_done(workdir) < 5 and not ended(job):
        time.sleep(POLL_SECONDS)
    at, other = time.time(), scene.directory / "second"
    second = scene.start(other, f"--workdir={workdir}")
    after, text = watch(second, lambda: at, lambda: paragraph(other, "another process is training there"))
    got, end = f"{second[0].wait()}", scene.ends(workdir) if job[0].wait() == OK else "ended too"
    sound = after is not None and (got, end) == (str(MEND), EQUAL)
    return Row("two runs in one directory", "paragraph", after, got, end, sound, text)


FAULTS: dict[str, Callable[[Scene, str], Row | None]] = {
    **dict.fromkeys(DRILLS, drilled),
    "byte": functools.partial(damaged, fault="flipped byte in a checkpoint", harm=flip),
    "truncated": functools.partial(damaged, fault="truncated file in a checkpoint", harm=truncate),
    "disk": full_disk,
    "readonly": read_only,
    "two": two_runs,
}
"""All faults by name. None comes of those that this machine does not let us make."""


def table(rows: Sequence[Row]) -> str:
    """The rows, aligned."""
    heads = ("fault", "found by", "after", "exit status", "ends", "")
    lines = [heads]
    for row in rows:
        after = "never" if row.after is None else f"{row.after:.2f} s"
        lines.append((row.fault, row.found_by, after, row.statuses, row.ends, "" if row.sound else "WRONG"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark from the command line; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(FAULTS), help=f"some of {','.join(FAULTS)}")
    parser.add_argument("--json", action="store_true", help="print JSON, with the paragraphs")
    parser.add_argument("--directory", default=None, help="where to write; a temporary directory by default")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        scene = Scene(Path(name).absolute())
        if scene.finish(scene.whole, starts=1) != [str(OK)]:
            raise SystemExit(f"the undisturbed run failed:\n{said(scene.whole)[-3000:]}")
        for fault in options.only.split(","):
            row = FAULTS[fault](scene, fault)
            if row is not None:
                rows.append(row)
                print(table([row]).splitlines()[1], file=sys.stderr, flush=True)
    print(json.dumps([row._asdict() for row in rows], indent=2) if options.json else table(rows))
    return int(not all(row.sound for row in rows))


if __name__ == "__main__":
    sys.exit(main())
