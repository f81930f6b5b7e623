"""Peak speed of a CPU, measured, as no data sheet has it: quickly, and right on a machine that is busy with other work.

Short tries fit between what other processes do, the fastest of many is the one that nobody disturbed, and the best that
a kind of machine ever reached is kept beside the compiled programs: one start on an idle machine corrects all later.
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from opendeep_jax.config.files import write_atomically
from opendeep_jax.record.files import read_object

PEAK_FILE = "cpu_peak.json"
SIZES = (512, 1024)
FIRST_SECONDS, SECONDS = 1.0, 0.2
"""Seconds of the first measurement of a kind of machine, and of later ones."""


def cpu_peak(directory: str) -> float:
    """Return the FLOP/s of all devices of this CPU: the best measured now or, by what `directory` keeps, before."""
    path, name = Path(directory, PEAK_FILE), machine_kind()
    kept = _read(path) if directory else {}
    best = _measured_here(SECONDS if name in kept else FIRST_SECONDS)
    if directory and best > kept.get(name, 0.0):
        with contextlib.suppress(OSError):  # no place to keep it: then it is measured again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(kept | {name: best}, indent=2) + "\n")
    return max(best, kept.get(name, 0.0))


@functools.cache
def _measured_here(seconds: float) -> float:
    return measured_matmul(seconds)


def measured_matmul(seconds: float = FIRST_SECONDS) -> float:
    """Return the FLOP/s of float32 matmuls of size³ on the first device, the best of many tries of each size."""
    product = jax.jit(jnp.matmul)
    squares = [jnp.ones((size, size), jnp.float32) for size in SIZES]
    for square in squares:
        product(square, square).block_until_ready()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        for size, square in zip(SIZES, squares, strict=True):
            begin = time.perf_counter()
            product(square, square).block_until_ready()
            best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def machine_kind() -> str:
    """Return what the speed of a CPU depends on: its model, the cores that this process may use, and the library."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        pairs = (line.partition(":")[::2] for line in lines if ":" in line)
        fields = {name.strip(): value.strip() for name, value in pairs}
        family = [fields[name] for name in ("cpu family", "model", "stepping") if name in fields]
        model = " ".join([fields.get("model name", model), *family])
    return f"{model}, {cores} cores, jaxlib {importlib.metadata.version('jaxlib')}"


def _read(path: Path) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in read_object(path).items() if 0 < float(value) < float("inf")}
    except (ValueError, TypeError):
        return {}
