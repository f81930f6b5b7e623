"""Choosing experts (DeepSeek-V3 report, section 2.1.2; V2 report, section 2.2).

Departs from the reports in nothing; scores are float32 whatever the compute dtype.
B batch, L length, E experts, K chosen per token, N groups of experts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opendeep_jax.config.rules import LENGTH_AXES
from opendeep_jax.parallel.collectives import axis_size, psum

SCORES = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}
"""Nonnegative scores from the router's logits [B, L, E], by the names of `MoEConfig.scoring`."""


def route(
    logits: Float[Array, "B L E"], bias: Float[Array, "E"] | None, moe
) -> tuple[Float[Array, "B L K"], Int[Array, "B L K"], Float[Array, "B L E"]]:
    """Return the chosen experts' weights and indices, and all scores.

    Selection goes by `score + bias` inside the groups that a token keeps; the weights are the scores without bias,
    normalized over the chosen if `moe.normalize_weights`, times `moe.routed_scaling_factor`.
    """
    scores = SCORES[moe.scoring](logits)
    selection = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    if moe.num_groups > 1:
        selection = jnp.where(kept_groups(selection, moe), selection, -jnp.inf)
    _, indices = jax.lax.top_k(selection, moe.experts_per_token)
    weights = jnp.take_along_axis(scores, indices, axis=-1)
    if moe.normalize_weights:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * moe.routed_scaling_factor, indices, scores


def kept_groups(selection: Float[Array, "B L E"], moe) -> Bool[Array, "B L E"]:
    """True for the experts of the `groups_per_token` best groups of each token (node-limited routing)."""
    grouped = selection.reshape(*selection.shape[:-1], moe.num_groups, -1)
    if moe.group_score == "top2_sum":
        group_scores = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    else:
        group_scores = jnp.max(grouped, axis=-1)
    _, kept = jax.lax.top_k(group_scores, moe.groups_per_token)
    mask = jnp.any(jax.nn.one_hot(kept, moe.num_groups, dtype=jnp.bool_), axis=-2)
    return jnp.repeat(mask, grouped.shape[-1], axis=-1)


def expert_counts(indices: Int[Array, "B L K"], valid: Bool[Array, "B L"], num_experts: int) -> Int[Array, "B E"]:
    """Count the tokens of each row that chose each expert; positions that are not `valid` (padding) don't count."""
    chosen = (indices[..., None] == jnp.arange(num_experts)) & valid[:, :, None, None]
    return jnp.sum(chosen, axis=(1, 2), dtype=jnp.int32)


def sequence_balance_loss(
    scores: Float[Array, "B L E"], counts: Int[Array, "B E"], valid: Bool[Array, "B L"], experts_per_token: int
) -> Float[Array, "B"]:
    """V3's sequence-wise balance loss of each row, `sum_e f_e P_e` (equations 17 to 20), without its weight.

    `f_e = E / (K T) * count_e` carries no gradient; `P_e` is the mean of the row's normalized scores. Where rows are
    divided over devices, T, counts and means are the whole row's, and each device returns an equal share of the loss.
    """
    row_tokens, row_counts = psum((jnp.sum(valid, axis=1, dtype=jnp.float32), counts), LENGTH_AXES)
    row_tokens = jnp.maximum(row_tokens, 1.0)[:, None]
    fraction = row_counts * (scores.shape[-1] / experts_per_token) / row_tokens
    share = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    mean_share = psum(jnp.sum(jnp.where(valid[..., None], share, 0.0), axis=1), LENGTH_AXES) / row_tokens
    return jnp.sum(jax.lax.stop_gradient(fraction) * mean_share, axis=-1) / axis_size(LENGTH_AXES)


def updated_bias(bias: Float[Array, "... E"], load: Int[Array, "... E"], speed) -> Float[Array, "... E"]:
    """Move each bias by `speed` towards balance: up where the global load is below its mean, down where above."""
    load = load.astype(jnp.float32)
    return bias + speed * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
