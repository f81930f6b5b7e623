"""Progress on a terminal or in a log: the line of a training run, and bars over bytes or pieces."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator

from opendeep_jax.display.numbers import human_time


@contextlib.contextmanager
def progress_bar(
    title: str, total: int, show: bool | None = None, unit: str = "bytes", transient: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show a bar on the error stream, from the first advance on, and give the function that advances it.

    Args:
        title: before the bar.
        total: bytes or pieces; 0 where that is not known.
        show: whether to; None shows it on a terminal.
        unit: `bytes`, or `pieces`.
        transient: leave nothing of it behind.
    """
    from rich.console import Console

    console = Console(stderr=True, force_jupyter=False)
    if not (console.is_terminal if show is None else show):
        yield lambda size: None
        return
    from rich import progress

    done = progress.DownloadColumn(binary_units=True) if unit == "bytes" else progress.MofNCompleteColumn()
    columns = progress.TextColumn("{task.description}", markup=False), progress.BarColumn()
    columns += (done, progress.TimeRemainingColumn()) if total else (progress.TimeElapsedColumn(),)
    bar = progress.Progress(*columns, console=console, transient=transient)
    task = bar.add_task(title, total=total or None)

    def advance(size: int) -> None:
        bar.start()
        bar.advance(task, size)

    try:
        yield advance
        if bar.live.is_started:
            bar.update(task, total=total or 1, completed=total or 1)
    finally:
        if bar.live.is_started:
            bar.stop()


class LiveDisplay:
    """Context of a display that redraws itself on a terminal, and writes lines elsewhere.

    A terminal that misbehaves, a closed pipe or an odd encoding costs the display, never the run.

    Args:
        stream: where to write; standard output by default.
        quiet: show nothing.
    """

    def __init__(self, stream=None, quiet: bool = False):
        from rich.console import Console

        self._stream = stream or sys.stdout
        self._console = Console(file=self._stream, highlight=False)
        self._live, self._broken = None, quiet
        self._drawn_at = 0.0

    def __enter__(self):
        self._guard(self._start)
        return self

    def __exit__(self, *_):
        self._guard(self._stop)

    def message(self, text: str) -> None:
        """Print a text of its own above what redraws itself: a sample, an evaluation, a checkpoint."""
        self._guard(lambda: self._print(text))

    def _start(self, transient: bool = False) -> None:
        if self._console.is_interactive:
            from rich.live import Live

            self._live = Live(console=self._console, auto_refresh=False, transient=transient)
            self._live.start()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _print(self, text: str) -> None:
        from rich.text import Text

        if self._live is not None:
            self._console.print(Text(_printable(text, self._console.encoding)))
        else:  # rich would wrap lines at 80 columns
            self._stream.write(_printable(text, getattr(self._stream, "encoding", None)) + "\n")
            self._stream.flush()

    def _guard(self, action) -> None:
        if not self._broken:
            try:
                action()
            except Exception:
                self._broken = True


class ProgressLine(LiveDisplay):
    """One live line: step, loss, held-out bits per byte, tokens/s, MFU, time left.

    On a terminal the line redraws itself, at most a few times a second; elsewhere (a log file, CI) about forty aligned
    lines are printed over the whole run.

        with ProgressLine(total_steps=1000) as progress:
            progress.update(10, loss=8.1, tokens_per_second=2400.0, mfu=0.31)
            progress.message("a sample text")

    Args:
        total_steps: the last step of the run.
        start_step: the step training goes on from.
        stream: where to write; standard output by default.
        quiet: show nothing, as the other processes of a job do.
    """

    REDRAW_SECONDS = 0.25
    PLAIN_LINES = 40

    def __init__(self, total_steps: int, start_step: int = 0, stream=None, quiet: bool = False):
        super().__init__(stream, quiet)
        self.total, self.step, self.numbers = max(total_steps, 1), start_step, {}
        self._first = None  # (step, time) of the first finished step: later ones are free of compilation
        self._stride = max(1, math.ceil((self.total - start_step) / (self.PLAIN_LINES - 2)))
        self._plain_due = start_step + 1

    def update(self, step: int, **numbers: float) -> None:
        """Note that `step` is done. Numbers stay on the line until newer ones come: loss, held_out_bits_per_byte,
        tokens_per_second, mfu (a share of 1)."""
        now = time.perf_counter()
        self.step = step
        self.numbers.update(numbers)
        self._first = self._first or (step, now)
        if self._live is not None:
            if now - self._drawn_at >= self.REDRAW_SECONDS or step >= self.total:
                self._drawn_at = now
                self._guard(self._draw)
        elif numbers and (step >= self._plain_due or step >= self.total):
            self._plain_due = (step // self._stride + 1) * self._stride
            self._guard(lambda: self._print(self._plain_line()))

    def _start(self) -> None:
        super()._start()
        if self._live is not None:
            self._draw()

    def _stop(self) -> None:
        if self._live is not None:
            self._draw()
        super()._stop()

    def _draw(self) -> None:
        from rich.text import Text

        self._live.update(Text(self._live_line(), no_wrap=True, overflow="crop"), refresh=True)

    def _seconds_left(self) -> float | None:
        if self._first is None or self.step <= self._first[0]:
            return None
        seconds_per_step = (time.perf_counter() - self._first[1]) / (self.step - self._first[0])
        return seconds_per_step * (self.total - self.step)

    def _pieces(self) -> list[str]:
        """Return the line's parts, the most important first: a narrow terminal cuts the end."""
        left, held_out = self._seconds_left(), self.numbers.get("held_out_bits_per_byte")
        pieces = [f"loss {self.numbers['loss']:6.3f}" if "loss" in self.numbers else "loss    -  "]
        pieces.append(f"{'-' if left is None else human_time(left):>10} left")
        pieces.append(f"held-out {held_out:5.3f} bits/byte" if held_out is not None else "")
        if "tokens_per_second" in self.numbers:
            pieces.append(f"{self.numbers['tokens_per_second']:>9,.0f} tokens/s")
        if "mfu" in self.numbers:
            pieces.append(f"MFU {self.numbers['mfu']:6.1%}")
        return pieces

    def _plain_line(self) -> str:
        width = len(f"{self.total:,}")
        head = f"step {self.step:>{width},}/{self.total:,} {self.step / self.total:6.1%}"
        pieces = self._pieces()
        pieces[2] = f"{pieces[2]:<24}"
        return "  ".join([head, *pieces]).rstrip()

    def _live_line(self) -> str:
        done = min(self.step / self.total, 1.0)
        head, room = f"{done:4.0%}", self._console.width - 1
        pieces = [f"step {self.step:,}/{self.total:,}", *(" ".join(piece.split()) for piece in self._pieces() if piece)]
        while pieces and len("  ".join([head, *pieces])) > room:
            pieces.pop()
        bar = min(28, room - len("  ".join([head, *pieces])) - 2)
        full = round(done * bar)
        ink, blank = ("#", "-") if self._console.options.ascii_only else ("━", "╌")
        return "  ".join([head, *([ink * full + blank * (bar - full)] if bar >= 8 else []), *pieces])


def _printable(text: str, encoding: str | None) -> str:
    """Return the text without what would upset a terminal: control characters (a sample may hold escape sequences) and
    characters its encoding lacks."""
    clean = "".join(c if c in "\n\t" or c.isprintable() else "�" for c in text)
    return clean.encode(encoding or "utf-8", "replace").decode(encoding or "utf-8", "replace")
