"""XLA's description of a GPU that is not attached."""

from typing import NamedTuple

from kernels_pallas.chips import CHIPS, KIB

_GPU_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {per_core} shared_memory_per_block_optin: {per_block}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{name}"
"""


class Gpu(NamedTuple):
    """Specification of one GPU."""

    name: str
    cores: int
    """Multiprocessors."""
    bandwidth: int
    """Bytes/s of its memory."""
    cache: int
    """Bytes of its L2 cache."""
    clock: float
    """GHz."""
    memory: int
    """Bytes."""


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 108, 2_039_000_000_000, 41_943_040, 1.41, 85_174_583_296),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 132, 3_352_320_000_000, 52_428_800, 1.98, 84_942_979_072),
    "h200": Gpu("NVIDIA H200", 132, 4_800_000_000_000, 52_428_800, 1.98, 150_754_820_096),
    "b200": Gpu("NVIDIA B200", 148, 8_000_000_000_000, 132_644_864, 1.965, 180_000_000_000),
    "gb200": Gpu("NVIDIA GB200", 152, 8_000_000_000_000, 132_644_864, 2.062, 186_000_000_000),
}
"""The H100's figures are what the device reports; those of the others are from their data sheets."""


def gpu_target(compiler_name: str, shared_memory: int = 0) -> str:
    """XLA's description (a GpuTargetConfig as text) of a GPU that is not attached.

    Args:
        shared_memory: bytes of it that a block may have; 0 for the chip's.
    """
    on_chip = CHIPS[compiler_name]
    per_block = shared_memory or on_chip.memory
    figures = GPUS[compiler_name]._asdict() | {"major": on_chip.generation}
    return _GPU_TARGET.format(**figures, per_block=per_block, per_core=per_block + KIB)
