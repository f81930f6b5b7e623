"""Whether an update is applied is decided on the device, by rules that plain numpy states as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opendeep_jax.config.operations import FaultsConfig
from opendeep_jax.faults.health import (
    FEWEST,
    LOSS_SPREAD,
    NORM_SPREAD,
    PATIENCE,
    WINDOW,
    Health,
    after_skipped_batch,
    check_update,
    new_health,
    robust_zscore,
)

SKIP = FaultsConfig(spike_policy="skip", spike_zscore=5.0)
compiled = jax.jit(check_update, static_argnums=(0, 1))


def history(*losses: float, norms=()) -> Health:
    def padded(values):
        return jnp.array([np.nan] * (WINDOW - len(values)) + list(values), jnp.float32)

    return new_health()._replace(losses=padded(losses), norms=padded(norms or [1.0] * len(losses)))


def judged(losses, norms=None, faults=SKIP, borders=(), health=None, first=0):
    """Which updates of a series are applied, and the health after it."""
    health, applied = health or new_health(), []
    for step, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True), start=first):
        check, health = compiled(faults, borders, jnp.int32(step), health, jnp.float32(loss), jnp.float32(norm))
        applied.append(not bool(check.skipped))
    return applied, health


STEADY = [4.0 + 0.1 * (-1) ** i for i in range(40)]


@pytest.mark.parametrize("loss, norm", [(np.nan, 1.0), (np.inf, 1.0), (-np.inf, 1.0), (4.0, np.nan), (4.0, np.inf)])
def test_what_is_not_finite_is_skipped_and_forgotten(loss, norm):
    before = history(*STEADY)
    check, after = check_update(FaultsConfig(), (), jnp.int32(40), before, jnp.float32(loss), jnp.float32(norm))
    assert check.skipped and not check.spike and after.last_update == 0
    for name in ("losses", "norms", "high"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    check, after = check_update(FaultsConfig(), (), jnp.int32(41), after, jnp.float32(4.0), jnp.float32(1.0))
    assert not check.skipped and after.last_update == 42 and after.losses[-1] == 4.0


@pytest.mark.parametrize("policy, applied", [("ignore", True), ("record", True), ("rollback", True), ("skip", False)])
@pytest.mark.parametrize("loss, norm", [(6.0, 1.0), (4.0, 3.0)])
def test_a_spike_is_skipped_on_the_device_only_if_the_policy_says_so(policy, applied, loss, norm):
    faults = FaultsConfig(spike_policy=policy, spike_zscore=5.0)
    check, _ = check_update(faults, (), jnp.int32(40), history(*STEADY), jnp.float32(loss), jnp.float32(norm))
    assert bool(check.skipped) != applied and check.spike
    assert max(check.loss_zscore, check.grad_norm_zscore) > 5


def test_a_falling_loss_and_the_first_steps_are_no_spikes():
    assert robust_zscore(history(*STEADY).losses, jnp.float32(1.0), *LOSS_SPREAD) < 0
    assert robust_zscore(history(*STEADY[: FEWEST - 1]).losses, jnp.float32(100.0), *LOSS_SPREAD) == 0
    assert robust_zscore(new_health().losses, jnp.float32(100.0), *LOSS_SPREAD) == 0


def test_losses_that_hardly_differ_do_not_make_a_spike_of_a_breath():
    still = history(*[4.0] * 40).losses
    assert 0 < robust_zscore(still, jnp.float32(4.05), *LOSS_SPREAD) < 3
    around_zero = history(*[1e-5, -1e-5] * 20).losses
    assert 0 < robust_zscore(around_zero, jnp.float32(2e-3), *LOSS_SPREAD) < 3


def test_an_objective_that_names_no_scalar_is_checked_by_its_gradient_norm_and_finiteness_alone():
    before = history(*STEADY)
    for loss, norm, skipped in ((1e6, 1.0, False), (4.0, 30.0, True), (np.nan, 1.0, True)):
        given = jnp.int32(40), before, jnp.float32(loss), jnp.float32(norm), False
        check, after = check_update(SKIP, (), *given)
        assert bool(check.skipped) == skipped and check.loss_zscore == 0
        assert after_skipped_batch(SKIP, (), *given).last_update == 0


def test_rewards_that_rise_below_zero_are_no_spike_and_a_jump_up_is():
    """A policy's loss: small, of both signs, and falling."""
    random = np.random.default_rng(0)
    losses = list(random.normal(0, 0.02, 40) - np.linspace(0, 0.2, 40))
    assert all(judged([*losses, losses[-1] - 0.3])[0])
    assert judged([*losses, losses[-1] + 0.6])[0][-1] is False


