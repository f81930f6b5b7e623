"""A line from a process that could not say it itself: killed for memory, or aborted by JAX as its coordinator is gone.

A small child process waits at the end of a pipe. When the pipe closes without a dismissal, it writes the notice.
"""

import subprocess
import sys
from collections.abc import Callable

_CHILD = """
import signal, socket, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
process, coordinator, host, stacks = sys.argv[1:]
if "dismissal" not in sys.stdin.read():
    name, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((name, int(port)), timeout=5).close()
        why = "killed from outside (for its memory, perhaps), or it crashed"
    except OSError:
        why = f"process 0 on {host}, which holds the job together, is gone, and JAX aborts the others then"
    sys.stderr.write(
        f"\\nopendeep train: process {process} has ended without a word: {why}. Nothing that was saved is lost: "
        f"start the same command again. If it could still write its stacks, they are in {stacks}.\\n"
    )
"""


def install_exit_notice(process: int, coordinator: str, host: str, stacks: str) -> Callable[[], None]:
    """Explain a sudden death of this process on standard error; return a function that cancels this.

    Args:
        process: this process's number.
        coordinator: host:port of process 0.
        host: the machine that process 0 runs on.
        stacks: the file that this process's stacks go to.
    """
    command = [sys.executable, "-S", "-c", _CHILD, str(process), coordinator, host, stacks]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)

    def dismissal() -> None:
        if child.poll() is None:
            child.communicate(b"dismissal")

    return dismissal
