"""One training step: forward, loss, gradient, update, router biases.

What is minimized is the objective's (`train/objective.py`). A loss is a mean over the global batch, whatever its cut
into micro-batches or devices: what it is divided by is counted first, then each part adds its share. Expert loads are
global in the same way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from opendeep_jax.config.rules import ROW_AXES
from opendeep_jax.config.schedule import borders, micro_batches, step_at_tokens
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.faults.health import UpdateCheck, check_update
from opendeep_jax.models.parameters import Arrays, ModelDefinition
from opendeep_jax.ops.routing import updated_bias
from opendeep_jax.parallel.axes import BATCH_SPEC, sum_over_copies, weight_specs
from opendeep_jax.parallel.collectives import axis_size, per_device
from opendeep_jax.parallel.shares import combine, neutral, over_devices, values
from opendeep_jax.train.objective import DeviceArguments, Inputs, Measured, Objective, make_inputs, total_loss
from opendeep_jax.train.optimizer import at_step, learning_rate
from opendeep_jax.train.pipelined import pipelined_gradients
from opendeep_jax.train.state import BASE, TrainState, state_shardings

Metrics = dict[str, jax.Array]


class StepOutput(NamedTuple):
    """Results of a step beside the new state."""

    metrics: Metrics
    """Scalars by name: `loss`, the objective's metrics, `grad_norm`, `learning_rate`."""
    check: UpdateCheck
    """Result of the update check: whether it was applied, and if not, why."""
    loads: Arrays
    """Tokens of the batch that chose each expert, int32 [layers, experts] or [experts], by router bias."""
    router_bias: Arrays
    """Router biases that the update gives, like the state's."""


def make_train_step(
    config: RunConfig,
    definition: ModelDefinition,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    transform_gradients: Callable[[jax.Array, Arrays], Arrays] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepOutput]]:
    """The pure function `(state, batch) -> (state, output)`; jit it once and donate the state.

    Args:
        objective: what is minimized.
        transform_gradients: takes the step (from 0) and the batch's gradients, before their norm is measured.
    """
    rate_at = learning_rate(config)
    zero_1, stretches = config.parallel.shard_optimizer_over_replicas, borders(config)

    def in_place(state: TrainState) -> TrainState:
        """Each array where it lay before the step, so that the new state can take the old one's memory."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return state
        return jax.lax.with_sharding_constraint(state, state_shardings(state, definition, mesh, zero_1))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepOutput]:
        grads, (metrics, loads) = batch_gradients(config, definition, objective, state, batch)
        grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
        if transform_gradients is not None:
            grads = transform_gradients(state.step, grads)
        grad_norm = optax.global_norm(grads)
        if config.optimizer.clip_norm:
            scale = jnp.minimum(1.0, config.optimizer.clip_norm / (grad_norm + 1e-12))
            grads = jax.tree.map(lambda grad: grad * scale, grads)
        updates, opt_state = optimizer.update(grads, at_step(state.opt_state, state.step), state.params)
        params = optax.apply_updates(state.params, updates)
        speed = bias_update_speed(config, state.step)
        router_bias = {  # of an MTP module that does not run there is no load
            name: updated_bias(bias, loads[name], speed) if name in loads else bias
            for name, bias in state.router_bias.items()
        }
        judged = metrics[objective.judged or "loss"]
        check, health = check_update(
            config.faults, stretches, state.step, state.health, judged, grad_norm, objective.judged is not None
        )
        after, before = (params, opt_state, router_bias), (state.params, state.opt_state, state.router_bias)
        kept = jax.tree.map(lambda new, old: jnp.where(check.skipped, old, new), after, before)
        metrics = {**metrics, "grad_norm": grad_norm, "learning_rate": rate_at(state.step)}
        after = TrainState(state.step + 1, *kept, health=health, frozen=state.frozen)
        return in_place(after), StepOutput(metrics, check, loads, router_bias)

    return train_step


def batch_gradients(
    config: RunConfig, definition: ModelDefinition, objective: Objective, state: TrainState, batch: Batch
) -> tuple[Arrays, Measured]:
    """Gradients of the global batch's loss, each lying where its weight lies, and the batch's metrics and loads.

    One program for each device: it takes its rows through its part of the model, micro-batch after micro-batch, and
    tells the others what they need (`parallel.collectives`). Without a mesh it is the whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    arguments, specs = device_arguments(config, definition, objective, state, batch)
    if not mesh.empty and mesh.shape["stage"] > 1:
        return pipelined_gradients(config, definition, objective, arguments)

    def device_gradients(arguments: DeviceArguments) -> tuple[Arrays, Measured]:
        grads, measured = local_gradients(config, definition, objective, arguments)
        grads = sum_over_copies(grads, specs.params, mesh)
        return grads, values(over_devices(measured, mesh.axis_names))

    return per_device(device_gradients, (specs,), (specs.params, PartitionSpec()))(arguments)


