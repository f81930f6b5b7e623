"""Detection of changes to the wall clock. No duration of a run depends on it; the times in its logs do."""

import time

from opendeep_jax.display.numbers import human_time

SMALLEST = 30.0
"""Seconds; what time servers correct little by little stays far below it between two lines of the log."""


class WallClock:
    """Comparison of the wall clock with the monotonic clock."""

    def __init__(self):
        self._ahead = _ahead()

    def jumped(self) -> str | None:
        """Return a sentence where the wall clock has jumped since the last call, or since this was made; else None."""
        before, self._ahead = self._ahead, _ahead()
        seconds = self._ahead - before
        if abs(seconds) < SMALLEST:
            return None
        way = "forward" if seconds > 0 else "back"
        cause = "it was set, or the machine slept" if seconds > 0 else "it was set"
        return (
            f"The wall clock went {way} by {human_time(abs(seconds))}: {cause}. The times of log lines do so, too; "
            "durations, speeds and the patience with other processes are of a clock that nothing sets."
        )


def _ahead() -> float:
    return time.time() - time.monotonic()
