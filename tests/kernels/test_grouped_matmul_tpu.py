"""The TPU kernels of the grouped matmul, in Pallas' TPU interpreter: several tiles each way, and no races."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from test_grouped_matmul import dense, dense_gradients

from kernels_pallas.grouped_matmul import tpu, tpu_groups, tpu_rows
from kernels_pallas.grouped_matmul.visits import groups_visits, rows_visits

ROWS, INNER, OUT = 200, 256, 640


def operands(groups, seed=0):
    random = np.random.default_rng(seed)
    shapes = (ROWS, INNER), (groups, INNER, OUT), (ROWS, OUT)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("chunk, sub", [(128, 128), (256, 256)])  # of 640 columns: 256 + 256 + 128
@pytest.mark.parametrize("transposed", [False, True])
def test_several_tiles_of_rows_columns_and_contraction_make_one_product(chunk, sub, transposed):
    sizes = [37, 0, 41, 100]
    lhs, rhs, _ = operands(len(sizes))
    tiles = tpu_rows.RowsTiles(
        rows=64, granule=32, edge=16, columns=256, sub_columns=128, chunk=chunk
    )  # 640 = 256 + 256 + 128
    lhs[sum(sizes) :] = np.nan
    matrices = rhs.swapaxes(1, 2) if transposed else rhs
    product = jax.jit(
        lambda *operands: tpu_rows.rows_by_groups(
            [operands[0]],
            [operands[1]],
            operands[2],
            transposed=transposed,
            tiles=tiles,
            interpret=pltpu.InterpretParams(),
        )[0]
    )
    np.testing.assert_allclose(product(lhs, matrices, np.array(sizes)), dense(lhs, rhs, sizes), atol=1e-3)


def test_several_tiles_make_one_gradient_of_the_weights():
    sizes = [37, 0, 41, 100]
    lhs, rhs, cotangent = operands(len(sizes))
    tiles = tpu_groups.GroupsTiles(rows=64, granule=32, inner=128, columns=256, sub_inner=128, sub_columns=256)
    want = dense_gradients(lhs, rhs, sizes, cotangent)[1]
    lhs[sum(sizes) :] = cotangent[sum(sizes) :] = np.nan
    gradient = jax.jit(
        lambda *operands: tpu_groups.groups_from_rows(
            *operands, dtype=jnp.float32, tiles=tiles, interpret=pltpu.InterpretParams()
        )
    )
    np.testing.assert_allclose(gradient(lhs, cotangent, np.array(sizes)), want, atol=1e-3)


def test_two_cores_that_share_the_columns_do_not_race(watching):
    sizes = np.array([37, 0, 41, 100])
    lhs, rhs, cotangent = operands(len(sizes))

    def run(lhs, rhs, sizes, cotangent):
        out, pull = jax.vjp(lambda lhs, rhs: tpu.grouped_matmul(lhs, rhs, sizes, interpret=watching), lhs, rhs)
        return out, *pull(cotangent)

    results = jax.jit(run)(lhs, rhs, sizes, cotangent)
    wanted = dense(lhs, rhs, sizes), *dense_gradients(lhs, rhs, sizes, cotangent)
    for result, want in zip(results, wanted, strict=True):
        np.testing.assert_allclose(result, want, atol=1e-3)


GROUPS, MOST = 5, 500
group_sizes = st.lists(st.integers(0, 90), min_size=GROUPS, max_size=GROUPS)
tile_sizes = st.sampled_from([48, 64])
rows_visits_of, groups_visits_of = (
    jax.jit(partial(visits, num_rows=MOST), static_argnames="tile") for visits in (rows_visits, groups_visits)
)


def visits_of(function, sizes, tile):
    visits, count = function(np.array(sizes, np.int32), tile=tile)
    return jax.tree.map(np.asarray, visits), int(count)


@given(sizes=group_sizes, tile=tile_sizes)
def test_visits_cover_every_group_and_write_every_tile(sizes, tile):
    visits, count = visits_of(rows_visits_of, sizes, tile)
    pairs = list(zip(visits.group[:count], visits.tile[:count], strict=True))
    edges = np.concatenate([[0], np.cumsum(sizes)])
    wanted = {(group, row // tile) for group in range(GROUPS) for row in range(edges[group], edges[group + 1])}
    wanted |= {(GROUPS, beyond) for beyond in range(-(-sum(sizes) // tile), -(-MOST // tile))}
    assert len(pairs) == len(wanted) and set(pairs) == wanted
    assert np.all(np.diff(visits.tile[:count]) >= 0)  # a tile stays in place while it is written


@given(sizes=group_sizes, tile=tile_sizes)
def test_each_group_with_rows_is_fetched_while_the_one_before_is_multiplied(sizes, tile):
    visits, _ = visits_of(rows_visits_of, sizes, tile)
    with_rows = [group for group, size in enumerate(sizes) if size]
    assert [visits.turn[group] for group in with_rows] == list(range(len(with_rows)))
    assert [visits.following[group] for group in with_rows] == [*with_rows[1:], GROUPS][: len(with_rows)]


@given(sizes=group_sizes, tile=tile_sizes)
def test_visits_for_the_weights_reach_every_group_even_if_empty(sizes, tile):
    visits, count = visits_of(groups_visits_of, sizes, tile)
    group = visits.group[:count]
    assert set(group) == set(range(GROUPS)) and np.all(np.diff(group) >= 0)
    assert np.all(visits.tile[:count] < -(-MOST // tile))
    assert count <= sum(-(-size // tile) + 1 for size in sizes)
