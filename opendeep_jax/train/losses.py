"""A batch's loss and metrics from a model's output: this device's share of each (`parallel/shares.py`)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.cross_entropy import fused_cross_entropy
from opendeep_jax.config.schedule import step_at_tokens
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.models.decoder import Decoder, Output
from opendeep_jax.parallel.shares import Shares, Sum, meet
from opendeep_jax.train.inputs import Inputs, TargetCounts
from opendeep_jax.train.metric_table import declared

Metrics = dict[str, jax.Array]


def total_loss(
    config: RunConfig, model: Decoder, out: Output, inputs: Inputs, counts: TargetCounts, step
) -> tuple[jax.Array, Shares]:
    """The loss of a model's output and of the layers that it has reports of, and shares of all metrics; beside them,
    under `load`, the tokens of each router's experts, by the name of the router's bias.
    """
    loss, metrics = losses(config, model, out.hidden, out.mtp_hidden, inputs, counts, step)
    metrics = declared(metrics)
    of_layers, more = layer_losses(config, out.reports, counts)
    loss = loss if of_layers is None else loss + of_layers
    both = metrics.keys() & more.keys()
    metrics |= more | {name: meet(metrics[name], more[name]) for name in both}
    return loss, metrics | {"load": loads(out.reports), "loss": Sum(jax.lax.stop_gradient(loss))}


def losses(
    config: RunConfig,
    model: Decoder,
    hidden: Float[Array, "B L D"],
    mtp_hidden: tuple[Float[Array, "B L D"], ...],
    inputs: Inputs,
    counts: TargetCounts,
    step,
) -> tuple[jax.Array, Shares]:
    """The loss and metrics of what the last layer, and those of MTP modules, give: next tokens and further ones.

    In a pipeline this runs on the last stage; what is of the layers belongs into their reports.
    """
    train, batch, head = config.train, inputs.batch, model.head_kernel()

    def cross_entropy(hidden, targets, mask, count):
        total, nats = summed_cross_entropy(config, hidden, head, targets, mask, train.z_loss_weight)
        return total / count, nats / count

    loss, lm_loss = cross_entropy(hidden, batch.targets, batch.loss_mask, counts.targets)
    metrics: Shares = {"lm_loss": Sum(lm_loss)}
    if train.z_loss_weight:
        metrics["z_loss"] = Sum(jax.lax.stop_gradient(loss) - lm_loss)
    if inputs.mtp:
        parts = [
            cross_entropy(hidden, module.targets, module.loss_mask, count)
            for hidden, module, count in zip(mtp_hidden, inputs.mtp, counts.mtp_targets, strict=True)
        ]
        loss += mtp_loss_weight(config, step) * sum(total for total, _ in parts) / len(parts)
        metrics["mtp_loss"] = Sum(sum(mean for _, mean in parts) / len(parts))
    return loss, metrics


def layer_losses(
    config: RunConfig, reports: dict[str, Shares], counts: TargetCounts
) -> tuple[jax.Array | None, Shares]:
    """What layers add to the loss, and the metrics in their reports, whichever layers these are: all of them, or in a
    pipeline one.
    """
    found: list[Shares] = []
    balances = [report["balance_loss"].value for report in reports.values() if "balance_loss" in report]
    weighted = None
    if balances:  # its mean over rows
        balance = sum(jnp.sum(share) for share in balances) / counts.rows
        weighted = config.model.moe.balance_loss_weight * balance
        found.append({"balance_loss": Sum(jax.lax.stop_gradient(balance))})
    for report in reports.values():
        found.append({name: share for name, share in report.items() if name not in ("load", "balance_loss")})
    metrics: Shares = {}
    for shares in found:
        for name, share in declared(shares).items():
            metrics[name] = meet(metrics[name], share) if name in metrics else share
    return weighted, metrics


def loads(reports: dict[str, Shares]) -> dict[str, Sum]:
    """Of each router in these reports, by the name of its bias, the tokens that chose each expert."""
    return {f"{place}.moe.router_bias": report["load"] for place, report in reports.items() if "load" in report}


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


def mtp_loss_weight(config: RunConfig, step) -> jax.Array:
    """V3: 0.3 for the first 10T tokens, then 0.1."""
    mtp = config.model.mtp
    if not mtp.final_from_tokens:
        return jnp.float32(mtp.loss_weight)
    return jnp.where(step < step_at_tokens(config, mtp.final_from_tokens), mtp.loss_weight, mtp.final_loss_weight)
