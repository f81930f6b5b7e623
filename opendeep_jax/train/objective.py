"""Objectives of a training step; `pretraining` is one.

    loss, metrics = objective.loss(hidden, head=…, batch=…, normalizers=…, …)

A device has a part of the batch, so it computes its share: sums over its own targets, divided by normalizers that were
counted over the global batch before it was cut (`parallel/shares.py`). B batch, L length, D model width, V vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.cross_entropy import fused_cross_entropy, token_logprobs
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schedule import step_at_tokens
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.models.decoder import Output, shift_left
from opendeep_jax.models.parameters import Arrays
from opendeep_jax.parallel.axes import balanced_order
from opendeep_jax.parallel.shares import Shares, Sum, all_entries, combine


@dataclass(frozen=True)
class Objective:
    """A loss, and what a batch must have for it. A policy gradient, for example:

        def loss(hidden, *, head, batch, normalizers, **_):
            logprobs, _ = token_logprobs(hidden, head, batch.targets, mask=batch.loss_mask)
            share = -jnp.sum(logprobs * batch.extras["advantages"]) / normalizers
            return share, {"policy_loss": Sum(share)}

        Objective(loss, lambda batch: jnp.sum(batch.loss_mask), {"advantages": "float32"}, judged=None)

    What the layers add by themselves, the balance loss of `model.moe.balance_loss_weight`, comes on top of any.
    """

    loss: Callable[..., tuple[jax.Array, Shares]]
    """(hidden [B, L, D], **inputs) -> this device's shares of the loss and of metrics by name. Inputs: `head` [D, V];
    `batch`; `normalizers`; `mtp_hidden` and `mtp`, one entry for each MTP module that runs; `frozen`, as in the state;
    `step`, from 0. In a pipeline it runs on the last stage."""
    normalizers: Callable[[Batch], Any]
    """Normalizers of the global batch's loss, a pytree."""
    extras: dict[str, str | tuple] = field(default_factory=dict)
    """Arrays that it reads in `Batch.extras`, by name: the dtype of one [B, L], `("int32", 8)` for one [B, L, 8]."""
    weighted: bool = False
    """True if batches have a weight for each target."""
    mtp_depth: int = 0
    """MTP modules that run."""
    judged: str | None = "loss"
    """The metric by which a step is judged a spike, beside its gradient norm; None judges by the norm alone."""


class MTPTargets(NamedTuple):
    """Inputs and targets of one MTP module, each [B, L]."""

    tokens: jax.Array
    targets: jax.Array
    loss_mask: jax.Array
    weights: jax.Array | None


class Inputs(NamedTuple):
    """A batch as the per-device program takes it. All that looks beyond a device's part of a row is in it already."""

    batch: Batch
    mtp: tuple[MTPTargets, ...]
    order: jax.Array | None
    """Index of each position in its row, where rows are divided over `context`; else None."""


def make_inputs(batch: Batch, depth: int, mesh) -> Inputs:
    """The batch with what `depth` MTP modules predict, in the order in which `context` divides it."""
    weights = [None if batch.weights is None else shift_left(batch.weights, k) for k in range(1, depth + 1)]
    mtp = tuple(
        MTPTargets(shift_left(batch.targets, k - 1), shift_left(batch.targets, k), mask, weights[k - 1])
        for k, mask in enumerate(mtp_masks(batch.loss_mask, depth), 1)
    )
    context = 1 if mesh.empty else mesh.shape["context"]
    if context == 1:
        return Inputs(batch, mtp, None)
    order = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1], dtype=jnp.int32), batch.tokens.shape)
    inputs = Inputs(batch, mtp, order)
    return jax.tree.map(lambda x: jnp.take(x, balanced_order(x.shape[1], context), axis=1), inputs)


def mtp_masks(loss_mask: jax.Array, depth: int) -> list[jax.Array]:
    """Return where module k = 1, 2, … has a target: the k + 1 tokens after a position all belong to its document."""
    masks, mask = [], loss_mask
    for k in range(1, depth + 1):
        mask = mask & shift_left(loss_mask, k)
        masks.append(mask)
    return masks


class Measured(NamedTuple):
    """A device's shares of metrics (`parallel/shares.py`)."""

    metrics: dict[str, Any]
    """Shares by name, and numbers once all of them have met."""
    loads: dict[str, Any]
    """Likewise, the tokens of each router's experts by the name of its bias."""


class DeviceArguments(NamedTuple):
    """Inputs of one device's gradient program."""

    params: Arrays
    """Weights in the dtype that a step multiplies by."""
    router_bias: Arrays
    frozen: dict[str, Arrays]
    inputs: Inputs
    normalizers: Any
    """The objective's, of the global batch."""
    rows: jax.Array
    """Rows of the global batch that are not padding, float32: what the balance loss is divided by."""
    step: jax.Array
    """Step, from 0."""


def total_loss(
    config: RunConfig, objective: Objective, out: Output, head_kernel: Callable, arguments: DeviceArguments
) -> tuple[jax.Array, Measured]:
    """The loss of a model's output and of the layers that it has reports of, and shares of all that is measured."""
    inputs = arguments.inputs
    loss, metrics = objective.loss(
        out.hidden,
        head=head_kernel(),
        batch=inputs.batch,
        normalizers=arguments.normalizers,
        mtp_hidden=out.mtp_hidden,
        mtp=inputs.mtp,
        frozen=arguments.frozen,
        step=arguments.step,
    )
    of_layers, measured = layer_losses(config, out.reports, arguments.rows)
    loss = loss if of_layers is None else loss + of_layers
    metrics = joined(all_entries(metrics), measured.metrics, {"loss": Sum(jax.lax.stop_gradient(loss))})
    return loss, measured._replace(metrics=metrics)


