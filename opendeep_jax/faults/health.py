"""Check of a step's update on the device, so that the loop never waits for it.

An update is skipped where the loss or the gradient's norm is not finite, and, if the policy says so, where one of them
is a spike: far above the median of the last ones, in robust standard deviations. A skipped step leaves parameters,
moments and router biases as they were; its number still counts, so every batch belongs to the same step as ever.

What is finite enters the windows, skipped or not, so that text of another kind is skipped a few times and then known.
Where the configuration itself changes what a loss is compared with (`config.schedule.borders`) they begin anew.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opendeep_jax.config.operations import FaultsConfig

WINDOW = 128
"""Steps that a new one is compared with."""
FEWEST = 16
"""Minimum number of values before any is judged a spike."""
PATIENCE = 3
"""So many spikes at least half as high among those steps, or of any height among the last RECENT, and the next one is
none: it is how the text is by now."""
RECENT = 8
LOSS_SPREAD = 0.005, 1e-3
"""The smallest spread of losses, of the median and by itself: losses that hardly differ would make a spike of every
breath, and those of some objectives lie around 0."""
NORM_SPREAD = 0.1, 1e-6
"""Minimum spread of gradient norms, which vary more."""


class Health(NamedTuple):
    """Statistics of past steps for checking an update; part of the training state, and of its checkpoints."""

    losses: Float[Array, "window"]
    """Losses, whatever the objective has judged, of the last steps that were finite, the newest last; NaN where there
    are none yet."""
    norms: Float[Array, "window"]
    """Their gradient norms; NaN for 0, which says nothing of the next one."""
    high: Int[Array, "window"]
    """1 for those of them that were above the threshold, else 0."""
    last_update: Int[Array, ""]
    """The last step (from 1) whose update was applied; 0 for none. Weights are the same from there on."""
    stretch: Int[Array, ""]
    """Number of schedule borders before the windows' steps."""


class UpdateCheck(NamedTuple):
    """Result of an update's check, and the statistics behind it."""

    skipped: Bool[Array, ""]
    spike: Bool[Array, ""]
    loss: Float[Array, ""]
    """The scalar that the objective has judged."""
    grad_norm: Float[Array, ""]
    loss_zscore: Float[Array, ""]
    """Robust standard deviations above the median; 0 while there are too few steps, or where no loss is judged."""
    grad_norm_zscore: Float[Array, ""]


def new_health(step: int = 0) -> Health:
    """Return the health of a run that begins with the state after `step`."""
    losses, norms = (jnp.full((WINDOW,), jnp.nan, jnp.float32) for _ in range(2))
    return Health(losses, norms, jnp.zeros((WINDOW,), jnp.int32), jnp.int32(step), jnp.int32(0))


def check_update(
    faults: FaultsConfig,
    borders: tuple[int, ...],
    step,
    health: Health,
    loss: jax.Array,
    grad_norm: jax.Array,
    judge_loss: bool = True,
) -> tuple[UpdateCheck, Health]:
    """Decide whether the update of `step` (from 0) is applied, and return the updated statistics.

    Args:
        borders: first steps (from 0) of the stretches whose losses are not compared with those before.
        loss: any scalar that is better the lower it is; it may lie around 0 or below.
        judge_loss: whether a high loss is a spike; else only the gradient norm's is, and the loss has to be finite.
    """
    health = _begin_stretch(borders, step, health)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    loss_zscore = robust_zscore(health.losses, loss, *LOSS_SPREAD) if judge_loss else jnp.float32(0)
    norm_zscore = robust_zscore(health.norms, grad_norm, *NORM_SPREAD)
    high_loss, high_norm = (finite & (zscore > faults.spike_zscore) for zscore in (loss_zscore, norm_zscore))
    spike = high_loss & ~_is_known(health.losses, health.high, loss)
    spike |= high_norm & ~_is_known(health.norms, health.high, grad_norm)
    apply = finite & ~spike if faults.spike_policy == "skip" else finite
    windows = {
        "losses": _pushed(health.losses, loss),
        "norms": _pushed(health.norms, jnp.where(grad_norm > 0, grad_norm, jnp.nan)),
        "high": _pushed(health.high, (high_loss | high_norm).astype(jnp.int32)),
    }
    kept = {name: jnp.where(finite, window, getattr(health, name)) for name, window in windows.items()}
    after = health._replace(**kept, last_update=jnp.where(apply, step + 1, health.last_update))
    return UpdateCheck(~apply, spike, loss, grad_norm, loss_zscore, norm_zscore), after


def after_skipped_batch(
    faults: FaultsConfig, borders: tuple[int, ...], step, health: Health, loss, grad_norm, judge_loss: bool = True
) -> Health:
    """Return the health after a step whose batch is skipped. What is known of it (else NaN) enters the windows, as it
    does where the device skips its update."""
    _, after = check_update(faults, borders, step, health, loss, grad_norm, judge_loss)
    return after._replace(last_update=health.last_update)


def robust_zscore(values: Float[Array, "window"], value: jax.Array, relative: float, absolute: float) -> jax.Array:
    """(value - median) / (1.4826 MAD), the spread not below `relative` of the median or `absolute`; NaN don't count."""
    median = jnp.nanmedian(values)
    spread = 1.4826 * jnp.nanmedian(jnp.abs(values - median))
    spread = jnp.maximum(spread, jnp.maximum(relative * jnp.abs(median), absolute))
    enough = jnp.sum(jnp.isfinite(values)) >= FEWEST
    return jnp.where(enough & jnp.isfinite(value), (value - median) / spread, 0.0)


def _is_known(values: Float[Array, "window"], high: Int[Array, "window"], value: jax.Array) -> Bool[Array, ""]:
    """Return whether a high value is among those frequent enough to be expected."""
    above = values - jnp.nanmedian(values)
    alike = (high > 0) & (above >= 0.5 * (value - jnp.nanmedian(values)))
    return (jnp.sum(alike) >= PATIENCE) | (jnp.sum(high[-RECENT:]) >= PATIENCE)


def _begin_stretch(borders: tuple[int, ...], step, health: Health) -> Health:
    """Clear the windows if a schedule border lies between their steps and `step`."""
    stretch = sum(((step >= border).astype(jnp.int32) for border in borders), start=jnp.int32(0))
    empty, same = new_health(), stretch == health.stretch
    kept = {name: jnp.where(same, getattr(health, name), getattr(empty, name)) for name in ("losses", "norms", "high")}
    return health._replace(**kept, stretch=stretch)


def _pushed(window: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.roll(window, -1).at[-1].set(value)