@pytest.mark.parametrize("level", [-2.0, 0.0, 1e-6, 3.0])
def test_losses_of_any_sign_are_judged_by_their_distance(level):
    around = [level + 0.05 * (-1) ** i for i in range(40)]
    assert judged([*around, level + 0.1, level - 3.0, level + 3.0])[0] == [True] * 42 + [False]


def test_a_gradient_of_zero_is_no_measure_of_the_next_one():
    assert all(judged([0.0] * 60, [0.0] * 40 + [0.5] * 20)[0])


@settings(max_examples=40)
@given(
    losses=st.lists(st.floats(0.125, 16, width=32), min_size=FEWEST, max_size=WINDOW),
    loss=st.floats(0.125, 64, width=32),
    spread=st.sampled_from([LOSS_SPREAD, NORM_SPREAD]),
)
def test_the_z_score_is_the_robust_one_of_the_books(losses, loss, spread):
    values = np.array(losses, np.float64)
    median = np.median(values)
    wide = max(1.4826 * np.median(np.abs(values - median)), spread[0] * median, spread[1])
    found = robust_zscore(history(*losses).losses, jnp.float32(loss), *spread)
    assert found == pytest.approx((loss - median) / wide, rel=1e-3, abs=1e-3)


RANDOM = np.random.default_rng(0)
LEVELS = {
    "a new level": np.full(100, 8.0),
    "a new level that varies": 8.0 + RANDOM.exponential(3.0, 100),
    "every third batch of another kind": np.where(np.arange(100) % 3 == 0, 8.0, 4.0),
    "some batches of another kind": np.where(RANDOM.random(100) < 0.1, 7.0, 4.0),
    "rising for ever": 6.0 * 1.5 ** np.arange(100),
    "alternating kinds": np.array([6.0, 9.0] * 50),
}


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("what", ["loss", "norm"])
def test_a_lasting_change_is_learned_after_a_few_steps(name, what):
    """Whatever comes, no more than PATIENCE of the last eight are skipped, and of one height none after PATIENCE."""
    series = [*STEADY, *LEVELS[name]]
    one = [1.0] * len(series)
    applied, _ = judged(series, one) if what == "loss" else judged(one, series)
    skipped = np.flatnonzero(np.logical_not(applied))
    assert PATIENCE - 1 <= len(skipped) <= 2 * PATIENCE and skipped[0] >= len(STEADY)


def test_a_far_higher_spike_is_one_in_spite_of_lower_ones_before():
    series = [*STEADY, *[6.0, *STEADY[:20]] * 3, 6.0, 30.0]
    assert [series[i] for i in np.flatnonzero(np.logical_not(judged(series)[0]))] == [6.0, 6.0, 6.0, 30.0]


def test_the_windows_begin_anew_at_a_border_whether_its_step_is_trained_or_left_out():
    applied, _ = judged([*STEADY, *[9.0] * 30], borders=(40,))
    assert all(applied)
    _, before = judged(STEADY, borders=(40,))
    after = after_skipped_batch(SKIP, (40,), jnp.int32(40), before, jnp.float32(np.nan), jnp.float32(np.nan))
    assert jnp.isnan(after.losses).all() and after.stretch == 1 and after.last_update == 40
    assert all(judged([9.0] * 30, borders=(40,), health=after, first=41)[0])


def test_what_is_left_out_is_remembered_as_what_the_device_skips():
    _, before = judged(STEADY)
    _, skipped = judged([30.0], health=before, first=40)
    left_out = after_skipped_batch(SKIP, (), jnp.int32(40), before, jnp.float32(30.0), jnp.float32(1.0))
    for one, other in zip(skipped, left_out, strict=True):
        np.testing.assert_array_equal(one, other)
    assert left_out.high[-1] == 1


def test_only_the_last_losses_are_remembered():
    health = new_health()
    for i in range(WINDOW + 5):
        _, health = compiled(FaultsConfig(), (), jnp.int32(i), health, jnp.float32(i), jnp.float32(1.0))
    np.testing.assert_array_equal(health.losses, np.arange(5, WINDOW + 5))
