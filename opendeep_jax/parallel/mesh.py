"""The device mesh: named axes, their sizes from the recipe, laid so that the busiest axes have the fastest links."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opendeep_jax.config.rules import MESH_AXES, axis_sizes
from opendeep_jax.config.schedule import padded_rows
from opendeep_jax.config.schema import ParallelConfig, RunConfig
from opendeep_jax.parallel.axes import BATCH_SPEC, row_shards


def make_mesh(parallel: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of all processes, or over `devices`, which need not be attached.

    Devices of several slices (TPU pods, NVLink domains) are laid with the slices along the outermost axes, `data`
    first, so that what crosses the slow network is what is sent least. On a TPU each axis takes whole torus axes where
    sizes allow.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = tuple(axis_sizes(parallel, len(devices)).values())
    # A GPU's process is its node, as far as the fast links go; a TPU's slice may have many hosts.
    by_process = devices[0].platform in ("gpu", "cuda")
    islands = {device.process_index if by_process else getattr(device, "slice_index", 0) for device in devices}
    if len(islands) > 1:
        outer = _outer_sizes(sizes, len(islands))
        inner = tuple(size // part for size, part in zip(sizes, outer, strict=True))
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, process_is_granule=by_process, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _outer_sizes(sizes: tuple[int, ...], slices: int) -> tuple[int, ...]:
    """Return the number of slices along each axis: the outermost axes take as many as divide them."""
    outer = []
    for size in sizes:
        part = math.gcd(size, slices)
        outer.append(part)
        slices //= part
    if slices > 1:
        raise ValueError(f"a mesh of {sizes} cannot be laid over the slices: their number does not divide its axes.")
    return tuple(outer)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows divided over the devices that have rows of their own, and each row over its length axes."""
    return NamedSharding(mesh, BATCH_SPEC)


def global_rows(config: RunConfig, batch_size: int, mesh: Mesh) -> int:
    """Rows of a batch on this mesh: with those of padding that it takes to divide over the devices."""
    return padded_rows(config.train, batch_size, row_shards(mesh))


def rows_here(mesh: Mesh, rows: int) -> np.ndarray:
    """Return the batch rows that this process's devices hold, in order; int [rows of this process].

    Processes that divide the length of rows among themselves hold the same rows.
    """
    rows_only = NamedSharding(mesh, PartitionSpec(BATCH_SPEC[0]))
    parts = rows_only.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in parts]))


def put_batch(batch, mesh: Mesh, rows: int = 0):
    """A pytree of this process's rows (`rows_here`) as global arrays [rows, …], each device holding its own part.

    Args:
        rows: of the global batch; 0 says that all of them are given.
    """
    rows = rows or len(jax.tree.leaves(batch)[0])
    sharding, here = batch_sharding(mesh), rows_here(mesh, rows)

    def place(mine: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, end, _ = index[0].indices(rows)
            begin = int(np.searchsorted(here, first))
            return mine[begin : begin + end - first, *index[1:]]

        return jax.make_array_from_callback((rows, *mine.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)
