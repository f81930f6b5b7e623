"""How XLA compiles in the tests, and in the processes that they start. Imports nothing: JAX comes after it."""

QUICK = ("xla_backend_optimization_level=0", "xla_cpu_use_fusion_emitters=false")
"""Nearly all the time of these tests is compiling: without effort, and by the emitters that write a fusion as LLVM code
at once instead of through MLIR, XLA compiles a step in a quarter of the time."""


def xla_flags(devices: int) -> str:
    """Return the XLA_FLAGS of a process on so many devices."""
    return " ".join(f"--{flag}" for flag in (f"xla_force_host_platform_device_count={devices}", *QUICK))
