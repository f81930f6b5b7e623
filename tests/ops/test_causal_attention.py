"""Attention over packed documents against a dense mask, at lengths that divide nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import compiled, dense_attention

from kernels_pallas.flash_mla import blocks

SCALE = 0.3


def causal_attention(query, key, value, segment_ids, scale):
    return blocks.attention(query, key, value, segment_ids, segment_ids, None, None, scale)


def inputs(length, heads=4, groups=2, rows=2):
    random = np.random.default_rng(length)
    shapes = (rows, length, heads, 6), (rows, length, groups, 6), (rows, length, groups, 5)
    query, key, value = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)
    ends = np.sort(random.integers(0, length + 1, (rows, 3)), axis=1)
    segment_ids = jnp.asarray(1 + (np.arange(length)[None, :, None] >= ends[:, None]).sum(-1))
    return query, key, value, segment_ids.at[0, length - length // 5 :].set(0)


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 37, 301])
def test_output_is_that_of_a_dense_mask(length, heads, groups):
    arguments = inputs(length, heads, groups)
    out = compiled(lambda *x: causal_attention(*x, SCALE), *arguments)
    np.testing.assert_allclose(out, compiled(lambda *x: dense_attention(*x, SCALE), *arguments), atol=2e-6)


def test_gradients_are_those_of_a_dense_mask():
    query, key, value, segment_ids = inputs(149)

    def gradients(attention):
        return compiled(jax.grad(lambda *x: jnp.sum(attention(*x, segment_ids) ** 2), (0, 1, 2)), query, key, value)

    ours = gradients(lambda *x: causal_attention(*x, SCALE))
    for grad, want in zip(ours, gradients(lambda *x: dense_attention(*x, SCALE)), strict=True):
        np.testing.assert_allclose(grad, want, atol=2e-5)


def test_large_scores_do_not_overflow_and_bfloat16_stays_bfloat16():
    query, key, value, segment_ids = inputs(37)
    query, key, value = (x.astype(jnp.bfloat16) for x in (200 * query, key, value))
    out = compiled(lambda *x: causal_attention(*x, 100.0), query, key, value, segment_ids)
    assert out.dtype == jnp.bfloat16 and bool(jnp.all(jnp.isfinite(out)))


def test_queries_of_a_part_of_the_row_in_any_order_see_what_they_see_in_the_whole():
    query, key, value, segment_ids = inputs(37)
    want = causal_attention(query, key, value, segment_ids, SCALE)
    random = np.random.default_rng(0)
    rows, seen = random.permutation(37)[:11], random.permutation(37)
    order = lambda index: jnp.broadcast_to(jnp.asarray(index), (2, len(index)))  # noqa: E731
    part = blocks.attention(
        query[:, rows],
        key[:, seen],
        value[:, seen],
        segment_ids[:, rows],
        segment_ids[:, seen],
        order(rows),
        order(seen),
        SCALE,
    )
    np.testing.assert_allclose(part, want[:, rows], atol=2e-6)


def full_softmax(query, key, value, segment_ids, scale, window, sinks, softcap):
    """Attention with all scores at once, as the papers write it; gradients by autodiff."""
    rows, length, heads, _ = query.shape
    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("blhq,bshq->bhls", query, key) * scale
    scores = jnp.tanh(scores / softcap) * softcap if softcap else scores
    at = jnp.arange(length)
    seen = (at[:, None] >= at) & (at[:, None] - at < window)
    seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    scores = jnp.where(seen[:, None], scores, -1e30)
    scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (rows, heads, length, 1))], axis=3)
    return jnp.einsum("bhls,bshv->blhv", jax.nn.softmax(scores, axis=-1)[..., :-1], value)


@pytest.mark.parametrize("length, window, softcap", [(37, 5, 0.0), (301, 40, 1.5), (9, 1, 2.0), (23, 99, 0.0)])
def test_windows_sinks_and_soft_caps_give_the_full_softmax_and_its_gradients(length, window, softcap):
    query, key, value, segment_ids = inputs(length)
    sinks = jnp.array([0.3, -2.0, 1.0, 4.0])

    def ours(query, key, value, sinks):
        marks = segment_ids, segment_ids, None, None
        return blocks.attention(query, key, value, *marks, SCALE, jnp.int32(window), sinks, softcap)

    def theirs(query, key, value, sinks):
        return full_softmax(query, key, value, segment_ids, SCALE, window, sinks, softcap)

    def out_and_gradients(function):
        gradient = jax.grad(lambda *x: jnp.sum(function(*x) ** 2), (0, 1, 2, 3))
        return compiled(lambda *x: (function(*x), *gradient(*x)), query, key, value, sinks)

    for one, other in zip(out_and_gradients(ours), out_and_gradients(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)
