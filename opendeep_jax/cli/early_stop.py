"""SIGTERM and Ctrl-C where the training loop does not look after them: while a run starts, compiles, or ends.

Python's own handlers run between two lines of the main thread, which a compilation may not reach for half an hour. So
a thread hears of the signal through a pipe, says a line, and ends the process if it does not end by itself.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from opendeep_jax.cli.starts import told_to_stop
from opendeep_jax.config.exits import INTERRUPTED, RESUME

UNWIND_SECONDS = 5.0
"""From the line to the end, for what the main thread may still put away."""
STATUSES = {signal.SIGTERM: RESUME, signal.SIGINT: INTERRUPTED}


class EarlyStop(KeyboardInterrupt):
    """Unwinds the main thread after a signal, of which the line is already said."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


@contextlib.contextmanager
def early_stops(exit: Callable[[int], None] = os._exit) -> Iterator[None]:
    """Inside, SIGTERM ends the process with status RESUME and Ctrl-C with INTERRUPTED, within a few seconds and with a
    line that says so. `train/interrupt.py` takes over while there are steps. Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def unwind(number, frame):
        raise EarlyStop(STATUSES[number])

    def listen() -> None:
        while (heard := os.read(reader, 1)) and heard[0] not in STATUSES:
            pass
        if not heard:
            return
        name, status = signal.Signals(heard[0]).name, STATUSES[heard[0]]
        os.write(2, f"\nopendeep train: {note(name, status)}\n".encode())
        told_to_stop()
        time.sleep(UNWIND_SECONDS)
        exit(status)

    waker = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, unwind) for number in STATUSES}
    threading.Thread(target=listen, name="early stops", daemon=True).start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(waker)
        os.close(writer)  # which ends the thread


def note(name: str, status: int) -> str:
    """The line for a signal that came when no step was under way."""
    return f"stopped by {name} between steps. Nothing is lost: give the same command to go on (exit status {status})."
