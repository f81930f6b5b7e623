"""A batch's loss and metrics from a model's output: this device's share of each; their sum is the whole."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.cross_entropy import fused_cross_entropy
from opendeep_jax.config.schedule import step_at_tokens
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.models.decoder import Decoder, Output
from opendeep_jax.models.moe import RouterStats
from opendeep_jax.train.inputs import Inputs, TargetCounts

Metrics = dict[str, jax.Array]

ROUTERS = "moe_layers.moe.router_bias"
"""Name of the stacked layers' router biases."""


def losses(
    config: RunConfig, model: Decoder, out: Output, inputs: Inputs, counts: TargetCounts, step
) -> tuple[jax.Array, Metrics]:
    """The loss and metrics of a model's output: next tokens, further tokens, and balance where there are routers."""
    train, batch, head = config.train, inputs.batch, model.head_kernel()

    def cross_entropy(hidden, targets, mask, count):
        total, nats = summed_cross_entropy(config, hidden, head, targets, mask, train.z_loss_weight)
        return total / count, nats / count

    loss, lm_loss = cross_entropy(out.hidden, batch.targets, batch.loss_mask, counts.targets)
    metrics = {"lm_loss": lm_loss}
    if train.z_loss_weight:
        metrics["z_loss"] = jax.lax.stop_gradient(loss) - lm_loss
    if inputs.mtp:
        parts = [
            cross_entropy(hidden, module.targets, module.loss_mask, count)
            for hidden, module, count in zip(out.mtp_hidden, inputs.mtp, counts.mtp_targets, strict=True)
        ]
        loss += mtp_loss_weight(config, step) * sum(total for total, _ in parts) / len(parts)
        metrics["mtp_loss"] = sum(mean for _, mean in parts) / len(parts)
    routers = {ROUTERS: out.moe_layers}
    routers |= {f"mtp.{i}.block.moe.router_bias": stats for i, stats in enumerate(out.mtp)}
    routers = {name: stats for name, stats in routers.items() if stats is not None}
    if routers:
        balance, weighted = balance_losses(config, routers.values(), counts)
        loss += weighted
        metrics["balance_loss"] = balance
    metrics["load"] = {name: stats.load for name, stats in routers.items()}
    metrics["loss"] = jax.lax.stop_gradient(loss)
    return loss, metrics


def summed_cross_entropy(
    config: RunConfig,
    hidden: Float[Array, "B L D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    z_loss_weight: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The targets' cross-entropy with and without the z-loss, in nats, summed; only the first carries a gradient."""
    total, each = fused_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        targets.reshape(-1),
        mask.reshape(-1),
        z_loss_weight,
        config.train.loss_chunk,
        config.model.execution.cross_entropy or None,
        config.model.logit_softcap,
    )
    return total, jnp.sum(each)


def balance_losses(
    config: RunConfig, routers: Iterable[RouterStats], counts: TargetCounts
) -> tuple[jax.Array, jax.Array]:
    """The mean over rows of these routers' balance losses: as a metric, and as it goes into the loss."""
    balance = sum(jnp.sum(stats.balance_loss) for stats in routers) / counts.rows
    return jax.lax.stop_gradient(balance), config.model.moe.balance_loss_weight * balance


def mtp_loss_weight(config: RunConfig, step) -> jax.Array:
    """V3: 0.3 for the first 10T tokens, then 0.1."""
    mtp = config.model.mtp
    if not mtp.final_from_tokens:
        return jnp.float32(mtp.loss_weight)
    return jnp.where(step < step_at_tokens(config, mtp.final_from_tokens), mtp.loss_weight, mtp.final_loss_weight)
