"""One training step: forward, loss, gradient, update, router biases.

Losses are means over all valid targets of the global batch, whatever its cut into micro-batches or devices: their
counts are taken first, then each part adds its share. Expert loads are global in the same way.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from opendeep_jax.config.rules import ROW_AXES
from opendeep_jax.config.schedule import borders, micro_batches, step_at_tokens
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.faults.health import judge
from opendeep_jax.faults.injection import spoil_gradients
from opendeep_jax.models.parameters import Arrays, Skeleton
from opendeep_jax.ops.routing import updated_bias
from opendeep_jax.parallel.axes import BATCH_SPEC, sum_over_copies, weight_specs
from opendeep_jax.parallel.collectives import axis_size
from opendeep_jax.parallel.shares import Shares, meet, nothing, numbers, over_devices
from opendeep_jax.train.inputs import Inputs, TargetCounts, make_inputs, target_counts
from opendeep_jax.train.losses import Metrics, total_loss
from opendeep_jax.train.optimizer import at_step, learning_rate
from opendeep_jax.train.pipelined import pipelined_gradients
from opendeep_jax.train.state import TrainState, state_shardings


def make_train_step(
    config: RunConfig, skeleton: Skeleton, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure function `(state, batch) -> (state, metrics)`; jit it once and donate the state."""
    rate_at = learning_rate(config)
    zero_1, stretches = config.parallel.shard_optimizer_over_replicas, borders(config)

    def in_place(state: TrainState) -> TrainState:
        """Each array where it lay before the step, so that the new state can take the old one's memory."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return state
        return jax.lax.with_sharding_constraint(state, state_shardings(state, skeleton, mesh, zero_1))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums = batch_gradients(config, skeleton, state, batch)
        grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
        grads = spoil_gradients(config.faults.drill, state.step, grads)
        grad_norm = optax.global_norm(grads)
        if config.optimizer.clip_norm:
            scale = jnp.minimum(1.0, config.optimizer.clip_norm / (grad_norm + 1e-12))
            grads = jax.tree.map(lambda grad: grad * scale, grads)
        updates, opt_state = optimizer.update(grads, at_step(state.opt_state, state.step), state.params)
        params = optax.apply_updates(state.params, updates)
        load = sums.pop("load")
        speed = bias_update_speed(config, state.step)
        router_bias = {name: updated_bias(bias, load[name], speed) for name, bias in state.router_bias.items()}
        rate = rate_at(state.step)
        verdict, health = judge(config.faults, stretches, state.step, state.health, sums["loss"], grad_norm)
        after, before = (params, opt_state, router_bias), (state.params, state.opt_state, state.router_bias)
        kept = jax.tree.map(lambda new, old: jnp.where(verdict.apply, new, old), after, before)
        metrics = {**sums, "grad_norm": grad_norm, "learning_rate": rate, "load": load, "router_bias": router_bias}
        metrics |= {"skipped": ~verdict.apply, "spike": verdict.spike}
        metrics |= {"loss_zscore": verdict.loss_zscore, "grad_norm_zscore": verdict.grad_norm_zscore}
        return in_place(TrainState(state.step + 1, *kept, health)), metrics

    return train_step


def batch_gradients(config: RunConfig, skeleton: Skeleton, state: TrainState, batch: Batch) -> tuple[Arrays, Metrics]:
    """Gradients of the global batch's loss, each lying where its weight lies, and the batch's metrics.

    One program for each device: it takes its rows through its part of the model, micro-batch after micro-batch, and
    tells the others what they need (`parallel.collectives`). Without a mesh it is the whole.
    """
    mesh, depth = jax.sharding.get_abstract_mesh(), config.model.mtp.depth
    # Gradients are taken of what is multiplied by, and so have its dtype: a reduce-scatter in bfloat16 gives no more.
    params = skeleton.in_compute_dtype(state.params, config.model.dtype)
    inputs = (params, state.router_bias, make_inputs(batch, depth, mesh), target_counts(batch, depth), state.step)
    if mesh.empty:
        return device_gradients(config, skeleton, {}, *inputs)
    if mesh.shape["stage"] > 1:
        return pipelined_gradients(config, skeleton, *inputs)
    specs, whole = weight_specs(skeleton, mesh), PartitionSpec()
    divided = jax.shard_map(
        functools.partial(device_gradients, config, skeleton, specs),
        mesh=mesh,
        in_specs=({name: specs[name] for name in state.params}, whole, BATCH_SPEC, whole, whole),
        out_specs=({name: specs[name] for name in state.params}, whole),
        check_vma=False,
    )
    return divided(*inputs)


def device_gradients(
    config: RunConfig, skeleton: Skeleton, specs, params: Arrays, router_bias: Arrays, inputs: Inputs, counts, step
) -> tuple[Arrays, Metrics]:
    """One device's program: gradients of its weights' parts, and the global batch's metrics."""
    grads, sums = own_gradients(config, skeleton, params, router_bias, inputs, counts, step)
    mesh = jax.sharding.get_abstract_mesh()
    return sum_over_copies(grads, specs, mesh), numbers(over_devices(sums, mesh.axis_names))


def own_gradients(
    config: RunConfig, skeleton: Skeleton, params: Arrays, router_bias: Arrays, inputs: Inputs, counts, step
) -> tuple[Arrays, Shares]:
    """What a device computes from its own rows: gradients divided like the weights, and its share of every metric.

    Over the devices that hold copies of a weight, gradients are still to be added up: once, after all micro-batches.
    """
    gradient = jax.value_and_grad(batch_loss, argnums=2, has_aux=True)

    def micro_gradient(micro: Inputs) -> tuple[Arrays, Shares]:
        (_, sums), grads = gradient(config, skeleton, params, router_bias, micro, counts, step)
        return grads, sums

    shards = axis_size(ROW_AXES)
    micros = micro_batches(config.train, len(inputs.batch.tokens) * shards, shards)
    if micros == 1:
        grads, sums = micro_gradient(inputs)
    else:
        cut = jax.tree.map(lambda x: x.reshape(micros, -1, *x.shape[1:]), inputs)
        shapes, none = jax.eval_shape(micro_gradient, jax.tree.map(lambda x: x[0], cut))
        # Sums of bfloat16 gradients are kept in float32.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, "float32" if x.dtype == jnp.bfloat16 else x.dtype), shapes)

        def accumulate(total, micro):
            grads, sums = micro_gradient(micro)
            return (jax.tree.map(jnp.add, total[0], grads), meet(total[1], sums)), None

        (grads, sums), _ = jax.lax.scan(accumulate, (zeros, nothing(none)), cut)
    return grads, sums


def batch_loss(
    config: RunConfig,
    skeleton: Skeleton,
    params: Arrays,
    router_bias: Arrays,
    inputs: Inputs,
    counts: TargetCounts,
    step,
) -> tuple[jax.Array, Shares]:
    """These rows' share of the global batch's loss, and their share of every metric."""
    model, batch = skeleton.model(params, router_bias), inputs.batch
    mtp_tokens = [module.tokens for module in inputs.mtp]
    out = model.forward(batch.tokens, batch.segment_ids, batch.positions, mtp_tokens, inputs.order)
    return total_loss(config, model, out, inputs, counts, step)


def bias_update_speed(config: RunConfig, step) -> jax.Array:
    """V3: 0.001 for 14.3T tokens, then 0."""
    moe = config.model.moe
    if not moe.bias_update_until_tokens:
        return jnp.float32(moe.bias_update_speed)
    return jnp.where(step < step_at_tokens(config, moe.bias_update_until_tokens), moe.bias_update_speed, 0.0)
