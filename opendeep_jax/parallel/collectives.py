"""Collectives inside the per-device program; each does nothing where its axis has one device or there is no mesh.

The training step is one fully manual `jax.shard_map`: model code is written for one device, and what devices tell each
other is said here. The law that makes gradients right: a device's loss is its own share, the loss is the sum over all
devices, and every collective below is differentiated as the linear map that it is (`psum` into `psum`, `all_gather`
into `psum_scatter`). So a weight's gradient is complete once it is summed over the devices that hold a copy of it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

Axis = str | tuple[str, ...]


def per_device(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Return `function` as one program for each device of the mesh in use, on its own parts of the arguments.

    Without a mesh it is the function itself.

    Args:
        in_specs, out_specs: how arguments and results are divided, as `jax.shard_map` takes them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def manual_axes(axis: Axis) -> tuple[str, ...]:
    """Those of the named mesh axes that have several devices in the per-device program at hand."""
    mesh = jax.sharding.get_abstract_mesh()
    names = (axis,) if isinstance(axis, str) else axis
    return tuple(name for name in names if name in mesh.manual_axes and mesh.shape[name] > 1)


def axis_size(axis: Axis) -> int:
    """Devices along the axes; 1 outside a per-device program."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in manual_axes(axis))


def axis_index(axis: Axis) -> jax.Array | int:
    """Return this device's index along the axes, int32; 0 outside a per-device program."""
    names = manual_axes(axis)
    return lax.axis_index(names) if names else 0


def psum(x, axis: Axis):
    """The sum of a pytree over the devices of the axes."""
    names = manual_axes(axis)
    return lax.psum(x, names) if names else x


def all_gather(x: jax.Array, axis: Axis, dimension: int) -> jax.Array:
    """The devices' arrays joined along `dimension`, in their order."""
    names = manual_axes(axis)
    return lax.all_gather(x, names, axis=dimension, tiled=True) if names else x


def psum_scatter(x: jax.Array, axis: Axis, dimension: int) -> jax.Array:
    """The sum over the devices, of which each keeps its own part of `dimension`."""
    names = manual_axes(axis)
    return lax.psum_scatter(x, names, scatter_dimension=dimension, tiled=True) if names else x


def all_to_all(x: jax.Array, axis: Axis, split: int, concat: int) -> jax.Array:
    """Part i of dimension `split` goes to device i; what arrives is joined along `concat`."""
    names = manual_axes(axis)
    return lax.all_to_all(x, names, split, concat, tiled=True) if names else x
