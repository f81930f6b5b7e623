"""What places call the chips that we know (`parallel/chips.py`), and how many of a slice's chips one machine has."""

import re

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.parallel.chips import CHIPS, GB, Chip
from opendeep_jax.plan.topology import GPUS_PER_NODE, Topology, parse_topology

NOT_PLANNED = {
    "a100": Chip("a100", "gpu", 312e12, 312e12, 80.7e9, 2039 * GB, 300 * GB, 25 * GB, 1.50, "a100"),
    "gb200": Chip("gb200", "gpu", 2500e12, 5000e12, 176.0e9, 8000 * GB, 900 * GB, 50 * GB, 4.50, "gb200"),
}
"""Chips that runs are started on, and that `opendeep plan` has no compiler's description of."""
GPUS_OF_NODES = {"a100": (8, 4, 16), "h100": (8, 4), "h800": (8,), "h200": (8, 4), "b200": (8, 4), "gb200": (4,)}
"""GPUs that a node has, where such nodes are sold; the usual first. GB200: a node is one of the 18 trays of a rack."""

GKE_ACCELERATORS = {
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "v7x": "tpu7x",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
"""Values of cloud.google.com/gke-tpu-accelerator and gke-accelerator. GKE's H100 machines reach each other through a
daemon beside every pod (GPUDirect-TCPX), which our template does not have; its eight networks are those of nodes with
eight GPUs."""

TPU_VM_TYPES = {
    "v5e": ("v5litepod", "v2-alpha-tpuv5-lite", 1),
    "v5p": ("v5p", "v2-alpha-tpuv5", 2),
    "v6e": ("v6e", "v2-alpha-tpuv6e", 1),
}
"""For --accelerator-type of `gcloud compute tpus`: its first word, the --runtime-version that goes with it, and what it
counts for a chip (v5p: both cores). The shape of so many is Google's choice. v7x is had through GKE alone."""

SKYPILOT_ACCELERATORS = {
    "a100": "A100-80GB",
    "h100": "H100",
    "h200": "H200",
    "b200": "B200",
    "gb200": "GB200",
}


def parse_cluster(text: str) -> Topology:
    """The cluster that a name asks for: as `opendeep plan` takes it, and nodes of GPUS_OF_NODES.

    Raises ConfigError as `plan.topology.parse_topology` does, and for nodes that nobody sells.
    """
    match = re.fullmatch(r"([A-Za-z]\w*):(\d+)x(\d+)", text.strip())
    word = match[1].lower() if match else ""
    if word not in GPUS_OF_NODES or (word in CHIPS and int(match[3]) == GPUS_PER_NODE):
        return parse_topology(text)
    nodes, gpus = int(match[2]), int(match[3])
    if nodes < 1 or gpus not in GPUS_OF_NODES[word]:
        sizes = " or ".join(map(str, sorted(GPUS_OF_NODES[word])))
        raise ConfigError(
            f"--topology={text}: a node of {word} has {sizes} GPUs. Write nodes x GPUs, such as "
            f"{word}:{max(1, -(-nodes * gpus // GPUS_OF_NODES[word][0]))}x{GPUS_OF_NODES[word][0]}."
        )
    return Topology(text, {**CHIPS, **NOT_PLANNED}[word], (gpus,), nodes)


def chips_per_host(topology: Topology) -> int:
    """Chips of one machine of a TPU slice: four, or all of a flat slice of up to eight."""
    slice_chips = topology.chips // topology.slices
    return slice_chips if topology.chip.torus_dimensions == 2 and slice_chips <= 8 else 4
