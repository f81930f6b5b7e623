"""Stopping between two steps, where nothing is lost, and all processes of a job after the same one."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax

from opendeep_jax.config.exits import StopRequested
from opendeep_jax.parallel.distributed import get_value, put_first

STEPS_AHEAD = 2
"""Steps that a process may begin before an earlier one is done (`loop.py` waits): as far can processes be apart."""
NOTE = "\nStopping after this step and saving it. Again to stop at once, without the steps since the last checkpoint.\n"


class StopRequests:
    """Requests to stop that signals have made."""

    def __init__(self):
        self.signal: str | None = None
        self._last_step: int | None = None

    def after(self, step: int) -> bool:
        """Return whether the run is to stop after `step`, which has just begun.

        In a job of several processes a signal to any of them stops all, after a step that none has reached yet.
        """
        if jax.process_count() == 1:
            return self.signal is not None
        if self._last_step is None:
            if self.signal:
                agreed = put_first("stop", f"{self.signal} {step + 2 * STEPS_AHEAD}")
            else:
                agreed = get_value("stop")
            if agreed:
                self.signal, last = agreed.split()
                self._last_step = int(last)
        return self._last_step is not None and step >= self._last_step

    def end(self) -> Exception | KeyboardInterrupt:
        """Return the exception that ends the run after its save: KeyboardInterrupt or StopRequested."""
        if self.signal == "SIGINT":
            return KeyboardInterrupt()
        return StopRequested("stopped by SIGTERM, as before a preemption; the step at hand is saved.")


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Record the first Ctrl-C or SIGTERM in the block. Another one raises KeyboardInterrupt at once.

    A step gives its state's memory to the next one, so between two lines of the loop there may be no state to save.
    Threads other than the main one get no signals.
    """
    requests = StopRequests()

    def note(number, frame):
        if requests.signal:
            raise KeyboardInterrupt
        requests.signal = signal.Signals(number).name
        os.write(2, NOTE.encode())  # print is not safe inside a signal handler

    before, waker = {}, -1
    if threading.current_thread() is threading.main_thread():
        waker = signal.set_wakeup_fd(-1)  # cli/early_stop.py, which would not wait for the step
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if waker >= 0:
            signal.set_wakeup_fd(waker)