def device_arguments(
    config: RunConfig, definition: ModelDefinition, objective: Objective, state: TrainState, batch: Batch
) -> tuple[DeviceArguments, DeviceArguments]:
    """Return the arguments of the per-device program and their partition over the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    # Gradients are taken of what is multiplied by, and so have its dtype: a reduce-scatter in bfloat16 gives no more.
    params = definition.in_compute_dtype(state.params, config.model.dtype)
    base = definition.in_compute_dtype(state.frozen.get(BASE, {}), config.model.dtype)
    frozen = state.frozen | ({BASE: base} if base else {})
    rows = jnp.maximum(jnp.sum(jnp.any(batch.segment_ids > 0, axis=1), dtype=jnp.float32), 1.0)
    inputs = make_inputs(batch, objective.mtp_depth, mesh)
    arguments = DeviceArguments(
        params=params,
        router_bias=state.router_bias,
        frozen=frozen,
        inputs=inputs,
        normalizers=objective.normalizers(batch),
        rows=rows,
        step=state.step,
    )
    specs = {} if mesh.empty else weight_specs(definition, mesh)
    whole: Any = PartitionSpec()  # in the place of arrays
    by_rows: Any = BATCH_SPEC
    divided = DeviceArguments(
        params={name: specs.get(name, whole) for name in params},
        router_bias=whole,
        frozen={group: {name: specs.get(name, whole) for name in arrays} for group, arrays in frozen.items()},
        inputs=by_rows,
        normalizers=whole,
        rows=whole,
        step=whole,
    )
    return arguments, divided


def local_gradients(
    config: RunConfig, definition: ModelDefinition, objective: Objective, arguments: DeviceArguments
) -> tuple[Arrays, Measured]:
    """Compute from a device's own rows gradients divided like the weights, and its share of every metric.

    Over the devices that hold copies of a weight, gradients are still to be added up: once, after all micro-batches.
    """

    def batch_loss(params: Arrays, micro: Inputs) -> tuple[jax.Array, Measured]:
        weights = {**arguments.frozen.get(BASE, {}), **params}
        model, batch = definition.model(weights, arguments.router_bias), micro.batch
        mtp_tokens = [module.tokens for module in micro.mtp]
        out = model.forward(batch.tokens, batch.segment_ids, batch.positions, mtp_tokens, micro.order)
        return total_loss(config, objective, out, model.head_kernel, arguments._replace(inputs=micro))

    def micro_gradient(micro: Inputs) -> tuple[Arrays, Measured]:
        (_, measured), grads = jax.value_and_grad(batch_loss, has_aux=True)(arguments.params, micro)
        return grads, measured

    shards, inputs = axis_size(ROW_AXES), arguments.inputs
    micros = micro_batches(config.train, len(inputs.batch.tokens) * shards, shards)
    if micros == 1:
        return micro_gradient(inputs)
    cut = jax.tree.map(lambda x: x.reshape(micros, -1, *x.shape[1:]), inputs)
    shapes, none = jax.eval_shape(micro_gradient, jax.tree.map(lambda x: x[0], cut))
    # Sums of bfloat16 gradients are kept in float32.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, "float32" if x.dtype == jnp.bfloat16 else x.dtype), shapes)

    def accumulate(total, micro):
        grads, measured = micro_gradient(micro)
        return (jax.tree.map(jnp.add, total[0], grads), combine(total[1], measured)), None

    return jax.lax.scan(accumulate, (zeros, neutral(none)), cut)[0]


def bias_update_speed(config: RunConfig, step) -> jax.Array:
    """V3: 0.001 for 14.3T tokens, then 0."""
    moe = config.model.moe
    if not moe.bias_update_until_tokens:
        return jnp.float32(moe.bias_update_speed)
    return jnp.where(step < step_at_tokens(config, moe.bias_update_until_tokens), moe.bias_update_speed, 0.0)
