"""Limits on the blocks of kernels for each chip: its shared memory or vector memory, its cores. Standard library only.

The rest of what is known of a chip, for plans and rooflines, is in the project's own table.
"""

from typing import NamedTuple

KIB, MIB = 2**10, 2**20


class OnChip(NamedTuple):
    """Facts of one chip."""

    memory: int
    """Bytes that a kernel may fill: shared memory of one block (GPU), or vector memory of a TensorCore (TPU)."""
    generation: int = 0
    """The major number of a GPU's compute capability: 9 brought matrix products from shared memory, 10 tensor memory.
    0 for TPUs."""
    cores: int = 1
    """TensorCores that work as one device and share a kernel's columns."""
    matrix: int = 128
    """Rows and columns of a TPU's matrix unit."""


CHIPS = {
    "v5e": OnChip(128 * MIB),
    "v5p": OnChip(64 * MIB, cores=2),
    "v6e": OnChip(128 * MIB, matrix=256),
    "v7x": OnChip(64 * MIB, matrix=256),
    "a100": OnChip(163 * KIB, 8),
    "h100": OnChip(227 * KIB, 9),
    "h200": OnChip(227 * KIB, 9),
    "b200": OnChip(227 * KIB, 10),
    "gb200": OnChip(227 * KIB, 10),
}
"""Chips by name (`target.chip`)."""

UNKNOWN = {"gpu": OnChip(99 * KIB, 8), "tpu": OnChip(64 * MIB)}
"""Limits for unlisted chips and for interpreted kernels, by the kernel's platform: those of the smallest chips."""

DEVICE_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "v7x",
    "NVIDIA A100": "a100",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA GH200": "h200",
    "NVIDIA H800": "h100",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
}
"""Our name of each chip, by how JAX's `device_kind` begins."""
