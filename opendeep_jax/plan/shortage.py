"""Shortages of resources in compilers' error messages, and their cures.

Each pattern is of words that the compilers gave when the thing was made to run short (`tests/plan/test_shortage.py`
keeps them). What is not in the table is passed on as it came.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

MEMORY, HOST = "memory", "host memory"
"""The device's own (HBM); and that of the machine that compiles."""
_ON_CHIP = (
    "It is memory inside the chip, which the blocks of one kernel fill: a smaller batch, accumulation or "
    "rematerialization change nothing of it. {kernel}"
)
_WINDOW = r"Scoped allocation with size (?P<needed>[\d.]+[KMG]?) and limit (?P<available>[\d.]+[KMG]?)"


class Shortage(NamedTuple):
    """Resource that was short."""

    resource: str
    """A key of CURES, or empty where the compiler's words are in no row of PATTERNS."""
    needed: float
    """Bytes (columns of tensor memory); nan where the compiler does not say."""
    available: float
    words: str
    """The compiler's own, shortened."""

    def sentence(self) -> str:
        """Return the compiler's refusal with its figures, and the cure."""
        if not self.resource:
            return f"The compiler refuses it, and says: {self.words}"
        unit = "columns" if self.resource == "tensor memory" else "bytes"
        figures = ""
        if self.needed == self.needed:
            figures = f": it asks for {self.needed:,.0f} {unit} and has {self.available:,.0f}"
        return (
            f"The compiler runs out of {self.resource}{figures}. {CURES[self.resource].format(kernel=self._kernel())}"
        )

    def _kernel(self) -> str:
        """The setting that replaces the kernel which the compiler names, or those of all kernels."""
        settings = {
            "attention": "--model.execution.attention=blocks",
            "grouped_matmul": "--model.execution.grouped_matmul=blocks",
            "cross_entropy": "--model.execution.cross_entropy=chunks",
        }
        names = {"flash_mla": "attention", "grouped_": "grouped_matmul", "cross_entropy": "cross_entropy"}
        named = [settings[setting] for name, setting in names.items() if name in self.words]
        return f"Use {' '.join(named or list(settings.values())[:2])}, which needs none."


PATTERNS = (
    (r"memory on HBM.*\((?P<needed>[\d.]+[KMGT])\) exceeds available HBM \((?P<available>[\d.]+[KMGT])\)", MEMORY),
    (r"Ran out of memory in memory space hbm. Used (?P<needed>[\d.]+[KMGT]) of (?P<available>[\d.]+[KMGT])", MEMORY),
    (r"Out of memory while trying to allocate (?P<needed>\d+)", MEMORY),
    (r"Shared memory size limit exceeded: requested (?P<needed>\d+), available: (?P<available>\d+)", "shared memory"),
    (r"available shared memory: smem_bytes=(?P<needed>\d+) > max_smem_bytes=(?P<available>\d+)", "shared memory"),
    (r"too much shared data \((?P<needed>0x\w+) bytes, (?P<available>0x\w+) max\)", "shared memory"),
    (r"Tensor memory size limit exceeded: requested (?P<needed>\d+), available: (?P<available>\d+)", "tensor memory"),
    (rf"in memory space vmem.*{_WINDOW}", "vector memory (VMEM)"),
    (rf"in memory space smem.*{_WINDOW}", "scalar memory (SMEM)"),
    (r"\(size=(?P<needed>\d+)\) would exceed memory \(size=(?P<available>\d+)\).*space=vmem", "vector memory (VMEM)"),
    (r"\(size=(?P<needed>\d+)\) would exceed memory \(size=(?P<available>\d+)\).*space=smem", "scalar memory (SMEM)"),
    (r"\(size=(?P<needed>\d+)\) would exceed memory \(size=(?P<available>\d+)\).*space=sflag", "semaphores"),
    (r"Ran out of memory in memory space vmem", "vector memory (VMEM)"),
    (r"Ran out of memory in memory space smem", "scalar memory (SMEM)"),
    (r"[Rr]egister allocation failed", "registers"),
    (r"std::bad_alloc|Cannot allocate memory", HOST),
)
"""Words of a compiler, with what it needs and what there is where it says so, and the resource; the first that is found
counts."""

CURES = {
    MEMORY: "",  # by arithmetic: `plan.memory.cures`
    "shared memory": _ON_CHIP,
    "tensor memory": _ON_CHIP,
    "registers": _ON_CHIP.replace("memory inside the chip, which", "what"),
    "vector memory (VMEM)": _ON_CHIP,
    "scalar memory (SMEM)": "It holds the tables that kernels read before they start, which grow with the rows of a "
    "device and the experts on it. Use fewer rows at a time (--rows_per_chip, --train.accumulation_steps) or more "
    "devices along the expert axis. {kernel}",
    "semaphores": _ON_CHIP,
    HOST: "That is the memory of the machine that compiles, not of the chips: use one with more, or end what else runs "
    "here.",
}
"""Cures for a shortage of each resource."""


def shortage_in(message: str) -> Shortage:
    """Return the shortage that a compiler's error reports."""
    words = message.split("See https://openxla.org")[0].split("context: [")[0].rstrip(" ,\n")[:1500]
    for pattern, resource in PATTERNS:
        found = re.search(pattern, message, re.DOTALL)
        if found:
            amounts = {"needed": "", "available": ""} | found.groupdict()
            return Shortage(resource, *(_bytes(amounts[name]) for name in ("needed", "available")), words)
    return Shortage("", float("nan"), float("nan"), words)


def _bytes(amount: str) -> float:
    """`128.00M`, `0x1c000` or `294912` as a number; nan for nothing."""
    if not amount:
        return float("nan")
    if amount.startswith("0x"):
        return float(int(amount, 16))
    if amount[-1] in "KMGT":
        return float(amount[:-1]) * 1024 ** (1 + "KMGT".index(amount[-1]))
    return float(amount)


_WATCH = """
import sys
if sys.stdin.buffer.read() != b"done":
    print(sys.argv[1], file=sys.stderr, flush=True)
"""


@contextmanager
def report_if_killed() -> Iterator[None]:
    """Run a second process in the block that reports the probable cause if this one is killed."""
    words = (
        "opendeep: this process was killed while it compiled, as Linux does to one that takes a machine's last memory. "
        f"If so: {CURES[HOST]}"
    )
    watcher = subprocess.Popen(
        [sys.executable, "-S", "-c", _WATCH, words], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        watcher.communicate(b"done")
