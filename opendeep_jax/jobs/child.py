"""A command as a child that does not outlive this process, and its share of the machine's cores and GPUs."""

import os
import shutil
import subprocess
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


def cores_of(place: int, count: int) -> set[int]:
    """Return the cores that one of `count` processes has to itself; empty, for all, where that cannot be said.

    XLA takes as many threads as it may use cores, and processes that all take all of them slow each other down.
    """
    if count == 1 or not hasattr(os, "sched_getaffinity"):
        return set()
    cores = sorted(os.sched_getaffinity(0))
    own = cores[place * len(cores) // count : (place + 1) * len(cores) // count]
    return set(own) or {cores[place % len(cores)]}


def gpus_of(place: int, count: int) -> dict[str, str]:
    """Return the environment that gives one of `count` processes its share of the GPUs; empty where there are none, or
    fewer than processes."""
    gpus = gpus_here()
    each = len(gpus) // count
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[place * each : (place + 1) * each])} if each else {}


def gpus_here() -> list[str]:
    """Return the GPUs that JAX would use, as CUDA_VISIBLE_DEVICES names them."""
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return [str(index) for index, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]
