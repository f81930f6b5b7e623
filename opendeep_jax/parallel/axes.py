"""Logical axes to mesh axes: the one table that says how a run is sharded.

Weights name their axes where they are made, activations where they are constrained; neither knows the mesh.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")

MESH_AXES = {
    "batch": BATCH_AXES,
    "length": "context",
    "embed": "fsdp",
    "rank": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    # Never divided: "layers", "head_dim", "norm", "router".
}


def partition_spec(logical_axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
    """The spec of an array whose dimensions have these names; a dimension that its mesh axis can't divide is whole."""
    spec = []
    for name, size in zip(logical_axes, shape, strict=True):
        axes = MESH_AXES.get(name)
        ways = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
        spec.append(axes if ways > 1 and size % ways == 0 else None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Places an activation on the mesh in use by its axes' names; without a mesh, x itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical_axes, x.shape, mesh))


def batch_shards() -> int:
    """How many parts the batch is divided into on the mesh in use; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def per_batch_shard(function: Callable, batched: int) -> Callable:
    """`function` on each device's own rows: its first `batched` arguments are divided along their first axis, which is
    the batch, the others are whole; the result is divided like the batch. Where the batch can't be divided, and without
    a mesh, every device runs `function` on all rows.
    """
    if batch_shards() == 1:
        return function
    mesh = jax.sharding.get_abstract_mesh()
    rows = PartitionSpec(BATCH_AXES)

    def divided(*arguments):
        if arguments[0].shape[0] % batch_shards():
            return function(*arguments)
        specs = tuple(rows if i < batched else PartitionSpec() for i in range(len(arguments)))
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(*arguments)

    return divided
