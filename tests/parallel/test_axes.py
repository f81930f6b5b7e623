"""Logical axes land on mesh axes as the one table says, and a batch on the devices that it is divided over."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from opendeep_jax.config.rules import MESH_AXES, axis_sizes
from opendeep_jax.config.schema import ParallelConfig
from opendeep_jax.parallel.axes import balanced_order, divided_further, partition_spec, replica_axes
from opendeep_jax.parallel.mesh import make_mesh, put_batch


def mesh_of(**sizes):
    """A mesh over all 8 devices with these axis sizes."""
    return make_mesh(ParallelConfig(**{"fsdp": 1} | sizes))


@pytest.mark.parametrize(
    "parallel, devices, sizes",
    [
        ({}, 8, (1, 1, 8, 1, 1, 1)),
        ({"data": 2}, 8, (2, 1, 4, 1, 1, 1)),
        ({"data": -1, "fsdp": 2}, 16, (8, 1, 2, 1, 1, 1)),
        ({"data": 1, "fsdp": 1}, 1, (1, 1, 1, 1, 1, 1)),
        ({"stage": 2, "expert": 4, "fsdp": -1}, 32, (1, 2, 4, 4, 1, 1)),
    ],
)
def test_the_free_axis_takes_the_devices_that_are_left(parallel, devices, sizes):
    assert tuple(axis_sizes(ParallelConfig(**parallel), devices).values()) == sizes


def test_the_mesh_covers_all_devices_under_its_names():
    mesh = make_mesh(ParallelConfig(data=2))
    assert tuple(mesh.axis_names) == MESH_AXES
    assert dict(mesh.shape) == {"data": 2, "stage": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    assert mesh.size == jax.device_count() == 8


def test_dimensions_go_to_their_axes_and_stay_whole_where_these_do_not_divide():
    mesh = mesh_of(expert=2, fsdp=2, tensor=2)
    assert partition_spec(("layers", "embed", "mlp"), (3, 6, 8), mesh) == P(None, "fsdp", "tensor")
    expert_axes = ("layers", "experts", "expert_embed", "expert_mlp")
    assert partition_spec(expert_axes, (3, 4, 6, 8), mesh) == P(None, "expert", "fsdp", "tensor")
    assert partition_spec(("embed", "vocab"), (7, 9), mesh) == P(None, None)
    assert partition_spec(("embed", "heads", "head_dim"), (4, 2, 6), mesh) == P("fsdp", "tensor", None)
    assert partition_spec(("embed_over_experts", "mlp"), (8, 3), mesh) == P(("fsdp", "expert"), None)


def test_between_steps_a_weight_is_divided_over_the_stages_too():
    mesh = mesh_of(stage=2, fsdp=2, expert=2)
    axes = ("layers", "experts", "expert_embed", "expert_mlp")
    assert partition_spec(axes, (3, 4, 8, 8), mesh) == P(None, "expert", "fsdp", None)
    assert partition_spec(axes, (3, 4, 8, 8), mesh, at_rest=True) == P(None, "expert", ("stage", "fsdp"), None)
    assert partition_spec(axes, (3, 4, 6, 8), mesh, at_rest=True) == P(None, "expert", "fsdp", None)


def test_no_axis_of_a_weight_is_divided_on_one_device():
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    assert partition_spec(("embed", "vocab"), (8, 8), mesh) == P(None, None)
    assert replica_axes(P(None, None), mesh) == ()


def test_copies_of_a_weight_lie_along_the_axes_that_do_not_divide_it():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    assert replica_axes(P(None, "fsdp"), mesh) == ("data", "tensor")
    assert replica_axes(P("tensor", "fsdp"), mesh) == ("data",)


def test_moments_are_divided_over_copies_too_where_a_dimension_takes_them():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    assert divided_further(P(None, "fsdp"), (3, 8), mesh) == P(None, ("fsdp", "data", "tensor"))
    assert divided_further(P(None, "fsdp"), (2, 6), mesh) == P("data", "fsdp")
    assert divided_further(P(None), (3,), mesh) == P(None)


def test_rows_and_lengths_go_to_their_devices_in_order():
    rows = {"tokens": np.arange(64).reshape(8, 8)}
    tokens = put_batch(rows, mesh_of(data=2, expert=2, context=2))["tokens"]
    np.testing.assert_array_equal(tokens, rows["tokens"])
    shards = tokens.addressable_shards
    parts = {(shard.index[0].start, shard.index[1].start): np.asarray(shard.data) for shard in shards}
    assert len(parts) == 8
    for (row, column), part in parts.items():
        np.testing.assert_array_equal(part, rows["tokens"][row : row + 2, column : column + 4])


@pytest.mark.parametrize("length, context", [(8, 2), (24, 3), (16, 8), (6, 1)])
def test_every_device_of_a_divided_row_has_as_many_keys_to_look_at(length, context):
    order = balanced_order(length, context)
    np.testing.assert_array_equal(np.sort(order), np.arange(length))
    work = (order.reshape(context, -1) + 1).sum(axis=1)
    assert (work == work[0]).all()
