"""Whether a step's update may be applied, decided on the device, so that the loop never waits to know.

An update is skipped where the loss or the gradient's norm is not finite, and, if the policy says so, where the loss is
a spike: far above the median of the last good ones, in robust standard deviations. A skipped step leaves parameters,
moments and router biases as they were; its number still counts, so every batch belongs to the same step as ever.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opendeep_jax.config.operations import FaultsConfig

WINDOW = 128
"""Good losses that a new one is compared with."""
FEWEST = 16
"""Before so many are there, no loss is called a spike."""
SMALLEST_SPREAD = 0.005
"""Of the median: losses that hardly differ would make a spike of every breath."""


class Health(NamedTuple):
    """What judging a step needs of those before it; part of the training state, and of its checkpoints."""

    losses: Float[Array, "window"]
    """Losses of the last steps whose update was applied, the newest last; NaN where there are none yet."""
    skipped_in_a_row: Int[Array, ""]
    """Updates skipped since the last one that was applied."""


class Verdict(NamedTuple):
    """What is said of a step."""

    apply: Bool[Array, ""]
    loss_zscore: Float[Array, ""]
    """Robust standard deviations above the median; 0 while there are too few losses."""


def new_health() -> Health:
    """Of a run that has not begun."""
    return Health(jnp.full((WINDOW,), jnp.nan, jnp.float32), jnp.int32(0))


def judge(faults: FaultsConfig, health: Health, loss: jax.Array, grad_norm: jax.Array) -> tuple[Verdict, Health]:
    """Says whether the step with this loss and gradient norm may be applied, and what is known afterwards."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    zscore = robust_zscore(health.losses, loss)
    apply = finite
    if faults.spike_policy == "skip":
        apply &= ~(zscore > faults.spike_zscore)
    losses = jnp.roll(health.losses, -1).at[-1].set(loss)
    in_a_row = jnp.where(apply, 0, health.skipped_in_a_row + 1)
    return Verdict(apply, zscore), Health(jnp.where(apply, losses, health.losses), in_a_row)


def robust_zscore(losses: Float[Array, "window"], loss: jax.Array) -> jax.Array:
    """(loss - median) / (1.4826 MAD), the spread at least SMALLEST_SPREAD of the median; NaN losses don't count."""
    median = jnp.nanmedian(losses)
    spread = 1.4826 * jnp.nanmedian(jnp.abs(losses - median))
    spread = jnp.maximum(spread, SMALLEST_SPREAD * jnp.abs(median))
    enough = jnp.sum(jnp.isfinite(losses)) >= FEWEST
    return jnp.where(enough & jnp.isfinite(loss), (loss - median) / jnp.maximum(spread, 1e-30), 0.0)
