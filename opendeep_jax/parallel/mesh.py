"""The device mesh: five named axes, their sizes from the recipe."""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opendeep_jax.config.schema import ParallelConfig
from opendeep_jax.parallel.axes import BATCH_AXES

AXES = ("data", "fsdp", "expert", "context", "tensor")


def axis_sizes(parallel: ParallelConfig, device_count: int) -> tuple[int, ...]:
    """Sizes of AXES with -1 filled by the devices that the others leave (config.checks.check_devices has the rules)."""
    sizes = [getattr(parallel, axis) for axis in AXES]
    if -1 in sizes:
        sizes[sizes.index(-1)] = device_count // math.prod(size for size in sizes if size != -1)
    return tuple(sizes)


def make_mesh(parallel: ParallelConfig) -> Mesh:
    """The mesh over all devices of all processes; use it through `jax.set_mesh`."""
    sizes = axis_sizes(parallel, jax.device_count())
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows divided over all devices that have rows of their own."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put_batch(batch, mesh: Mesh):
    """A pytree of this process's rows as global arrays [B, …], each device holding its own rows."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
