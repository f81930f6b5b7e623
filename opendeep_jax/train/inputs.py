"""A batch as the per-device program takes it, made before devices divide it.

B batch, L length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from opendeep_jax.data.batch import Batch
from opendeep_jax.models.decoder import shift_left
from opendeep_jax.parallel.axes import balanced_order


class MTPTargets(NamedTuple):
    """What one MTP module reads and predicts, each [B, L]."""

    tokens: jax.Array
    targets: jax.Array
    loss_mask: jax.Array


class Inputs(NamedTuple):
    """A batch as the per-device program takes it. All that looks beyond a device's part of a row is in it already."""

    batch: Batch
    mtp: tuple[MTPTargets, ...]
    order: jax.Array | None
    """Index of each position in its row, where rows are divided over `context`; else None."""


def make_inputs(batch: Batch, depth: int, mesh) -> Inputs:
    """The batch with what `depth` MTP modules predict, in the order in which `context` divides it."""
    masks = mtp_masks(batch.loss_mask, depth)
    mtp = tuple(
        MTPTargets(shift_left(batch.targets, k - 1), shift_left(batch.targets, k), mask)
        for k, mask in enumerate(masks, 1)
    )
    context = 1 if mesh.empty else mesh.shape["context"]
    if context == 1:
        return Inputs(batch, mtp, None)
    order = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1], dtype=jnp.int32), batch.tokens.shape)
    inputs = Inputs(batch, mtp, order)
    return jax.tree.map(lambda x: jnp.take(x, balanced_order(x.shape[1], context), axis=1), inputs)


class TargetCounts(NamedTuple):
    """What each sum of the global batch's loss is divided by."""

    targets: jax.Array
    """Valid targets of the main model, float32."""
    mtp_targets: list[jax.Array]
    """Valid targets of each MTP module, float32."""
    rows: jax.Array
    """Rows of the batch that are not padding, float32."""


def target_counts(batch: Batch, depth: int) -> TargetCounts:
    """Counts a global batch for the main model and `depth` MTP modules; at least 1 target each, as it divides."""
    masks = [batch.loss_mask, *mtp_masks(batch.loss_mask, depth)]
    counts = [jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0) for mask in masks]
    rows = jnp.sum(jnp.any(batch.segment_ids > 0, axis=1), dtype=jnp.float32)
    return TargetCounts(counts[0], counts[1:], jnp.maximum(rows, 1.0))


def mtp_masks(loss_mask: jax.Array, depth: int) -> list[jax.Array]:
    """Where module k = 1, 2, … has a target: the k + 1 tokens after a position all belong to its document."""
    masks, mask = [], loss_mask
    for k in range(1, depth + 1):
        mask = mask & shift_left(loss_mask, k)
        masks.append(mask)
    return masks
