"""Set up this process: the platform that JAX looks for, when it began, how much it logs."""

import glob
import importlib.metadata
import importlib.util
import logging
import os
import sys
import time
from pathlib import Path

ACCELERATORS = {
    "cuda": ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvgpu"),
    "rocm": ("/dev/kfd",),
    "tpu": ("/dev/accel[0-9]*", "/dev/accel/*", "/dev/vfio/[0-9]*"),
}
"""Device files of the accelerators that JAX's own plugins drive; a container has only those that it was given."""
TPU_VENDOR = "0x1ae0"
OWN_PLUGINS = ("xla_cuda", "jax_cuda", "xla_rocm", "jax_rocm")


def choose_platform() -> None:
    """Set JAX_PLATFORMS=cpu on a machine without an accelerator. Call before JAX is imported.

    The plugins of CUDA and the TPU runtime, which planning and tests install, otherwise begin every command with a
    traceback about cuDNN and a page about TPU hosts. What the user has set stays, and so does JAX's own choice on a
    machine that has any accelerator, that may reach one over a network, or whose devices cannot be told.
    """
    named = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_FORCE_TPU_INIT", "PJRT_NAMES_AND_LIBRARY_PATHS")
    if sys.platform != "linux" or any(name in os.environ for name in named):
        return
    found = found_accelerators()
    if not found and not _foreign_plugins():
        os.environ["JAX_PLATFORMS"] = "cpu"
    elif "cuda" not in found:  # a TPU host with CUDA's plugin, which no library of NVIDIA's is there for
        bridge = logging.getLogger("jax._src.xla_bridge")
        bridge.addFilter(lambda record: "jax_plugins.xla_cuda" not in record.getMessage())


def found_accelerators() -> set[str]:
    """Return the names in ACCELERATORS of which this Linux machine shows a device."""
    found = {name for name, patterns in ACCELERATORS.items() if any(glob.glob(pattern) for pattern in patterns)}
    if any(_read(path).strip() == TPU_VENDOR for path in glob.glob("/sys/bus/pci/devices/*/vendor")):
        found.add("tpu")
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _foreign_plugins() -> bool:
    """Return whether JAX would load a plugin for devices that ACCELERATORS says nothing of."""
    names = [point.name for point in importlib.metadata.entry_points(group="jax_plugins")]
    if (package := importlib.util.find_spec("jax_plugins")) is not None:
        places = package.submodule_search_locations or ()
        names += [Path(path).name for place in places for path in glob.glob(f"{place}/*")]
    return any(not name.startswith((*OWN_PLUGINS, "_")) for name in names)


def process_start() -> float:
    """Return this process's start time on the clock of `time.perf_counter`: before the interpreter and its imports.

    Linux says so; elsewhere the processor time used so far, which an import mostly is, stands in for what has passed.
    """
    try:
        # The 22nd field, in ticks since boot; the 2nd is the program's name in brackets, which may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        age = time.process_time()
    return time.perf_counter() - age


def set_verbosity(verbosity: int) -> None:
    """Log level, in absl's numbers, of OpenDeep and of what logs through absl (Orbax, Grain).

    From 0 on Orbax tells of each checkpoint; below, it is silent, as its failures are raised as well.
    """
    import absl.logging
    from absl.logging.converter import absl_to_standard

    logging.basicConfig()
    absl.logging.set_verbosity(verbosity)
    logging.getLogger("opendeep_jax").setLevel(absl_to_standard(verbosity))
