"""Whether an update is applied is decided on the device, by rules that plain numpy states as well."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opendeep_jax.config.operations import FaultsConfig
from opendeep_jax.train.health import FEWEST, WINDOW, Health, judge, new_health, robust_zscore


def history(*losses: float) -> Health:
    padded = [np.nan] * (WINDOW - len(losses)) + list(losses)
    return Health(jnp.array(padded, jnp.float32), jnp.int32(0))


STEADY = [4.0 + 0.1 * (-1) ** i for i in range(40)]


@pytest.mark.parametrize("loss, norm", [(np.nan, 1.0), (np.inf, 1.0), (-np.inf, 1.0), (4.0, np.nan), (4.0, np.inf)])
def test_what_is_not_finite_is_skipped_and_forgotten(loss, norm):
    before = history(*STEADY)
    verdict, after = judge(FaultsConfig(), before, jnp.float32(loss), jnp.float32(norm))
    assert not verdict.apply and after.skipped_in_a_row == 1
    np.testing.assert_array_equal(after.losses, before.losses)
    verdict, after = judge(FaultsConfig(), after, jnp.float32(4.0), jnp.float32(1.0))
    assert verdict.apply and after.skipped_in_a_row == 0 and after.losses[-1] == 4.0


@pytest.mark.parametrize("policy, applied", [("ignore", True), ("record", True), ("rollback", True), ("skip", False)])
def test_a_spike_is_skipped_on_the_device_only_if_the_policy_says_so(policy, applied):
    faults = FaultsConfig(spike_policy=policy, spike_zscore=5.0)
    verdict, _ = judge(faults, history(*STEADY), jnp.float32(6.0), jnp.float32(1.0))
    assert bool(verdict.apply) == applied and verdict.loss_zscore > 5


def test_a_falling_loss_and_the_first_steps_are_no_spikes():
    assert robust_zscore(history(*STEADY).losses, jnp.float32(1.0)) < 0
    assert robust_zscore(history(*STEADY[: FEWEST - 1]).losses, jnp.float32(100.0)) == 0
    assert robust_zscore(new_health().losses, jnp.float32(100.0)) == 0


def test_losses_that_hardly_differ_do_not_make_a_spike_of_a_breath():
    still = history(*[4.0] * 40).losses
    assert 0 < robust_zscore(still, jnp.float32(4.05)) < 3


@settings(max_examples=40)
@given(
    losses=st.lists(st.floats(0.125, 16, width=32), min_size=FEWEST, max_size=WINDOW),
    loss=st.floats(0.125, 64, width=32),
)
def test_the_z_score_is_the_robust_one_of_the_books(losses, loss):
    values = np.array(losses, np.float64)
    median = np.median(values)
    spread = max(1.4826 * np.median(np.abs(values - median)), 0.005 * median)
    expected = (loss - median) / spread
    assert robust_zscore(history(*losses).losses, jnp.float32(loss)) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_only_the_last_losses_are_remembered():
    health = new_health()
    for i in range(WINDOW + 5):
        _, health = judge(FaultsConfig(), health, jnp.float32(i), jnp.float32(1.0))
    np.testing.assert_array_equal(health.losses, np.arange(5, WINDOW + 5))
