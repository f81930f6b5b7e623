"""Messages for the minutes that XLA compiles: what it compiles, for how long, and how long that took last time."""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlib import utils

from opendeep_jax.config.files import write_atomically
from opendeep_jax.display.numbers import human_time
from opendeep_jax.record.files import read_object

TIMES_FILE = "compile_times.json"
SHORT_SECONDS = 2.0
"""Compilations up to this time print no second message."""
FATAL = 3


def print_once(text: str) -> None:
    """Print a line to standard output, at once."""
    print(text, flush=True)


@contextlib.contextmanager
def compiling(what: str, directory: str, key: object, say: Callable[[str], None] | None = print_once) -> Iterator[None]:
    """Say that `what` is compiled while the block runs, and how long that took; on a terminal with a running clock.

    Args:
        what: is compiled, in words.
        directory: keeps the time for the next start, beside the compiled programs; empty keeps nothing.
        key: what the time depends on, by its `repr`.
        say: takes each line; None says nothing, as the other processes of a job do, and keeps nothing.
    """
    times = Times(directory if say else "", key)
    text = f"compiling {what}" + (f"; it took {human_time(times.last)} last time" if times.last else "")
    begin = time.perf_counter()
    with _clock(text, say), quiet_alarms():
        yield
    seconds = time.perf_counter() - begin
    if say and seconds > SHORT_SECONDS:
        say(f"compiled in {human_time(seconds)}")
    times.keep(seconds)


@contextlib.contextmanager
def _clock(text: str, say: Callable[[str], None] | None) -> Iterator[None]:
    """A line with a running clock on a terminal that is free for one, else a plain line."""
    if say is not print_once or not sys.stdout.isatty():
        if say:
            say(text)
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn("line"), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=Console(highlight=False)) as progress:
        progress.add_task(text, total=None)
        yield


@contextlib.contextmanager
def quiet_alarms() -> Iterator[None]:
    """Keep XLA's alarms about slow compilation, which ask to file a bug, from the terminal; errors raise all the same.

    A user who has asked for XLA's log, with TF_CPP_MIN_LOG_LEVEL=0, gets it.
    """
    before = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1")
    if before not in ("1", "2"):
        yield
        return
    utils.absl_set_min_log_level(FATAL)
    try:
        yield
    finally:
        utils.absl_set_min_log_level(int(before))


class Times:
    """Record of how long a program took to compile the last time, in a file beside the compiled programs.

    Args:
        directory: of the file; empty keeps nothing.
        key: what the time depends on, by its `repr`.
    """

    def __init__(self, directory: str, key: object):
        self.path = Path(directory, TIMES_FILE) if directory else None
        self.name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        last = self._read().get(self.name)
        self.last = last if isinstance(last, int | float) and last > 0 else None
        """Seconds, or None where nothing is known."""

    def keep(self, seconds: float) -> None:
        """Write it down. A disk that does not take it costs the record, never the run."""
        if self.path:
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.path, json.dumps(self._read() | {self.name: round(seconds, 2)}, indent=2) + "\n")

    def _read(self) -> dict:
        return read_object(self.path) if self.path else {}
