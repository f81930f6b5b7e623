"""FP8 products: tiles, scales and rounding are DeepSeek-V3's, and every implementation gives the same products."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.fp8_matmul import api, fp8_grouped_matmul, fp8_matmul
from kernels_pallas.fp8_matmul.api import IMPLEMENTATIONS
from kernels_pallas.fp8_matmul.groups import align
from kernels_pallas.fp8_matmul.quantize import (
    E4M3,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    round_to_e4m3,
)

HERE = {name: products for name, (products, platforms) in IMPLEMENTATIONS.items() if "cpu" in platforms}
INTERPRETER = pltpu.InterpretParams()


def interpreted(products, **keywords):
    """An implementation for another platform, run by Pallas' interpreter."""
    return products._replace(
        rows_product=partial(products.rows_product, **keywords),
        groups_product=partial(products.groups_product, **keywords),
    )


ALIGN = jax.jit(align, static_argnums=(1, 2))
EVERY = HERE | {"mosaic_tpu, interpreted": interpreted(IMPLEMENTATIONS["mosaic_tpu"][0], interpret=INTERPRETER)}


@pytest.fixture(params=EVERY)
def use(request, monkeypatch):
    """Makes an implementation the one that is chosen."""
    monkeypatch.setattr(api, "_implementation", lambda *_: EVERY[request.param])


def rounded(x):
    """The nearest E4M3 numbers, in float64."""
    return x.astype(E4M3).astype(np.float64)


def fake(x, rows, columns):
    """What is left of a matrix after quantization in tiles of `rows` x `columns`, in float64, tile after tile."""
    x = np.asarray(x, np.float32)
    out = np.zeros(x.shape)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            tile = x[i : i + rows, j : j + columns]
            scale = np.abs(tile).max() * np.float32(1 / 448) or np.float32(1)
            out[i : i + rows, j : j + columns] = rounded(tile / scale) * np.float64(scale)
    return out


def definition(x, w, dy):
    """`y`, `dx` and `dw` as V3 makes them, one by one and in float64."""
    blocks = fake(w, 128, 128)
    return fake(x, 1, 128) @ blocks, fake(dy, 1, 128) @ blocks.T, fake(x, 128, 1).T @ fake(dy, 128, 1)


def grouped_definition(x, w, dy, sizes):
    out, dx, dw, start = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape), 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows], dx[rows], dw[group] = definition(x[rows], w[group], dy[rows])
        start += size
    return out, dx, dw


def normal(*shape, seed=0, dtype=np.float32):
    return np.array(jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype))


def check(function, x, w, dy, wanted, tolerance=2e-6):
    @jax.jit
    def run(x, w, dy):
        out, pull = jax.vjp(function, x, w)
        return out, *pull(dy)

    for result, like, want in zip(run(x, w, dy), (x, x, w), wanted, strict=True):
        assert result.dtype == like.dtype
        scale = max(np.abs(want).max(initial=0), 1e-30)
        np.testing.assert_allclose(np.asarray(result, np.float64) / scale, want / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("tokens, inner, out", [(128, 128, 128), (200, 300, 150), (1, 5, 3), (257, 129, 1)])
def test_all_three_products_are_of_quantized_operands(use, tokens, inner, out):
    x, w, dy = normal(tokens, inner), normal(inner, out, seed=1), normal(tokens, out, seed=2)
    check(fp8_matmul, x, w, dy, definition(x, w, dy))


@pytest.mark.parametrize("sizes", [[150, 0, 101, 30], [0, 0, 0, 0], [300, 0, 0, 0], [1, 128, 129, 42]])
def test_each_group_is_quantized_and_multiplied_by_itself(use, sizes):
    x, w, dy = normal(300, 140), normal(4, 140, 150, seed=1), normal(300, 150, seed=2)
    sizes_array = np.array(sizes, np.int32)
    wanted = grouped_definition(x, w, dy, sizes)
    x[sum(sizes) :] = np.nan  # nobody's rows
    check(lambda x, w: fp8_grouped_matmul(x, w, sizes_array), x, w, dy, wanted)


def test_bfloat16_activations_meet_the_master_weights_own_blocks(use):
    x, w, dy = normal(130, 140, dtype=jnp.bfloat16), normal(140, 150, seed=1), normal(130, 150, dtype=jnp.bfloat16)
    check(fp8_matmul, x, w, dy, definition(x, w, dy), tolerance=4e-3)


def test_rounding_is_the_hardware_types_own_for_every_number_and_every_tie():
    numbers = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = np.concatenate([np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)])
    for x in (numbers, ties, beside, np.linspace(-448, 448, 10001, dtype=np.float32)):
        np.testing.assert_array_equal(round_to_e4m3(jnp.asarray(x)), x.astype(E4M3).astype(np.float32))


@pytest.mark.parametrize("quantize, shape, axis", [(quantize_rows, (3, 128, 2), 1), (quantize_columns, (128, 6), 0)])
def test_the_largest_number_of_a_tile_becomes_448(quantize, shape, axis):
    tiled = quantize(np.moveaxis(normal(*shape), axis, -1).reshape(6, 128) if axis else normal(*shape))
    assert tiled.values.dtype == E4M3 and tiled.scales.dtype == jnp.float32
    assert (np.abs(np.asarray(tiled.values, np.float32)).max(axis=axis) == 448).all()


