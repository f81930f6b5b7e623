"""Names of clusters, such as `v5p:8x8x8`, to chips, networks and devices that need not exist.

    v5e:16x16      one slice of 256 TPU v5e       2*v5e:16x16   two of them, joined by the data-centre network
    v7x:4x4x4      64 chips, 128 devices          h100:256x8    256 nodes of eight GPUs
    gb200:18x4     a rack of 18 trays

Everything is checked before JAX is loaded.
"""

import importlib.util
import math
import re
from dataclasses import dataclass

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import did_you_mean
from opendeep_jax.parallel.chips import CHIPS, Chip
from opendeep_jax.plan.gpu_target import gpu_target

FLAT_SLICES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
"""Slices of the chips with a two-dimensional torus."""
SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
"""Slices of the chips with a three-dimensional torus that are smaller than its 4x4x4 cubes."""
GPUS_OF_NODES = {"a100": (8, 4, 16), "h100": (8, 4), "h800": (8,), "h200": (8, 4), "b200": (8, 4), "gb200": (4,)}
"""GPUs that a node has, where such nodes are sold; the usual first."""
JOINED_NODES = {"gb200": 18}
"""Nodes that one NVLink switch joins, where it joins several: the trays of a rack."""
MOST_CHIPS = {"v5p": 8960, "v7x": 9216}
ALIASES = {"tpu7x": "v7x", "ironwood": "v7x", "v5litepod": "v5e", "trillium": "v6e"}


@dataclass(frozen=True)
class Topology:
    """A cluster, for example `Topology("v5p:8x8x8", CHIPS["v5p"], (8, 8, 8), 1)`."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    """TPU: chips along each dimension of one slice's torus. GPU: (GPUs of a node,)."""
    slices: int
    """Slices (TPU), between which the data-centre network runs, or nodes (GPU)."""

    @property
    def chips(self) -> int:
        """All chips."""
        return math.prod(self.shape) * self.slices

    @property
    def device_count(self) -> int:
        """All devices as JAX counts them."""
        return self.chips * self.chip.cores

    @property
    def slice_devices(self) -> int:
        """Devices of one slice, or as many as one NVLink switch joins."""
        return self.device_count // self.slices * JOINED_NODES.get(self.chip.name, 1)

    def is_ring(self, dimension: int) -> bool:
        """Return whether a dimension of the torus closes: 16 chips (v5e, v6e), or whole cubes of 4x4x4 (v5p, v7x)."""
        if self.chip.torus_dimensions == 2:
            return self.shape[dimension] == 16
        return all(size % 4 == 0 for size in self.shape)


def parse_topology(text: str, slices: int = 0) -> Topology:
    """The cluster that a name asks for; `slices` above 0 says how many slices, as `2*` in front does.

    Raises ConfigError for what is no name, no chip, and no slice that is built.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?([A-Za-z]\w*):(\d+(?:x\d+)*)", text.strip())
    if not match:
        raise ConfigError(
            f"--topology={text}: is not the name of a cluster. Write chip:shape, such as v5p:8x8x8, v5e:16x16, "
            "2*v6e:16x16 for two slices, or h100:256x8 for 256 nodes of eight GPUs."
        )
    times, word, dimensions = match.groups()
    word = ALIASES.get(word.lower(), word.lower())
    if word not in CHIPS:
        raise ConfigError(
            f"--topology={text}: there is no chip {word}.{did_you_mean(word, list(CHIPS))} Chips: {', '.join(CHIPS)}."
        )
    if slices and times and int(times) != slices:
        raise ConfigError(f"--slices={slices}: --topology={text} says {times} slices. Give one of the two.")
    chip, shape = CHIPS[word], tuple(int(size) for size in dimensions.split("x"))
    count = slices or int(times or 1)
    if count < 1 or min(shape) < 1:
        raise ConfigError(f"--topology={text}: sizes and slices must be at least 1.")
    if chip.platform == "gpu":
        if times or slices:
            raise ConfigError(
                f"--topology={text}: GPU clusters have nodes, not slices. Write {word}:NODESx{GPUS_OF_NODES[word][0]}."
            )
        sizes = GPUS_OF_NODES[word]
        if len(shape) != 2 or shape[1] not in sizes:
            raise ConfigError(
                f"--topology={text}: a node of {word} has {' or '.join(map(str, sorted(sizes)))} GPUs. Write nodes x "
                f"GPUs, such as {word}:{max(1, -(-math.prod(shape) // sizes[0]))}x{sizes[0]}."
            )
        return Topology(text, chip, shape[1:], shape[0])
    _check_slice(text, chip, shape)
    return Topology(f"{count}*{chip.name}:{dimensions}" if count > 1 else text, chip, shape, count)


def _check_slice(text: str, chip: Chip, shape: tuple[int, ...]) -> None:
    name = "x".join(map(str, shape))
    if chip.torus_dimensions == 2:
        if name not in FLAT_SLICES:
            raise ConfigError(f"--topology={text}: {chip.name} has slices of {', '.join(FLAT_SLICES)} chips only.")
        return
    if name in SMALL_CUBES:
        return
    if len(shape) != 3 or any(size % 4 for size in shape):
        nearest = "x".join(str(max(4, 4 * round(size / 4))) for size in (*shape, 4, 4)[:3])
        raise ConfigError(
            f"--topology={text}: a slice of {chip.name} is {', '.join(SMALL_CUBES)}, or three multiples of 4, such as "
            f"{chip.name}:{nearest}."
        )
    if math.prod(shape) > MOST_CHIPS[chip.name]:
        raise ConfigError(
            f"--topology={text}: {math.prod(shape):,} chips, and a pod of {chip.name} has {MOST_CHIPS[chip.name]:,}. "
            "Use several slices, as in 2*v5p:8x8x8."
        )


def check_compiler(topology: Topology) -> None:
    """Raise ConfigError, naming the extra to install, where the chip's compiler is missing. JAX is not loaded."""
    module, extra = {"tpu": ("libtpu", "tpu-compiler"), "gpu": ("jax_cuda13_plugin", "gpu-compiler")}[
        topology.chip.platform
    ]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"--topology={topology.name}: the compiler for it is not installed ({module}). "
            f"It needs no accelerator: pip install 'opendeep-jax[{extra}]'"
        )


def compile_only_devices(topology: Topology) -> list:
    """The cluster's devices: a program can be compiled for them, not run. Raises ConfigError as libtpu refuses it."""
    from jax.experimental import topologies

    chip, dimensions = topology.chip, "x".join(map(str, topology.shape))
    if chip.platform == "gpu":
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name=chip.compiler_name,
            topology=f"{topology.slices}x1x{dimensions}",  # nodes, hosts in each, devices of a host
            target_config=gpu_target(chip.compiler_name),
        )
        return list(described.devices)
    several = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.compiler_name}:{dimensions}", **several
        )
    except Exception as error:  # whatever libtpu says of a slice is the answer to the name
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--topology={topology.name}: the compiler refuses it ({reason}). Try another one."
        ) from error
    return list(found.devices)
