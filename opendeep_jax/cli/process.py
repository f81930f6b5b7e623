"""What belongs to this process: when it began, and how much it logs."""

import logging
import os
import time
from pathlib import Path


def process_start() -> float:
    """When this process began, on the clock of `time.perf_counter`: before the interpreter and its imports.

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
