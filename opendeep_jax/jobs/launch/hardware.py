"""Names that clouds give to the chips of `parallel/chips.py`, and the number of a slice's chips per machine."""

from opendeep_jax.plan.topology import Topology

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
"""Parts of --accelerator-type for `gcloud compute tpus`: first word, matching --runtime-version, and what a chip
counts for (v5p: both cores). The shape of so many is Google's choice. v7x is had through GKE alone."""

SKYPILOT_ACCELERATORS = {
    "a100": "A100-80GB",
    "h100": "H100",
    "h200": "H200",
    "b200": "B200",
    "gb200": "GB200",
}


def chips_per_host(topology: Topology) -> int:
    """Chips of one machine of a TPU slice: four, or all of a flat slice of up to eight."""
    slice_chips = topology.chips // topology.slices
    return slice_chips if topology.chip.torus_dimensions == 2 and slice_chips <= 8 else 4
