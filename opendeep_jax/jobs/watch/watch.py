"""`opendeep watch`: find runs, look at them every few seconds, and show them in the terminal and on a page."""

import contextlib
import glob
import os
import select
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import write_atomically
from opendeep_jax.record.files import DATA
from opendeep_jax.record.run_view import FILES, RunView


def find_runs(places: Sequence[str]) -> list[Path]:
    """Return the directories of runs, in the order of `places`: runs, directories of runs (also a sweep's), and globs.

    A directory that holds no run yet counts as one that is about to begin.

    Raises:
        ConfigError: for a place that is not there.
    """
    found: dict[Path, None] = {}
    for place in places:
        matches = [place] if os.path.isdir(place) else sorted(filter(os.path.isdir, glob.glob(place, recursive=True)))
        if not matches:
            raise ConfigError(
                f"--workdir={place}: there is no such directory. Give a run's, such as --workdir=runs/quickstart, a "
                "sweep's, or a pattern in quotes, such as --workdir='runs/*'."
            )
        below = [match for path in map(Path, matches) for match in _runs_in(path)]
        found |= dict.fromkeys(below or map(Path, matches))
    return list(found)


def _runs_in(path: Path) -> list[Path]:
    if _is_run(path):
        return [path]
    try:
        inside = sorted(child for folder in (path / "runs", path) if folder.is_dir() for child in folder.iterdir())
    except OSError:
        return []
    return [child for child in inside if child.is_dir() and _is_run(child)]


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in FILES if name != DATA)


def labels(runs: Sequence[RunView]) -> list[str]:
    """Return a name for each run that no other has: its own, else its directory's, else its whole path.

    What all begin with, as far as a slash, and what all have between commas, is left out: of a sweep's runs,
    `quickstart/learning_rate=0.001,seed=0` may be `seed=0`.
    """
    for name in (lambda run: run.name, lambda run: run.workdir.name, lambda run: str(run.workdir)):
        names = [name(run) for run in runs]
        if len(set(names)) == len(names):
            break
    if len(names) > 1:
        shared = os.path.commonprefix(names).rpartition("/")
        parts = [name.removeprefix(shared[0] + shared[1]).split(",") for name in names]
        if len(set(map(len, parts))) == 1:
            differing = [column for column in zip(*parts, strict=True) if len(set(column)) > 1]
            parts = list(zip(*differing, strict=True)) or parts
        names = [",".join(part) for part in parts]
    return names


class Watch:
    """The runs at `places`, and what is known of each; new ones are found at every refresh.

    Args:
        places: as `find_runs` takes them.
        details: of a single run, keep all that its report shows.
    """

    def __init__(self, places: Sequence[str], details: bool = False):
        self.places, self.details, self._runs = places, details, {}
        self.refresh()

    def refresh(self) -> list[RunView]:
        """Take in what is new; return the runs there are. Raises ConfigError as `find_runs` does, the first time."""
        try:
            found = find_runs(self.places)
        except ConfigError:
            if not self._runs:
                raise
            found = list(self._runs)  # a directory that went away meanwhile
        details = self.details and len(found) == 1
        known = {path: run for path, run in self._runs.items() if run.details == details}
        self._runs = {path: known.get(path) or RunView(path, details) for path in found}
        return [run.refresh() for run in self._runs.values()]


def watch(places: Sequence[str], every: float = 2.0, once: bool = False, page: str = "") -> None:
    """Show the runs at `places` until q or Ctrl-C; one frame, where `once` or not on a terminal.

    Args:
        places: directories and patterns, as `find_runs` takes them.
        every: seconds between looks.
        once: one frame only.
        page: file of an HTML page, the report of one run or of several over each other, that is written at each look
            and reloads itself while a run goes on. With it, a program that has no terminal goes on too, until all runs
            are finished. Drawing it takes at most a tenth of the time: the page of many runs is written less often.
    Raises:
        ConfigError: for a place that is not there.
        OSError: where the page cannot be written.
    """
    from rich.console import Console
    from rich.live import Live

    from opendeep_jax.jobs.watch.terminal import frame

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a name must not end the watch where the encoding lacks its letters
    watched, console = Watch(places, details=bool(page)), Console(highlight=False)
    due = 0.0

    def refresh() -> list[RunView]:
        nonlocal due
        runs, begin = watched.refresh(), time.monotonic()
        over = all(run.is_finished for run in runs)
        if page and (begin >= due or over):
            from opendeep_jax.record.report import live_page  # matplotlib takes a while

            write_atomically(page, live_page(runs, labels(runs), every))
            due = time.monotonic() + 9 * (time.monotonic() - begin)
        return runs

    runs = refresh()
    if once or not (console.is_terminal or page):
        console.print(frame(runs, labels(runs), console))
    elif not console.is_terminal:
        print(f"page: {page}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while not all(run.is_finished for run in runs):
                time.sleep(every)
                runs = refresh()
    else:
        with Live(console=console, screen=True, auto_refresh=False) as live, _keys() as pressed:
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    live.update(frame(runs, labels(runs), console), refresh=True)
                    if pressed(every):
                        break
                    runs = refresh()
        console.print(frame(runs, labels(runs), console))  # stays to be read when the screen is gone


@contextlib.contextmanager
def _keys() -> Iterator:
    """Give a function that waits so many seconds and says whether q was pressed; put the terminal back at the end."""
    import termios
    import tty

    try:
        stdin = sys.stdin.fileno()
        before = termios.tcgetattr(stdin)
    except (OSError, ValueError, termios.error):  # input that is no terminal
        yield lambda seconds: time.sleep(seconds)
        return

    def pressed(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([stdin], [], [], left)[0]:
                key = os.read(stdin, 1)
                if key in (b"q", b"Q", b""):
                    return True
        return False

    try:
        tty.setcbreak(stdin)
        yield pressed
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
