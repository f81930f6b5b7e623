"""Logical axes to mesh axes: the one table that says how a run's weights lie on its devices.

Weights name their axes where they are made and know nothing of the mesh. A weight is divided along each axis that the
table names; some of these parts are gathered when a layer begins (FSDP, ZeRO-3), the others are what a device computes
with: its heads, its columns, its experts.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from opendeep_jax.config.rules import LENGTH_AXES, ROW_AXES
from opendeep_jax.parallel.collectives import all_gather, psum


class Rule(NamedTuple):
    """Mesh axes of a logical axis."""

    mesh_axes: tuple[str, ...]
    """The mesh axes that divide it."""
    gathered: bool
    """True if a layer begins by gathering it; else each device works on its own part."""


LOGICAL_AXES = {
    "embed": Rule(("fsdp",), gathered=True),
    "embed_over_experts": Rule(("fsdp", "expert"), gathered=True),
    "vocab": Rule(("tensor",), gathered=True),
    "heads": Rule(("tensor",), gathered=False),
    "mlp": Rule(("tensor",), gathered=False),
    "experts": Rule(("expert",), gathered=False),
    "expert_embed": Rule(("fsdp",), gathered=True),
    "expert_mlp": Rule(("tensor",), gathered=True),
    # Never divided: "head_dim", "norm", "router"; "layers" where there is one stage.
}

BATCH_SPEC = PartitionSpec(ROW_AXES, LENGTH_AXES)
"""Partition of a batch's [rows, length]."""


def partition_spec(
    logical_axes: tuple[str | None, ...], shape: tuple[int, ...], mesh, at_rest: bool = False
) -> PartitionSpec:
    """The spec of a weight whose dimensions have these names; a dimension that its mesh axis can't divide is whole.

    Args:
        at_rest: between steps, where what `fsdp` divides is divided over the pipeline's stages too.
    """

    def part(name: str | None, size: int) -> tuple[str, ...] | str | None:
        axes = LOGICAL_AXES[name].mesh_axes if name in LOGICAL_AXES else ()
        choices = [("stage", *axes)] if at_rest and "fsdp" in axes else []
        for choice in [*choices, axes]:
            present = tuple(axis for axis in choice if mesh.shape[axis] > 1)
            if present and size % math.prod(mesh.shape[axis] for axis in present) == 0:
                return present if len(present) > 1 else present[0]
        return None

    return PartitionSpec(*(part(name, size) for name, size in zip(logical_axes, shape, strict=True)))


def weight_specs(definition, mesh, at_rest: bool = False) -> dict[str, PartitionSpec]:
    """`partition_spec` of each array of a `models.parameters.ModelDefinition`."""
    axes = definition.axes()
    return {name: partition_spec(axes[name], x.shape, mesh, at_rest) for name, x in definition.shapes().items()}


def replica_axes(spec: PartitionSpec, mesh) -> tuple[str, ...]:
    """Mesh axes along which devices hold copies of an array of this spec."""
    used = {name for part in spec for name in ((part,) if isinstance(part, str) else part or ())}
    return tuple(name for name in mesh.axis_names if mesh.shape[name] > 1 and name not in used)


def sum_over_copies(grads: dict[str, jax.Array], specs: dict[str, PartitionSpec], mesh) -> dict[str, jax.Array]:
    """Each gradient summed, in float32, over the devices that hold copies of its weight."""

    def whole(name: str, grad: jax.Array) -> jax.Array:
        copies = replica_axes(specs.get(name, ()), mesh)
        return psum(grad.astype(jnp.float32), copies) if copies else grad

    return {name: whole(name, grad) for name, grad in grads.items()}


def divided_further(spec: PartitionSpec, shape: tuple[int, ...], mesh) -> PartitionSpec:
    """The spec of a weight's moments when those who hold copies of it divide them: along one dimension more, the first
    that takes all of them or, one after another, as many as it can.
    """
    parts = [(part,) if isinstance(part, str) else tuple(part or ()) for part in spec]
    for axis in replica_axes(spec, mesh):
        for i, size in enumerate(shape):
            if size % math.prod(mesh.shape[name] for name in (*parts[i], axis)) == 0:
                parts[i] = (*parts[i], axis)
                break
    return PartitionSpec(*(part or None for part in parts))


def gather_weight(weight: jax.Array, logical_axes: tuple[str | None, ...], spec: PartitionSpec, dtype) -> jax.Array:
    """A layer's weight as the device computes with it, in the compute dtype; what is in float32 by rule stays so.

    It is cast before it travels. The gradient comes back through a reduce-scatter, so that no device ever holds more of
    it than its part.
    """
    if jnp.ndim(weight) > 1 and "router" not in logical_axes:
        weight = weight.astype(dtype)
    for dimension, (name, mesh_axes) in enumerate(zip(logical_axes, spec, strict=True)):
        if mesh_axes and LOGICAL_AXES[name].gathered:
            weight = all_gather(weight, mesh_axes, dimension)
    return weight


def row_shards(mesh) -> int:
    """Parts that the rows of a batch are divided into."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def balanced_order(length: int, context: int) -> np.ndarray:
    """The order in which a row is laid before `context` devices divide it: device i gets parts i and 2 context - 1 - i
    of 2 context equal parts, so that under a causal mask all have the same work.
    """
    parts = np.arange(length, dtype=np.int32).reshape(2 * context, -1)
    return np.concatenate([parts[[i, 2 * context - 1 - i]].reshape(-1) for i in range(context)])
