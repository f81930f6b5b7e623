from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.data.mixture import LONGEST_PERIOD, make_mixture


def located(mixture, indices):
    return list(zip(*(part.tolist() for part in mixture.locate(np.array(list(indices)))), strict=True))


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
    for source, row in located(mixture, range(start, start + 60)):
        assert row == following.get(source, row)
        following[source] = row + 1


def test_rows_of_each_source_begin_at_zero():
    mixture = make_mixture([0.7, 0.2, 0.1])
    rows = located(mixture, range(20))
    assert len(mixture.sources) == 10
    for source, count in enumerate([14, 4, 2]):
        assert [row for found, row in rows if found == source] == list(range(count))


@given(small_weights, st.integers(0, 10**12))
def test_index_of_a_sources_row_is_the_way_back(weights, index):
    mixture = make_mixture(weights)
    (found,) = located(mixture, [index])
    assert mixture.index_of(*found) == index


@given(small_weights, st.integers(0, 500))
def test_rows_taken_from_each_source_are_those_located(weights, rows):
    mixture = make_mixture(weights)
    counted = np.bincount(mixture.locate(np.arange(rows))[0], minlength=len(weights))
    assert mixture.taken(rows).tolist() == counted.tolist()


def test_a_source_without_weight_gives_no_row():
    mixture = make_mixture([2, 0, 1])
    assert mixture.taken(300).tolist() == [200, 0, 100]


def test_one_source_takes_every_row():
    assert located(make_mixture([3.5]), (0, 7, 10**15)) == [(0, 0), (0, 7), (0, 10**15)]


def test_weights_of_older_runs_without_a_short_pattern_are_rounded_and_none_is_lost():
    mixture = make_mixture([0.123456789, 1, 1e-9], exact=False)
    assert abs(len(mixture.sources) - LONGEST_PERIOD) <= 3
    assert abs(mixture.counts[0] / mixture.counts[1] - 0.123456789) < 1e-4
    assert mixture.counts[2] == 1


@pytest.mark.parametrize("weights", [[0.0], [], [1.0, -1.0], [float("nan")]])
def test_weights_below_zero_and_none_above_are_refused(weights):
    with pytest.raises(ConfigError, match="one above 0"):
        make_mixture(weights)


LONG = [(15e12, 3e6), (14.8e12, 1.1e9, 7.3e8), (0.123456789, 0.876543211), (1, 1e-9, 1, 2.00000001), (7.1e9, 0, 3e5)]


@pytest.mark.parametrize("weights", LONG)
@pytest.mark.parametrize("rows", [1, 999, 10_000_000, 3_600_000_001])
def test_weights_of_any_proportion_are_less_than_one_row_off(weights, rows):
    shares = np.array(weights) / sum(weights)
    mixture = make_mixture(weights)
    for n in range(rows, rows + 300):
        assert np.abs(mixture.taken(n) - shares * n).max() < 1
    assert mixture.taken(rows).sum() == rows


@given(st.lists(st.floats(1e-9, 1e15, allow_subnormal=False), min_size=2, max_size=6), st.integers(0, 10**10))
def test_exact_mixtures_are_less_than_one_row_off_and_invertible_everywhere(weights, start):
    mixture = make_mixture(weights)
    before, exact = mixture.taken(start), [Fraction(str(weight)) for weight in weights]
    for n in range(start, start + 12):
        ((source,), (row,)) = mixture.locate(np.array([n]))
        after = mixture.taken(n + 1)
        assert row == before[source] and mixture.index_of(source, row) == n
        assert (after - before).tolist() == [int(i == source) for i in range(len(weights))]
        before = after
        for count, weight in zip(after.tolist(), exact, strict=True):
            assert abs(count - weight / sum(exact) * (n + 1)) <= 1
