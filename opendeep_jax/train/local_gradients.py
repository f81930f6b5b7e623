"""Gradients of each device's own rows, before any exchange: `faults.replay` compares them between devices."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from opendeep_jax.checkpoint.digests import lanes_of
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.models.parameters import Skeleton
from opendeep_jax.parallel.axes import BATCH_SPEC, weight_specs
from opendeep_jax.train.inputs import make_inputs, target_counts
from opendeep_jax.train.state import TrainState
from opendeep_jax.train.step import own_gradients


def digest_local_gradients(config: RunConfig, skeleton: Skeleton, state: TrainState, batch: Batch) -> jax.Array:
    """Return digests of the gradients and sums that each place of the mesh in use computes from its own rows.

    Returns:
        uint32 [devices, arrays, 2], on all devices.
    """
    params, router_bias, step = state.params, state.router_bias, state.step
    mesh, depth = jax.sharding.get_abstract_mesh(), config.model.mtp.depth
    params = skeleton.in_compute_dtype(params, config.model.dtype)
    specs, whole = weight_specs(skeleton, mesh), PartitionSpec()

    def device_program(params, router_bias, inputs, counts, step):
        grads, sums = own_gradients(config, skeleton, params, router_bias, inputs, counts, step)
        return jnp.stack([lanes_of(leaf) for leaf in jax.tree.leaves((sums, grads))])[None]

    divided = jax.shard_map(
        device_program,
        mesh=mesh,
        in_specs=({name: specs[name] for name in params}, whole, BATCH_SPEC, whole, whole),
        out_specs=PartitionSpec(mesh.axis_names),
        check_vma=False,
    )
    lanes = divided(params, router_bias, make_inputs(batch, depth, mesh), target_counts(batch, depth), step)
    return jax.lax.with_sharding_constraint(lanes, whole)