def layer_losses(config: RunConfig, reports: dict[str, Shares], rows: jax.Array) -> tuple[jax.Array | None, Measured]:
    """Return the layers' losses and the metrics of their reports, for all layers or, in a pipeline, for one."""
    found: list[Shares] = []
    balances = [share.value for report in reports.values() if isinstance(share := report.get("balance_loss"), Sum)]
    weighted = None
    if balances:  # its mean over rows
        balance = sum(jnp.sum(share) for share in balances) / rows
        weighted = config.model.moe.balance_loss_weight * balance
        found.append({"balance_loss": Sum(jax.lax.stop_gradient(balance))})
    for report in reports.values():
        found.append({name: share for name, share in report.items() if name not in ("load", "balance_loss")})
    loads = {f"{place}.moe.router_bias": report["load"] for place, report in reports.items() if "load" in report}
    return weighted, Measured(joined(*map(all_entries, found)), loads)


def joined(*shares: Shares) -> Shares:
    """Join dictionaries of metrics, combining shares of the same name."""
    found: Shares = {}
    for more in shares:
        found |= {name: combine(found[name], share) if name in found else share for name, share in more.items()}
    return found


class TargetCounts(NamedTuple):
    """The normalizers of `pretraining`: valid targets, or the sum of their weights, float32."""

    targets: jax.Array
    mtp_targets: list[jax.Array]
    """Those of each MTP module."""


def pretraining(config: RunConfig, weighted: bool = False) -> Objective:
    """Next tokens, and with MTP modules further ones: a mean over all valid targets of the batch, with the z-loss.

    Args:
        weighted: each target counts by its weight in the batch.
    """
    z_loss_weight, depth = config.train.z_loss_weight, config.model.mtp.depth
    if weighted and z_loss_weight:
        raise ConfigError(
            f"train.z_loss_weight = {z_loss_weight}: must be 0 where targets have weights. Give "
            "--train.z_loss_weight=0."
        )

    def normalizers(batch: Batch) -> TargetCounts:
        return target_counts(batch, depth)

    def loss(hidden, *, head, batch, normalizers, mtp_hidden, mtp, step, **_) -> tuple[jax.Array, Shares]:
        def cross_entropy(hidden, targets, mask, weights, count):
            total, nats = summed_cross_entropy(config, hidden, head, targets, mask, z_loss_weight, weights)
            return total / count, nats / count

        main = batch.targets, batch.loss_mask, batch.weights
        loss, lm_loss = cross_entropy(hidden, *main, normalizers.targets)
        metrics: Shares = {"lm_loss": Sum(lm_loss)}
        if z_loss_weight:
            metrics["z_loss"] = Sum(jax.lax.stop_gradient(loss) - lm_loss)
        if mtp:
            parts = [
                cross_entropy(hidden, module.targets, module.loss_mask, module.weights, count)
                for hidden, module, count in zip(mtp_hidden, mtp, normalizers.mtp_targets, strict=True)
            ]
            loss += mtp_loss_weight(config, step) * sum(total for total, _ in parts) / len(parts)
            metrics["mtp_loss"] = Sum(functools.reduce(jnp.add, (mean for _, mean in parts)) / len(parts))
        return loss, metrics

    return Objective(loss, normalizers, weighted=weighted, mtp_depth=depth)


def target_counts(batch: Batch, depth: int) -> TargetCounts:
    """Count a global batch's targets, of the main model and of `depth` MTP modules; never 0, as it divides."""
    masks = [batch.loss_mask, *mtp_masks(batch.loss_mask, depth)]
    if batch.weights is None:
        counts = [jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0) for mask in masks]
    else:
        sums = [jnp.sum(jnp.where(mask, shift_left(batch.weights, k), 0.0)) for k, mask in enumerate(masks)]
        counts = [jnp.where(total > 0, total, 1.0) for total in sums]
    return TargetCounts(counts[0], counts[1:])


def summed_cross_entropy(
    config: RunConfig,
    hidden: Float[Array, "B L D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    z_loss_weight: float = 0.0,
    weights: Float[Array, "B L"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The targets' cross-entropy with and without the z-loss, in nats, summed; only the first carries a gradient."""
    chunk, softcap = config.train.loss_chunk, config.model.logit_softcap
    if weights is not None:
        logprobs, _ = token_logprobs(hidden, head, targets, mask=mask, chunk=chunk, softcap=softcap)
        total = -jnp.sum(logprobs * jnp.where(mask, weights, 0.0))
        return total, jax.lax.stop_gradient(total)
    flat = hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1), mask.reshape(-1)
    implementation: Any = config.model.execution.cross_entropy or None  # a name that the kernel knows, by its rule
    total, each = fused_cross_entropy(*flat, z_loss_weight, chunk, implementation, softcap)
    return total, jnp.sum(each)


def mtp_loss_weight(config: RunConfig, step) -> jax.Array:
    """V3: 0.3 for the first 10T tokens, then 0.1."""
    mtp = config.model.mtp
    if not mtp.final_from_tokens:
        return jnp.float32(mtp.loss_weight)
    return jnp.where(step < step_at_tokens(config, mtp.final_from_tokens), mtp.loss_weight, mtp.final_loss_weight)
