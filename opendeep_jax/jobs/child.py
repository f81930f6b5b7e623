"""A command as a child that does not outlive this process, and has its own cores."""

import os
import sys
from collections.abc import Collection, Sequence

_BECOME = """
import ctypes, os, sys
parent, number, cores, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG, which stays over exec
if cores:
    os.sched_setaffinity(0, map(int, cores.split(",")))
if os.getppid() != int(parent):  # which died before prctl was there to notice
    os.kill(os.getpid(), int(number))
os.execvp(command[0], command)
"""


def child_command(command: Sequence[str], when_orphaned: int, cores: Collection[int] = ()) -> list[str]:
    """`command` behind a few lines of Python that take its cores, ask the kernel to signal it when this process dies,
    and then become it. Elsewhere than on Linux, the command itself.

    `preexec_fn` would do it too, and must not be used in a process that has threads.

    Args:
        when_orphaned: the signal.
        cores: those it may use; none for all.
    """
    if sys.platform != "linux":
        return list(command)
    place = str(os.getpid()), str(int(when_orphaned)), ",".join(map(str, sorted(cores)))
    return [sys.executable, "-S", "-c", _BECOME, *place, *command]
