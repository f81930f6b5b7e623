"""Reads how libtpu scheduled a TPU kernel, with no TPU: its final instruction bundles, loop by loop.

A TPU core issues one bundle a cycle if nothing stalls. What is counted here leaves out what a schedule can't know:
waits for copies, conflicts in memory, scalar loads that miss. So it compares kernels, and bounds them from below.
"""

import dataclasses
import math
import os
import re
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Core:
    """One TensorCore. Its clock follows from the chip's published peak."""

    topology: str
    """Smallest one that libtpu compiles for."""
    cores: int
    """TensorCores that work as one device."""
    matrix_units: int
    matmul_cycles: int
    """Cycles that a unit needs for one vmatmul of 16 bfloat16 rows."""
    array: int
    """Rows and columns of a matrix unit."""
    gigahertz: float
    memory_bandwidth: float
    """Bytes per second that one core has to itself."""

    @property
    def flops_per_cycle(self) -> float:
        """At the matrix units' peak, in bfloat16."""
        return self.matrix_units * 2 * 16 * self.array**2 / self.matmul_cycles


CORES = {
    "v5e": Core("v5e:2x2", 1, 4, 16, 128, 1.503, 819e9),
    "v5p": Core("v5p:2x2x1", 2, 4, 16, 128, 1.751, 2765e9 / 2),
    "v6e": Core("v6e:2x2", 1, 2, 8, 256, 1.751, 1640e9),
    "v7x": Core("tpu7x:2x2x1", 1, 2, 8, 256, 2.200, 7380e9 / 2),
}

BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2}\s*)?:\s*>*\s*\{")
START = re.compile(r"Start(?:/End empty)? region (\d+)")
BRANCH = re.compile(r"sbr\.\w+ (?:\([^)]*\) )?target = \$region(\d+)")
DELAY = {"v5e": 4, "v5p": 4, "v6e": 4, "v7x": 6}
"""Bundles that still run after one with a branch."""


@dataclasses.dataclass
class Loop:
    """A loop of a kernel's schedule; the whole kernel is one, too."""

    bundles: int = 0
    """In one iteration, all branches counted, loops inside not."""
    matmuls: int = 0
    """vmatmul instructions among them."""
    inner: list["Loop"] = dataclasses.field(default_factory=list)

    def chain(self) -> list["Loop"]:
        """This loop and those inside it, down to the innermost that holds most matmuls."""
        inside = max(self.inner, key=lambda loop: loop.all_matmuls(), default=None)
        return [self, *(inside.chain() if inside and inside.all_matmuls() else [])]

    def all_matmuls(self) -> int:
        """In this loop and, once each, in those inside."""
        return self.matmuls + sum(loop.all_matmuls() for loop in self.inner)

    def cycles(self, core: Core) -> float:
        """Of one iteration without the loops inside: its bundles, or what the matrix units need if that is more."""
        return max(self.bundles, self.matmuls * core.matmul_cycles / core.matrix_units)


def read_loops(schedule: str, chip: str) -> Loop:
    """The loops of a `final_bundles` file: from a region's start to the last branch back to it."""
    bundles = []
    for line in schedule.splitlines():
        if BUNDLE.match(line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += line
    starts, ends = {}, {}
    for index, text in enumerate(bundles):
        starts |= {region: index for region in START.findall(text) if region not in starts}
        for region in BRANCH.findall(text):
            if starts.get(region, math.inf) <= index:
                ends[starts[region]] = min(index + DELAY[chip], len(bundles) - 1)
    whole = Loop()
    open_loops = [(len(bundles), whole)]
    for index, text in enumerate(bundles):
        while open_loops[-1][0] < index:
            open_loops.pop()
        if index in ends:
            loop = Loop()
            open_loops[-1][1].inner.append(loop)
            open_loops.append((ends[index], loop))
        open_loops[-1][1].bundles += 1
        open_loops[-1][1].matmuls += text.count("= vmatmul")
    return whole


def dump_flags(directory: str) -> str:
    """LIBTPU_INIT_ARGS that make libtpu write the final schedule of what it compiles into a directory."""
    return " ".join(
        [
            f"--xla_jf_dump_to={directory}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_html=false",
            "--xla_jf_dump_llo_pass_label_regex=.*final.*",
            "--xla_jf_emit_annotations=true",
            "--xla_jf_debug_level=2",
        ]
    )


def environment(directory: str) -> dict[str, str]:
    """The environment of a process that compiles for TPUs that aren't there, and dumps their schedules."""
    ours = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return {**os.environ, **ours, "LIBTPU_INIT_ARGS": dump_flags(directory)}


def find_schedule(directory: str, kernel: str) -> str:
    """The dumped schedule of the kernel of this name."""
    files = [f for f in Path(directory).glob(f"*-{kernel}*-final_bundles.txt") if "analysis" not in f.name]
    if not files:
        raise FileNotFoundError(f"{directory}: no schedule of {kernel}.")
    return files[0].read_text(errors="replace")


def spills(directory: str, kernel: str) -> tuple[int, int]:
    """Registers that the kernel of this name stores to memory for want of room, and loads again."""
    file = next(Path(directory).glob(f"*-{kernel}*-per-bundle-utilization.txt"))
    _, header, _, _, *rows = file.read_text().splitlines()
    names = [name.strip() for name in header.split(",")]
    columns = list(zip(*(map(int, row.split()) for row in rows if row.strip()), strict=True))
    return tuple(sum(columns[names.index(name)]) for name in ("VSTORE:SPILL", "VLOAD:FILL"))