def test_zero_tiles_have_scale_1_and_what_is_filled_up_changes_no_scale():
    w = np.zeros((2, 130, 260), np.float32)
    w[1, 129, 259] = 44.8
    tiled = quantize_blocks(w)
    assert tiled.values.shape == (2, 256, 384) and tiled.scales.shape == (2, 2, 3)
    want = np.ones((2, 2, 3), np.float32)
    want[1, 1, 2] = np.float32(44.8) * np.float32(1 / 448)
    np.testing.assert_array_equal(tiled.scales, want)


def test_numbers_too_small_for_a_scale_become_zero_and_a_nan_is_not_hidden():
    assert not np.any(fp8_matmul(np.full((2, 8), 1e-40, np.float32), np.ones((8, 2), np.float32)))
    x = np.ones((2, 8), np.float32)
    x[1, 3] = np.nan
    out = np.asarray(fp8_matmul(x, np.ones((8, 2), np.float32)))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


@settings(max_examples=60)
@given(cuts=st.lists(st.integers(0, 60), min_size=4, max_size=4), tile=st.sampled_from([1, 8]))
def test_alignment_is_one_to_one_and_gives_each_tile_one_group(cuts, tile):
    sizes, rows = np.diff([0, *sorted(cuts)]), 60  # groups may be empty, and may leave rows over
    sources, places, tile_groups = (np.asarray(part) for part in ALIGN(sizes.astype(np.int32), rows, tile))
    present, count = sources < rows, sizes.sum()
    np.testing.assert_array_equal(np.sort(sources[present]), np.arange(count))
    np.testing.assert_array_equal(sources[places[:count]], np.arange(count))
    assert (places[count:] == sources.size).all()
    group_of_row = np.repeat(np.arange(sizes.size), sizes)
    np.testing.assert_array_equal(np.repeat(tile_groups, tile)[present], group_of_row[sources[present]])
    tiles = np.sum(tile_groups[:, None] == np.arange(sizes.size), axis=0)
    np.testing.assert_array_equal(tiles, -(-sizes // tile))  # as few as can be
    assert (np.diff(tile_groups) >= 0).all()


def test_a_power_of_two_goes_through_unchanged():
    x, w, run = normal(3, 140), normal(140, 4, seed=1), jax.jit(fp8_matmul)
    for power in (-30, -1, 1, 30):
        scale = np.float32(2.0**power)
        np.testing.assert_array_equal(run(x * scale, w), run(x, w) * scale)


def test_unknown_and_absent_implementations_are_refused():
    x, w = normal(2, 3), normal(3, 2)
    with pytest.raises(ValueError, match="'e5m2': must be one of mosaic_tpu"):
        fp8_matmul(x, w, "e5m2")
    with pytest.raises(NotImplementedError, match="'mosaic_tpu' runs on tpu"):
        fp8_grouped_matmul(x, w[None], np.array([2], np.int32), "mosaic_tpu")


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the interpreter of jax 0.10 has no transposed operands")
def test_on_hopper_the_products_are_the_same_and_free_of_races(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    products = interpreted(IMPLEMENTATIONS["mosaic_gpu"][0], interpret=plgpu.InterpretGPUParams(detect_races=True))
    monkeypatch.setattr(api, "_implementation", lambda *_: products)
    sizes = np.array([130, 0, 5], np.int32)
    x, w, dy = normal(140, 130), normal(3, 130, 128, seed=1), normal(140, 128, seed=2)
    x[135:] = np.nan
    function = partial(fp8_grouped_matmul, group_sizes=sizes)
    check(function, x, w, dy, grouped_definition(np.nan_to_num(x), w, dy, sizes))


def test_on_tpus_the_products_race_with_nothing(monkeypatch, watching):
    products = interpreted(IMPLEMENTATIONS["mosaic_tpu"][0], interpret=watching)
    monkeypatch.setattr(api, "_implementation", lambda *_: products)
    sizes = np.array([130, 0, 5], np.int32)
    x, w, dy = normal(135, 130), normal(3, 130, 128, seed=1), normal(135, 128, seed=2)
    check(partial(fp8_grouped_matmul, group_sizes=sizes), x, w, dy, grouped_definition(x, w, dy, sizes))


@pytest.mark.parametrize("chip, wanted", [("v7x", "mosaic_tpu"), ("v5p", "emulated"), ("v6e", "emulated")])
def test_a_chip_without_units_for_it_emulates_and_refuses_to_be_told_otherwise(monkeypatch, chip, wanted):
    monkeypatch.setattr("kernels_pallas.target.platform", lambda: "tpu")
    monkeypatch.setattr(api, "chip", lambda: chip)
    assert api._implementation(None, 128, 256) is IMPLEMENTATIONS[wanted][0]
    if wanted == "emulated":
        with pytest.raises(NotImplementedError, match=f"FP8 units of v7x, and this program is for {chip}"):
            api._implementation("mosaic_tpu", 128, 256)


def test_a_contraction_too_long_for_the_vector_memory_is_emulated_and_by_name_refused(monkeypatch):
    monkeypatch.setattr("kernels_pallas.target.platform", lambda: "tpu")
    monkeypatch.setattr(api, "chip", lambda: "v7x")
    assert api._implementation(None, 128, 100_000) is IMPLEMENTATIONS["emulated"][0]  # the gradient's contraction
    with pytest.raises(NotImplementedError, match="bytes of vector memory"):
        api._implementation("mosaic_tpu", 100_000, 128)
