"""Every implementation of the grouped matmul computes what a loop over the groups does, and its derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.grouped_matmul.api import IMPLEMENTATIONS

ROWS, INNER, OUT = 300, 6, 5  # more rows than any block of an implementation, and a multiple of none


def dense(lhs, rhs, sizes):
    """The definition, in numpy float64."""
    out, start = np.zeros((lhs.shape[0], rhs.shape[2])), 0
    for group, size in enumerate(sizes):
        out[start : start + size] = lhs[start : start + size].astype(np.float64) @ rhs[group].astype(np.float64)
        start += size
    return out


def dense_gradients(lhs, rhs, sizes, cotangent):
    """Of sum(out * cotangent) for both operands."""
    d_lhs, d_rhs, start = np.zeros(lhs.shape), np.zeros(rhs.shape), 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        d_lhs[rows] = cotangent[rows].astype(np.float64) @ rhs[group].T
        d_rhs[group] = lhs[rows].astype(np.float64).T @ cotangent[rows]
        start += size
    return d_lhs, d_rhs


def operands(groups, rows=ROWS, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    shapes = (rows, INNER), (groups, INNER, OUT), (rows, OUT)
    return [np.asarray(jnp.asarray(random.normal(size=shape), dtype)) for shape in shapes]


@pytest.fixture(scope="module", params=[*IMPLEMENTATIONS, None])
def run(request):
    """One implementation, compiled: (lhs, rhs, sizes, cotangent) to the product and both operands' gradients."""

    def run(lhs, rhs, sizes, cotangent):
        function = partial(grouped_matmul, group_sizes=sizes, implementation=request.param)
        out, pull = jax.vjp(function, lhs, rhs)
        return out, *pull(cotangent)

    return jax.jit(run)


def check(run, sizes, rows=ROWS, dtype=np.float32, tolerance=1e-5):
    lhs, rhs, cotangent = operands(len(sizes), rows, dtype)
    results = run(lhs, rhs, np.array(sizes, np.int32), cotangent)
    wanted = dense(lhs, rhs, sizes), *dense_gradients(lhs, rhs, sizes, cotangent)
    for result, operand, want in zip(results, (lhs, lhs, rhs), wanted, strict=True):
        assert result.dtype == operand.dtype
        scale = max(np.abs(want).max(), 1)
        np.testing.assert_allclose(np.asarray(result, np.float64), want, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([75, 75, 75, 75], id="even"),
        pytest.param([1, 120, 7, 172], id="ragged"),
        pytest.param([0, 150, 0, 150], id="empty groups"),
        pytest.param([0, 0, 300, 0], id="all in one"),
        pytest.param([0, 0, 0, 0], id="nothing at all"),
        pytest.param([1, 1, 1, 1], id="one row each, the rest beyond"),
        pytest.param([37, 0, 41, 100], id="rows beyond the sum"),
        pytest.param([257, 0, 0, 43], id="one row more than a block"),
    ],
)
def test_each_group_meets_its_own_matrix_and_rows_beyond_give_zeros(run, sizes):
    check(run, sizes)


@pytest.mark.parametrize("sizes", [[300], [299], [0]])
def test_a_single_group_is_a_matmul_of_its_rows(run, sizes):
    check(run, sizes)


def test_there_may_be_more_groups_than_rows(run):
    check(run, [0, 1, 0, 0, 2, 0, 1, 0, 0, 0, 1], rows=5)


def test_the_number_of_groups_may_be_prime(run):
    check(run, [100, 3, 0, 50, 17, 1, 129])


def test_bfloat16_stays_bfloat16(run):
    check(run, [37, 0, 41, 222], dtype=jnp.bfloat16, tolerance=2e-2)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, ROWS), min_size=5, max_size=5))
def test_any_group_sizes(run, cuts):
    check(run, [int(size) for size in np.diff(sorted(cuts))])  # groups may be empty, and may leave rows over


def test_an_unknown_implementation_is_refused_with_the_known_ones():
    lhs, rhs, _ = operands(2)
    with pytest.raises(ValueError, match="'cuda': must be one of .*reference"):
        grouped_matmul(lhs, rhs, jnp.array([1, 2]), implementation="cuda")
