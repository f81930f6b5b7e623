"""Stopping between two steps, where nothing is lost."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

NOTE = "\nStopping after this step and saving it. Again to stop at once, without the steps since the last checkpoint.\n"


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C or SIGTERM is only noted: the function given back then says True. Another one raises
    KeyboardInterrupt at once.

    A step gives its state's memory to the next one, so between two lines of the loop there may be no state to save.
    Threads other than the main one get no signals; there the function never says True.
    """
    received = []

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        os.write(2, NOTE.encode())  # print is not safe inside a signal handler

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
