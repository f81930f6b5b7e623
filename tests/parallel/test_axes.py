"""Logical axes land on mesh axes as the one table says, and rows stay on their devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from opendeep_jax.config.schema import ParallelConfig
from opendeep_jax.parallel.axes import batch_shards, constrain, partition_spec, per_batch_shard
from opendeep_jax.parallel.mesh import AXES, axis_sizes, make_mesh, put_batch


def mesh_of(**sizes):
    """A mesh over all 8 devices with these axis sizes."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.mark.parametrize(
    "parallel, devices, sizes",
    [
        ({}, 8, (1, 8, 1, 1, 1)),
        ({"data": 2}, 8, (2, 4, 1, 1, 1)),
        ({"data": -1, "fsdp": 2}, 16, (8, 2, 1, 1, 1)),
        ({"data": 1, "fsdp": 1}, 1, (1, 1, 1, 1, 1)),
    ],
)
def test_the_free_axis_takes_the_devices_that_are_left(parallel, devices, sizes):
    assert axis_sizes(ParallelConfig(**parallel), devices) == sizes


def test_the_mesh_covers_all_devices_under_its_five_names():
    mesh = make_mesh(ParallelConfig(data=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    assert mesh.size == jax.device_count() == 8


def test_dimensions_go_to_their_axes_and_stay_whole_where_these_do_not_divide():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    assert partition_spec(("batch", "length", None), (8, 16, 4), mesh) == P(("data", "fsdp"), None, None)
    assert partition_spec(("layers", "experts", "embed", "mlp"), (3, 4, 6, 8), mesh) == P(None, None, "fsdp", "tensor")
    assert partition_spec(("embed", "vocab"), (7, 9), mesh) == P(None, None)
    assert partition_spec(("batch",), (6,), mesh) == P(None)


def test_no_axis_of_a_weight_is_divided_on_one_device():
    mesh = jax.make_mesh((1,) * 5, AXES, axis_types=(AxisType.Auto,) * 5, devices=jax.devices()[:1])
    assert partition_spec(("embed", "vocab"), (8, 8), mesh) == P(None, None)


def test_rows_go_to_their_devices_in_order():
    rows = {"tokens": np.arange(32).reshape(16, 2)}
    tokens = put_batch(rows, mesh_of(data=2, fsdp=4))["tokens"]
    np.testing.assert_array_equal(tokens, rows["tokens"])
    for index, shard in enumerate(sorted(tokens.addressable_shards, key=lambda shard: shard.index[0].start)):
        np.testing.assert_array_equal(shard.data, rows["tokens"][2 * index : 2 * index + 2])


def test_constraints_place_activations_and_need_no_mesh():
    x = jnp.ones((8, 4))
    assert constrain(x, "batch", None) is x
    with jax.set_mesh(mesh_of(fsdp=8)):
        placed = jax.jit(lambda x: constrain(2 * x, "batch", None))(x)
    assert placed.sharding.shard_shape(placed.shape) == (1, 4)


def test_each_device_runs_the_function_on_its_own_rows():
    def rows_seen(x, scale):
        return jnp.full(x.shape, x.shape[0]) * scale

    x, scale = jnp.ones((16, 2)), jnp.float32(3)
    with jax.set_mesh(mesh_of(data=2, fsdp=4)):
        assert batch_shards() == 8
        seen = jax.jit(per_batch_shard(rows_seen, batched=1))(x, scale)
        undivided = jax.jit(per_batch_shard(rows_seen, batched=1))(x[:3], scale)
    np.testing.assert_array_equal(seen, np.full((16, 2), 2 * 3))
    np.testing.assert_array_equal(undivided, np.full((3, 2), 3 * 3))
    assert batch_shards() == 1
    np.testing.assert_array_equal(per_batch_shard(rows_seen, batched=1)(x, scale), np.full((16, 2), 16 * 3))
