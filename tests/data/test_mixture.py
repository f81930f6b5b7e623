import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.data.mixture import LONGEST_PERIOD, make_mixture

small_weights = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(small_weights)
@example([1, 1, 1])
@example([6, 3, 2, 2, 1, 1])
def test_every_prefix_is_less_than_one_row_off_the_shares(weights):
    mixture = make_mixture(weights)
    period = len(mixture.sources)
    shares = np.array(weights) / sum(weights)
    taken = np.cumsum(mixture.sources[:, None] == np.arange(len(weights)), axis=0)
    error = np.abs(taken - np.arange(1, period + 1)[:, None] * shares)
    assert error.max() < 1 - 1e-9
    np.testing.assert_allclose(error[-1], 0, atol=1e-6)


@given(small_weights, st.integers(0, 10**9))
def test_each_source_gives_its_rows_in_order_without_gaps(weights, start):
    mixture = make_mixture(weights)
    following: dict[int, int] = {}
    for index in range(start, start + 60):
        source, row = mixture.locate(index)
        assert row == following.get(source, row)
        following[source] = row + 1


def test_rows_of_each_source_begin_at_zero():
    mixture = make_mixture([0.7, 0.2, 0.1])
    located = [mixture.locate(index) for index in range(20)]
    assert len(mixture.sources) == 10
    for source, count in enumerate([14, 4, 2]):
        assert [row for found, row in located if found == source] == list(range(count))


def test_one_source_takes_every_row():
    assert [make_mixture([3.5]).locate(index) for index in (0, 7, 10**15)] == [(0, 0), (0, 7), (0, 10**15)]


def test_weights_without_a_short_pattern_are_rounded_and_none_is_lost():
    mixture = make_mixture([0.123456789, 1, 1e-9])
    assert abs(len(mixture.sources) - LONGEST_PERIOD) <= 3
    assert abs(mixture.counts[0] / mixture.counts[1] - 0.123456789) < 1e-4
    assert mixture.counts[2] == 1


@pytest.mark.parametrize("weights", [[0.0], [1.0, -1.0], [float("nan")]])
def test_weight_that_is_not_above_zero_is_refused(weights):
    with pytest.raises(ConfigError, match="above 0"):
        make_mixture(weights)
