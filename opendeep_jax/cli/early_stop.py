"""SIGTERM and Ctrl-C outside the training loop: while a run starts, compiles, or ends.

Python's own handlers run between two lines of the main thread, which a compilation may not reach for half an hour. So
a thread hears of the signal through a pipe, says a line, and ends the process if it does not end by itself.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from opendeep_jax.cli.starts import exclude_from_count
from opendeep_jax.config.exits import INTERRUPTED, RESUME

UNWIND_SECONDS = 5.0
"""Seconds from the message to the end, for the main thread to clean up."""
STATUSES = {signal.SIGTERM: RESUME, signal.SIGINT: INTERRUPTED}


class EarlyStop(KeyboardInterrupt):
    """Exception that unwinds the main thread after a signal whose message is already printed."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


@contextlib.contextmanager
def early_stops(exit: Callable[[int], None] = os._exit) -> Iterator[None]:
    """End the process with status RESUME at SIGTERM and INTERRUPTED at Ctrl-C, within a few seconds and with a message.
    `faults/interrupt.py` takes over while there are steps. Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    printed = threading.Lock()

    def announce(number: int) -> None:
        """Print the message once, from whichever thread is first."""
        if printed.acquire(blocking=False):
            name, status = signal.Signals(number).name, STATUSES[number]
            os.write(2, f"\nopendeep train: {note(name, status)}\n".encode())

    def unwind(number, frame):
        announce(number)
        raise EarlyStop(STATUSES[number])

    def listen() -> None:
        while (received := os.read(reader, 1)) and received[0] not in STATUSES:
            pass
        if received:
            announce(received[0])
            exclude_from_count()
            time.sleep(UNWIND_SECONDS)
            exit(STATUSES[received[0]])
        os.close(reader)

    armed = [True]

    # The signals of a forked child are not this process's: a pool ends its workers by SIGTERM.
    def hold_back() -> None:
        if armed:
            signal.pthread_sigmask(signal.SIG_BLOCK, STATUSES)

    def let_in() -> None:
        if armed:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STATUSES)

    def in_the_child() -> None:
        if armed:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            let_in()

    os.register_at_fork(before=hold_back, after_in_parent=let_in, after_in_child=in_the_child)
    waker = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, unwind) for number in STATUSES}
    threading.Thread(target=listen, name="early stops", daemon=True).start()
    try:
        yield
    finally:
        armed.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(waker)
        os.close(writer)  # which ends the thread


def note(name: str, status: int) -> str:
    """Return the message for a signal that arrives between steps."""
    return f"stopped by {name} between steps. Nothing is lost: give the same command to go on (exit status {status})."
