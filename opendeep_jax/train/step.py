"""One training step: forward, loss, gradient, update, router biases.

Losses are means over all valid targets of the global batch, whatever its cut into micro-batches or devices: their
counts are taken first, then each part adds its share. Expert loads are global in the same way.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from opendeep_jax.config.schedule import step_at_tokens
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.models.decoder import shift_left
from opendeep_jax.models.parameters import Arrays, Skeleton
from opendeep_jax.ops.losses import chunked_cross_entropy
from opendeep_jax.ops.routing import updated_bias
from opendeep_jax.parallel.axes import constrain
from opendeep_jax.train.optimizer import learning_rate_schedule
from opendeep_jax.train.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    config: RunConfig, skeleton: Skeleton, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure function `(state, batch) -> (state, metrics)`; jit it once and donate the state."""
    schedule = learning_rate_schedule(config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums = batch_gradients(config, skeleton, state, batch)
        grad_norm = optax.global_norm(grads)
        if config.optimizer.clip_norm:
            scale = jnp.minimum(1.0, config.optimizer.clip_norm / (grad_norm + 1e-12))
            grads = jax.tree.map(lambda grad: grad * scale, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        load = sums.pop("load")
        speed = bias_update_speed(config, state.step)
        router_bias = {name: updated_bias(bias, load[name], speed) for name, bias in state.router_bias.items()}
        rate = config.optimizer.learning_rate * schedule(state.step)
        metrics = {**sums, "grad_norm": grad_norm, "learning_rate": rate, "load": load, "router_bias": router_bias}
        return TrainState(state.step + 1, params, opt_state, router_bias), metrics

    return train_step


def batch_gradients(config: RunConfig, skeleton: Skeleton, state: TrainState, batch: Batch) -> tuple[Arrays, Metrics]:
    """Gradients of the global batch's loss in float32, and its metrics, micro-batch after micro-batch."""
    counts = target_counts(config, batch)
    gradient = jax.value_and_grad(batch_loss, argnums=2, has_aux=True)
    axes = skeleton.axes()

    def micro_gradient(micro: Batch) -> tuple[Arrays, Metrics]:
        (_, sums), grads = gradient(config, skeleton, state.params, state.router_bias, micro, counts, state.step)
        # A gradient lies where its weight lies: each device adds up its own share and never holds another's.
        return {name: constrain(grad, *axes[name]) for name, grad in grads.items()}, sums

    micros = config.train.accumulation_steps
    if micros == 1:
        return micro_gradient(batch)

    def cut(x):
        # Every micro-batch takes its rows from all devices: row r goes to micro-batch r % micros.
        x = jnp.moveaxis(x.reshape(-1, micros, *x.shape[1:]), 1, 0)
        return constrain(x, None, "batch", "length")

    micro_batches = jax.tree.map(cut, batch)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro_gradient, first))

    def accumulate(total, micro):
        return jax.tree.map(jnp.add, total, micro_gradient(micro)), None

    total, _ = jax.lax.scan(accumulate, zeros, micro_batches)
    return total


class TargetCounts(NamedTuple):
    """What each sum of the global batch's loss is divided by."""

    targets: jax.Array
    """Valid targets of the main model, float32."""
    mtp_targets: list[jax.Array]
    """Valid targets of each MTP module, float32."""
    rows: int
    """Rows of the batch."""


def target_counts(config: RunConfig, batch: Batch) -> TargetCounts:
    """Counts a global batch; at least 1 target each, so that nothing is divided by 0."""
    masks = [batch.loss_mask, *mtp_masks(batch.loss_mask, config.model.mtp.depth)]
    counts = [jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0) for mask in masks]
    return TargetCounts(counts[0], counts[1:], batch.tokens.shape[0])


def mtp_masks(loss_mask: jax.Array, depth: int) -> list[jax.Array]:
    """Where module k = 1, 2, … has a target: the k + 1 tokens after a position all belong to its document."""
    masks, mask = [], loss_mask
    for k in range(1, depth + 1):
        mask = mask & shift_left(loss_mask, k)
        masks.append(mask)
    return masks


def batch_loss(
    config: RunConfig, skeleton: Skeleton, params: Arrays, router_bias: Arrays, batch: Batch, counts: TargetCounts, step
) -> tuple[jax.Array, Metrics]:
    """This (micro-)batch's share of the global batch's loss, and its share of every metric."""
    model, train, mtp = skeleton.model(params, router_bias), config.train, config.model.mtp
    out = model.forward(batch.tokens, batch.segment_ids, batch.positions, batch.targets if mtp.depth else None)
    head = model.head_kernel()

    def cross_entropy(hidden, targets, mask, count):
        total, each = chunked_cross_entropy(hidden, head, targets, mask, train.loss_chunk, train.z_loss_weight)
        return total / count, jnp.sum(each) / count

    loss, lm_loss = cross_entropy(out.hidden, batch.targets, batch.loss_mask, counts.targets)
    metrics = {"lm_loss": lm_loss}
    if train.z_loss_weight:
        metrics["z_loss"] = jax.lax.stop_gradient(loss) - lm_loss
    if mtp.depth:
        masks = mtp_masks(batch.loss_mask, mtp.depth)
        parts = [
            cross_entropy(hidden, shift_left(batch.targets, k), mask, count)
            for k, (hidden, mask, count) in enumerate(zip(out.mtp_hidden, masks, counts.mtp_targets, strict=True), 1)
        ]
        loss += mtp_loss_weight(config, step) * sum(total for total, _ in parts) / mtp.depth
        metrics["mtp_loss"] = sum(mean for _, mean in parts) / mtp.depth
    routers = {"moe_layers.moe.router_bias": out.moe_layers}
    routers |= {f"mtp.{i}.block.moe.router_bias": stats for i, stats in enumerate(out.mtp)}
    routers = {name: stats for name, stats in routers.items() if stats is not None}
    if routers:
        balance = sum(jnp.sum(stats.balance_loss) for stats in routers.values()) / counts.rows
        loss += config.model.moe.balance_loss_weight * balance
        metrics["balance_loss"] = jax.lax.stop_gradient(balance)
    metrics["load"] = {name: stats.load for name, stats in routers.items()}
    metrics["loss"] = jax.lax.stop_gradient(loss)
    return loss, metrics


def mtp_loss_weight(config: RunConfig, step) -> jax.Array:
    """V3: 0.3 for the first 10T tokens, then 0.1."""
    mtp = config.model.mtp
    if not mtp.final_from_tokens:
        return jnp.float32(mtp.loss_weight)
    return jnp.where(step < step_at_tokens(config, mtp.final_from_tokens), mtp.loss_weight, mtp.final_loss_weight)


def bias_update_speed(config: RunConfig, step) -> jax.Array:
    """V3: 0.001 for 14.3T tokens, then 0."""
    moe = config.model.moe
    if not moe.bias_update_until_tokens:
        return jnp.float32(moe.bias_update_speed)
    return jnp.where(step < step_at_tokens(config, moe.bias_update_until_tokens), moe.bias_update_speed, 0.0)
