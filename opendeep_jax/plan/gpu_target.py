"""What XLA has to know of a GPU that is not attached."""

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

GPUS = {
    "a100": dict(
        name="NVIDIA A100-SXM4-80GB",
        cores=108,
        bandwidth=2_039_000_000_000,
        cache=41_943_040,
        clock=1.41,
        memory=85_174_583_296,
        major=8,
    ),
    "h100": dict(
        name="NVIDIA H100 80GB HBM3",
        cores=132,
        bandwidth=3_352_320_000_000,
        cache=52_428_800,
        clock=1.98,
        memory=84_942_979_072,
        major=9,
    ),
    "h200": dict(
        name="NVIDIA H200",
        cores=132,
        bandwidth=4_800_000_000_000,
        cache=52_428_800,
        clock=1.98,
        memory=150_754_820_096,
        major=9,
    ),
    "b200": dict(
        name="NVIDIA B200",
        cores=148,
        bandwidth=8_000_000_000_000,
        cache=132_644_864,
        clock=1.965,
        memory=180_000_000_000,
        major=10,
    ),
    "gb200": dict(
        name="NVIDIA GB200",
        cores=152,
        bandwidth=8_000_000_000_000,
        cache=132_644_864,
        clock=2.062,
        memory=186_000_000_000,
        major=10,
    ),
}
"""The H100's figures are what the device reports; those of the others are from their data sheets."""


def gpu_target(compiler_name: str, shared_memory: int = 0) -> str:
    """XLA's description (a GpuTargetConfig as text) of a GPU that is not attached.

    Args:
        shared_memory: bytes of it that a block may have; 0 for the chip's.
    """
    per_block = shared_memory or CHIPS[compiler_name].memory
    return _GPU_TARGET.format(**GPUS[compiler_name], per_block=per_block, per_core=per_block + KIB)
