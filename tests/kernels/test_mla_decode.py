"""Every implementation of latent decoding computes what a loop over rows does in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.mla_decode import mla_decode, reference, tpu

INTERPRETER = pltpu.InterpretParams()
PAGE, HEADS, LATENT, ROPE, SCALE = 16, 3, 12, 4, 0.3


def interpreted(*arguments, interpret=INTERPRETER):
    """The TPU kernel on a simulated TPU."""
    return tpu.mla_decode(*arguments, interpret=interpret)


RUNS = {"reference": reference.mla_decode, "mosaic": interpreted}


def operands(lengths, pages, dtype=np.float32):
    """Queries, a cache whose unused places are NaN, a page table in random order, and lengths."""
    random = np.random.default_rng(0)
    rows = len(lengths)
    query_latent, query_rope = (random.normal(size=(rows, HEADS, size)) for size in (LATENT, ROPE))
    table = random.permutation(rows * pages + 1)[: rows * pages].reshape(rows, pages)
    cache = np.full((rows * pages + 1, PAGE, LATENT + ROPE), np.nan)
    for row, length in enumerate(lengths):
        for position in range(length):
            cache[table[row, position // PAGE], position % PAGE] = random.normal(size=LATENT + ROPE)
    arrays = (np.asarray(jnp.asarray(x, dtype)) for x in (query_latent, query_rope, cache))
    return *arrays, table.astype(np.int32), np.array(lengths, np.int32)


def dense(query_latent, query_rope, cache, table, lengths):
    """The definition, in numpy float64."""
    out = np.zeros(query_latent.shape)
    for row, length in enumerate(lengths):
        if length:
            cached = cache[table[row]].reshape(-1, LATENT + ROPE)[:length].astype(np.float64)
            scores = np.concatenate([query_latent[row], query_rope[row]], -1).astype(np.float64) @ cached.T * SCALE
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[row] = weights / weights.sum(-1, keepdims=True) @ cached[:, :LATENT]
    return out


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("step", [32, 512])
def test_rows_of_any_length_read_their_own_pages_and_nothing_else(name, step, monkeypatch):
    """One step of a row takes 2 pages, or all."""
    monkeypatch.setattr(tpu, "POSITIONS", step)
    arguments = operands([0, 1, PAGE, PAGE + 1, 3 * PAGE - 1, 5 * PAGE], pages=5)
    out = jax.jit(lambda *x: RUNS[name](*x, SCALE))(*arguments)
    np.testing.assert_allclose(out, dense(*arguments), atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_columns_beyond_the_latent_and_the_rotated_key_do_not_matter(name):
    query_latent, query_rope, cache, table, lengths = operands([20, 3], pages=2)
    wider = np.concatenate([cache, np.full((*cache.shape[:2], 5), 7, np.float32)], axis=-1)
    out = RUNS[name](query_latent, query_rope, wider, table, lengths, SCALE)
    np.testing.assert_allclose(out, dense(query_latent, query_rope, cache, table, lengths), atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_batch_of_empty_caches_gives_zeros(name):
    assert not np.any(RUNS[name](*operands([0, 0], pages=2), SCALE))


@pytest.mark.parametrize("name", RUNS)
def test_bfloat16_stays_bfloat16(name):
    arguments = operands([40, 7], pages=3, dtype=jnp.bfloat16)
    out = RUNS[name](*arguments, SCALE)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), dense(*arguments), atol=2e-2)


def test_a_cache_of_another_width_is_refused():
    query_latent, query_rope, cache, table, lengths = operands([3], pages=1)
    with pytest.raises(ValueError, match="a cache of 15 columns for queries of 12 \\+ 4"):
        mla_decode(query_latent, query_rope, cache[..., :15], table, lengths, SCALE)


def test_pages_that_the_kernel_cannot_take_are_refused_by_name():
    query_latent, query_rope, cache, table, lengths = operands([3], pages=1)
    with pytest.raises(NotImplementedError, match="pages of 15 positions"):
        interpreted(query_latent, query_rope, cache[:, :15], table, lengths, SCALE)


def test_the_tpu_kernel_races_with_nothing(watching):
    inputs = operands([0, 5, 16, 70], pages=5)
    np.testing.assert_allclose(interpreted(*inputs, SCALE, interpret=watching), dense(*inputs), atol=1e-5)
