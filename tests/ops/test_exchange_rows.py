"""Copies of rows and sums of copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendeep_jax.ops import exchange_rows
from opendeep_jax.ops.exchange_rows import NOWHERE, CopySlots, copies, segments, sums

ROWS, COPIES, WIDTH = 300, 700, 3


def crowded():
    """Copies of 300 rows of which some have many, most none; every fifth is absent and holds NaN."""
    random = np.random.default_rng(0)
    source = np.minimum(random.geometric(0.02, COPIES) - 1 + 200 * (random.uniform(size=COPIES) < 0.1), ROWS - 1)
    source[::5] = NOWHERE
    rows = random.normal(size=(COPIES, WIDTH)).astype(np.float32)
    rows[::5] = np.nan
    want = np.zeros((ROWS, WIDTH))
    np.add.at(want, source[source < NOWHERE], rows[source < NOWHERE])
    return jnp.asarray(rows), segments(jnp.int32(source)), want


@pytest.mark.parametrize("form", [exchange_rows.add_rows, exchange_rows.sum_blocks])
def test_absent_copies_count_for_nothing_and_rows_without_copies_are_zero(form):
    rows, index, want = crowded()
    np.testing.assert_allclose(jax.jit(form, static_argnums=2)(rows, index, ROWS), want, atol=1e-5)


@pytest.mark.parametrize("form", [CopySlots, segments])
def test_copying_and_summing_are_each_others_derivative(form):
    random = np.random.default_rng(1)
    source = jnp.int32([2, 0, 2, 3, 0])
    places = jnp.int32([[1, 0, 0, 3], [4, 0, 2, 0]])
    present = jnp.asarray([[1, 0, 1, 1], [1, 0, 1, 0]], bool)
    index = CopySlots(source, places, present) if form is CopySlots else segments(source)
    rows, made = (jnp.asarray(random.normal(size=(size, WIDTH)), jnp.float32) for size in (4, 5))
    summed = jnp.zeros_like(rows).at[source].add(made)

    copied, to_rows = jax.vjp(lambda rows: copies(rows, index), rows)
    np.testing.assert_array_equal(copied, rows[source])
    np.testing.assert_allclose(to_rows(made)[0], summed, atol=1e-6)
    total, to_copies = jax.vjp(lambda made: sums(made, index, 4), made)
    np.testing.assert_allclose(total, summed, atol=1e-6)
    np.testing.assert_array_equal(to_copies(rows)[0], rows[source])
