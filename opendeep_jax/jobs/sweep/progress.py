"""Progress of a sweep: a live table on a terminal, a line for each run elsewhere."""

import time
from collections.abc import Sequence

from opendeep_jax.config.schedule import total_steps
from opendeep_jax.display.numbers import human_time
from opendeep_jax.display.progress import LiveDisplay
from opendeep_jax.jobs.sweep.plan import SweepRun
from opendeep_jax.jobs.sweep.results import read_result
from opendeep_jax.record.files import METRICS, last_record

REDRAW_SECONDS = 0.5


class SweepProgress(LiveDisplay):
    """Display of the runs under way.

    Args:
        runs: all that this command takes care of, those with a result too.
    """

    def __init__(self, runs: Sequence[SweepRun], stream=None):
        super().__init__(stream)
        self.total = len(runs)
        self.done = sum(read_result(run).state == "finished" for run in runs)
        self._begun: dict[str, float] = {}

    def __enter__(self):
        if self.done:
            self.message(f"{self.done} of {self.total} runs have their result already")
        return super().__enter__()

    def run_started(self, run: SweepRun) -> None:
        """Note that a run was started."""
        self._begun[run.name] = time.monotonic()
        if self._live is None:
            self.message(f"begun     {run.name}")

    def run_ended(self, run: SweepRun) -> None:
        """Note that a run has ended, well or not."""
        result = read_result(run)
        after = human_time(time.monotonic() - self._begun[run.name])
        if result.state != "finished":
            self.message(f"{result.state:<9} {run.name} after {after}: {result.reason.partition(chr(10))[0]}")
            return
        self.done += 1
        self.message(f"{self.done:>3}/{self.total:<5} {run.name} after {after}: {result.described()}")

    def show(self, running: Sequence[SweepRun]) -> None:
        """Draw the table of the runs under way, at most twice a second."""
        if self._live is not None and time.monotonic() - self._drawn_at >= REDRAW_SECONDS:
            self._drawn_at = time.monotonic()
            self._guard(lambda: self._live.update(self._table(running), refresh=True))

    def _start(self) -> None:
        if self._stream.isatty():  # a notebook's pipe is told to be a terminal
            super()._start(transient=True)

    def _table(self, running: Sequence[SweepRun]):
        from rich.table import Table

        table = Table(box=None, pad_edge=False, title=f"{self.done} of {self.total} runs done", title_justify="left")
        for heading in ("run", "step", "loss", "time"):
            table.add_column(heading, justify="left" if heading == "run" else "right", overflow="ellipsis")
        for run in running:
            record, steps = last_record(run.workdir / METRICS) or {}, total_steps(run.config)
            step, loss = record.get("step", 0), record.get("loss")
            shown = "-" if loss is None else f"{loss:.3f}"
            table.add_row(run.name, f"{step:,}/{steps:,}", shown, human_time(time.monotonic() - self._begun[run.name]))
        return table
