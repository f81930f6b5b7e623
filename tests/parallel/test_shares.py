"""Shares give the number of the whole, however it is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.parallel.shares import Max, Mean, Sum, all_entries, combine, neutral, values

TERMS = np.random.default_rng(0).normal(-5, 1, 12).astype(np.float32)


def shares_of(terms):
    """Of some terms: their sum, mean and largest."""
    return {
        "sum": Sum(jnp.sum(terms)),
        "mean": Mean(jnp.sum(terms), jnp.float32(len(terms))),
        "max": Max(jnp.max(terms, initial=-jnp.inf)),
        "most": {"of integers": Max(jnp.int32(-len(terms)))},
    }


@given(st.lists(st.integers(0, 12), max_size=4))
def test_any_cut_gives_the_sum_mean_and_maximum_of_all_terms(cuts):
    total = neutral(jax.eval_shape(lambda: shares_of(TERMS)))
    for part in np.split(TERMS, sorted(cuts)):
        total = combine(total, shares_of(part))
    found = values(total)
    assert found["most"]["of integers"] == -min(map(len, np.split(TERMS, sorted(cuts))))
    for name, value in (("sum", TERMS.sum()), ("mean", TERMS.mean()), ("max", TERMS.max())):
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_stacked_layers_are_entries_of_one_number():
    layers = np.arange(6.0).reshape(2, 3)
    stacked = {"mean": Mean(layers.sum(1), np.array([3, 3])), "max": Max(layers.max(1)), "sum": Sum(layers.sum(1))}
    assert values(all_entries(stacked)) == {"mean": 2.5, "max": 5.0, "sum": 15.0}
    with pytest.raises(ConfigError, match=r"total has the shape \(2,\) and whose count \(\)"):
        all_entries({"mean": Mean(layers.sum(1), np.float32(6))})


@pytest.mark.parametrize("function", [lambda x: combine(x, x), neutral, values, all_entries])
def test_a_plain_number_has_no_way_to_meet_others(function):
    with pytest.raises(ConfigError, match="Make it a Sum, a Mean or a Max"):
        function({"loss": jnp.float32(1)})
