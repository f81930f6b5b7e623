"""Windows score each token of a text once, with as much context as asked for; intervals hold what they should."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opendeep_jax.evaluation.intervals import bootstrap, interval_of, wilson
from opendeep_jax.evaluation.windows import windows


@given(count=st.integers(0, 60), length=st.integers(2, 20), data=st.data())
def test_every_token_but_the_first_is_scored_once_and_in_order(count, length, data):
    stride = data.draw(st.integers(1, length - 1))
    tokens = list(range(count))
    pieces = list(windows(tokens, length, stride))
    assert [token for piece in pieces for token in piece.tokens[piece.first :]] == tokens[1:]
    for number, piece in enumerate(pieces):
        assert 1 <= piece.first < len(piece.tokens) <= length
        assert len(piece.tokens) == min(length, count)  # all the context there is room for
        assert piece.tokens == tokens[piece.tokens[0] : piece.tokens[0] + len(piece.tokens)]
        assert number == 0 or piece.first >= length - stride


def test_wilson_is_known_and_sure_of_nothing_after_few_examples():
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    low, high = wilson(3, 3)
    assert high == 1 and 0.4 < low < 0.5
    assert wilson(0, 3) == pytest.approx((1 - high, 1 - low))


def test_the_bootstrap_agrees_with_the_normal_interval_of_a_mean():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = bootstrap(np.stack([values, np.ones(400)], 1), lambda sums: sums[:, 0] / sums[:, 1])
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)
    assert bootstrap(np.ones((1, 2)), lambda sums: sums[:, 0]) is None


def test_an_interval_is_wilsons_only_for_a_mean_of_zeros_and_ones():
    assert interval_of(0.5, 0.1, [0, 1]) == wilson(1, 2)
    assert interval_of(0.5, 0.1, [0.2, 0.8]) == pytest.approx((0.304, 0.696), abs=1e-3)
    assert interval_of(0.9, 0.1, [0, 1]) == pytest.approx((0.704, 1.096), abs=1e-3)  # no mean of these
    assert interval_of(0.5, None, []) is None
    assert interval_of(0.5, 0.1, [["a", "b"], ["c", "d"]]) == pytest.approx((0.304, 0.696), abs=1e-3)


def test_perplexities_have_intervals_of_their_own_scale():
    likelihoods = [-1.0, -2.0, -6.0, -3.0]
    low, high = interval_of(math.exp(3), 50.0, likelihoods)
    assert math.exp(1) <= low < math.exp(3) < high <= math.exp(6)
    pairs = [(-8.0, 4), (-1.0, 1), (-9.0, 5)]
    low, high = interval_of(18 / 10 / math.log(2), None, pairs)
    assert 1 / math.log(2) <= low < 18 / 10 / math.log(2) < high <= 2 / math.log(2)
    assert interval_of(math.exp(2), None, [(-8.0, 4)]) is None  # one example says nothing of others
