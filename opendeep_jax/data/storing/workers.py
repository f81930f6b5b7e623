"""Jobs for several processes that never outlive their parent and pass an error on as it was.

They are fresh interpreters rather than forks, because the parent may run JAX's threads, and they are not
`multiprocessing`'s, because those import the user's script again, each of them.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from opendeep_jax.config.checks import ConfigError

START = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from opendeep_jax.data.storing.workers import _serve; _serve()"
)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    function: Callable,
    shared: tuple,
    jobs: Sequence[tuple],
    workers: int,
    advance: Callable[[int], None],
    keep_open: tuple[int, ...] = (),
) -> None:
    """Call `function(*shared, *job, advance)` for every job, each worker one at a time, in order of their start.

    With one worker all of it happens in this process. Otherwise `function` must be a module's own, `shared` and the
    jobs go through pickle, and file descriptors of `keep_open` stay open until the last worker has ended. The first
    error ends all workers, and is raised here; so does the end of this process, of whatever kind.

    Raises:
        ConfigError: when a worker is killed, usually for lack of memory; and whatever `function` raises.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            function(*shared, *job, advance)
        return
    events: queue.SimpleQueue = queue.SimpleQueue()
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    threads = []
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(min(workers, len(jobs))):
                process = stack.enter_context(_process(keep_open))
                arguments = (process, (function, shared), waiting, events)
                threads.append(threading.Thread(target=_drive, args=arguments, daemon=True))
                threads[-1].start()
            left = len(jobs)
            while left:
                kind, value = events.get()
                if kind == "advance":
                    advance(value)
                elif kind == "done":
                    left -= 1
                else:
                    raise value
    finally:
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def _process(keep_open: tuple[int, ...]) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-c", START],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=keep_open,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _drive(process: subprocess.Popen, work: tuple, waiting: queue.SimpleQueue, events: queue.SimpleQueue) -> None:
    """Give one worker jobs until none waits, and pass on its messages."""
    try:
        with process.stdin as sink, process.stdout as replies:
            _send(sink, sys.path)
            _send(sink, work)
            while True:
                _send(sink, waiting.get_nowait())
                kind = ""
                while kind != "done":
                    kind, value = pickle.load(replies)
                    events.put((kind, value))
    except queue.Empty:
        return
    except (EOFError, OSError):
        code = process.wait()
        events.put(
            (
                "error",
                ConfigError(
                    f"A worker process ended {f'by signal {-code}' if code < 0 else f'with exit code {code}'} in the "
                    "midst of its work, usually because memory ran out. What is finished is kept: run the same command "
                    "again, with fewer processes: --data.workers=1."
                ),
            )
        )
    except Exception as error:  # such as a job that cannot be pickled
        events.put(("error", error))


def _send(sink: BinaryIO, value: Any) -> None:
    pickle.dump(value, sink)
    sink.flush()


def _serve() -> None:
    """Serve jobs from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides.
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What libraries print must not end up among the replies.

    def listen() -> None:
        try:
            while True:
                jobs.put(pickle.load(sys.stdin.buffer))
        except EOFError:
            os._exit(0)  # The parent is done, or dead.
        except BaseException as error:
            jobs.put(error)

    def next_job() -> Any:
        job = jobs.get()
        if isinstance(job, BaseException):
            raise job
        return job

    threading.Thread(target=listen, daemon=True).start()
    try:
        function, shared = next_job()
        while True:
            function(*shared, *next_job(), lambda size: _send(replies, ("advance", size)))
            _send(replies, ("done", None))
    except BaseException as error:
        if not isinstance(error, ConfigError):
            error.add_note("In a worker process:\n" + traceback.format_exc())
        try:
            _send(replies, ("error", pickle.loads(pickle.dumps(error)) and error))
        except Exception:
            _send(replies, ("error", RuntimeError(f"In a worker process:\n{traceback.format_exc()}")))
    os._exit(1)  # Not sys.exit: the thread still waits for input, which an interpreter cannot end with.
