"""Every implementation of the grouped matmul computes what a loop over the groups does, and its derivatives."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.grouped_matmul import api, grouped_matmul, grouped_swiglu, tpu

ROWS, INNER, OUT = 300, 6, 5  # more rows than any block of an implementation, and a multiple of none
HERE = "blocks", "ragged_dot", "reference", None, "mosaic, interpreted"


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


def matmul_and_swiglu(name):
    """Both functions by one implementation, callable on a CPU."""
    if name == "mosaic, interpreted":
        return [partial(f, interpret=pltpu.InterpretParams()) for f in (tpu.grouped_matmul, tpu.grouped_swiglu)]
    return [partial(f, implementation=name) for f in (grouped_matmul, grouped_swiglu)]


@functools.cache
def compiled(name):
    """One implementation's grouped_matmul: (lhs, rhs, sizes, cotangent) to the product and both gradients."""

    def run(lhs, rhs, sizes, cotangent):
        out, pull = jax.vjp(partial(matmul_and_swiglu(name)[0], group_sizes=sizes), lhs, rhs)
        return out, *pull(cotangent)

    return jax.jit(run)


@functools.cache
def compiled_swiglu(name):
    """As `compiled`: (lhs, gate, up, row weights or None, sizes, cotangent) to the product and all gradients."""

    def run(lhs, gate, up, row_weights, sizes, cotangent):
        function = matmul_and_swiglu(name)[1]
        out, pull = jax.vjp(lambda lhs, *ws: function(lhs, *ws[:2], sizes, *ws[2:]), lhs, gate, up, row_weights)
        return out, *pull(cotangent)

    return jax.jit(run)


@pytest.fixture(scope="module", params=HERE)
def run(request):
    """The compiled grouped_matmul of each implementation."""
    return compiled(request.param)


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


sizes_of_groups = st.lists(st.integers(0, ROWS), min_size=5, max_size=5).map(
    lambda cuts: [int(size) for size in np.diff(sorted(cuts))]  # groups may be empty, and may leave rows over
)


@settings(max_examples=12, deadline=None)
@given(sizes=sizes_of_groups)
def test_any_group_sizes(run, sizes):
    check(run, sizes)


@pytest.mark.parametrize("name", [name for name in HERE if name != "ragged_dot"])
def test_what_lies_beyond_the_groups_never_counts(name):
    sizes = [37, 0, 41, 100]
    lhs, rhs, cotangent = operands(len(sizes))
    row_weights = operands(1, seed=2)[0][:, 0]
    clean = [*compiled(name)(lhs, rhs, np.array(sizes, np.int32), cotangent)]
    clean += compiled_swiglu(name)(lhs, rhs, rhs, row_weights, np.array(sizes, np.int32), cotangent)
    lhs, cotangent, row_weights = (operand.copy() for operand in (lhs, cotangent, row_weights))
    for operand in (lhs, cotangent, row_weights):
        operand[sum(sizes) :] = np.nan
    results = [*compiled(name)(lhs, rhs, np.array(sizes, np.int32), cotangent)]
    results += compiled_swiglu(name)(lhs, rhs, rhs, row_weights, np.array(sizes, np.int32), cotangent)
    for result, want in zip(results, clean, strict=True):
        np.testing.assert_array_equal(result, want)


def swiglu(lhs, gate, up, row_weights, sizes):
    """The definition, in numpy float64."""
    gated, upped = dense(lhs, gate, sizes), dense(lhs, up, sizes)
    return gated / (1 + np.exp(-gated)) * upped * (1 if row_weights is None else row_weights[:, None])


def swiglu_gradients(lhs, gate, up, row_weights, sizes, cotangent):
    """Of sum(swiglu * cotangent) for lhs, gate, up and row_weights, in numpy float64."""
    gated, upped = dense(lhs, gate, sizes), dense(lhs, up, sizes)
    sigmoid = 1 / (1 + np.exp(-gated))
    d_hidden = cotangent.astype(np.float64) * (1 if row_weights is None else row_weights[:, None])
    d_gated = d_hidden * upped * sigmoid * (1 + gated * (1 - sigmoid))
    from_gate = dense_gradients(lhs, gate, sizes, d_gated)
    from_up = dense_gradients(lhs, up, sizes, d_hidden * gated * sigmoid)
    d_weights = None if row_weights is None else np.sum(cotangent * gated * sigmoid * upped, axis=1)
    return from_gate[0] + from_up[0], from_gate[1], from_up[1], d_weights


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("sizes", [[1, 120, 7, 172], [37, 0, 41, 100], [0, 0, 0, 0]])
def test_swiglu_is_gated_and_weighted_and_its_gradients_reach_every_operand(name, sizes, weighted):
    lhs, gate, cotangent = operands(len(sizes))
    up, row_weights = operands(len(sizes), seed=1)[1], operands(1, seed=2)[0][:, 0] if weighted else None
    arguments = lhs, gate, up, row_weights
    wanted = swiglu(*arguments, sizes), *swiglu_gradients(*arguments, sizes, cotangent)
    for result, want in zip(
        compiled_swiglu(name)(*arguments, np.array(sizes, np.int32), cotangent), wanted, strict=True
    ):
        assert (result is None) == (want is None)
        if want is not None:
            scale = max(np.abs(want).max(), 1)
            np.testing.assert_allclose(np.asarray(result, np.float64), want, atol=1e-5 * scale, rtol=0)


def test_every_implementation_has_both_functions():
    tables = api.IMPLEMENTATIONS, api.SWIGLU_IMPLEMENTATIONS
    matmul, swiglu = ({name: where for name, (_, where) in table.items()} for table in tables)
    assert matmul == swiglu


@pytest.mark.parametrize("function", [grouped_matmul, grouped_swiglu])
def test_an_unknown_implementation_is_refused_with_the_known_ones(function):
    lhs, rhs, _ = operands(2)
    weights = [rhs] * (1 if function is grouped_matmul else 2)
    with pytest.raises(ValueError, match="'cuda': must be one of .*reference"):
        function(lhs, *weights, jnp.array([1, 2]), implementation="cuda")


def test_an_implementation_that_the_platform_lacks_is_refused_with_those_that_it_has():
    lhs, rhs, _ = operands(2)
    with pytest.raises(NotImplementedError, match="'mosaic' runs on tpu, and this program is for cpu.*blocks"):
        grouped_matmul(lhs, rhs, jnp.array([1, 2]), implementation="mosaic")
