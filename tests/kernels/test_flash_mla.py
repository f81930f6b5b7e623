"""Every implementation of the training attention computes what a dense mask does in float64, and its derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_mla import blocks, flash_mla, reference, tpu
from kernels_pallas.flash_mla.visits import PARTLY, VISITED, visits

SCALE = 0.3
SIZES = dict(nope=16, rope=8, width=12)


def interpreted(*arguments, **keywords):
    """The TPU kernels on a simulated TPU, in blocks of unequal sizes."""
    settings = dict(forward_block=(128, 256), backward_block=(256, 128), chunk=64, wide=False) | keywords
    return tpu.flash_mla(*arguments, **dict(interpret=pltpu.InterpretParams()) | settings)


RUNS = {
    "reference": reference.flash_mla,
    "blocks": blocks.flash_mla,
    "mosaic": interpreted,
    "mosaic for wide matrix units": partial(interpreted, wide=True),
}


def operands(rows, length, keys, heads, nope, rope, width, dtype=np.float32, seed=0):
    """Queries, keys and values, and a gradient of the output."""
    random = np.random.default_rng(seed)
    of_queries, of_keys = (rows, length), (rows, keys)
    shapes = (*of_queries, heads * nope), (*of_queries, heads * rope), (*of_keys, heads * nope), (*of_keys, rope)
    shapes += (*of_keys, heads * width), (*of_queries, heads * width)
    return [np.asarray(jnp.asarray(random.normal(size=shape), dtype)) for shape in shapes]


def packed(rows, length, seed=0):
    """Documents of random lengths in each row; the last fifth of row 0 is padding."""
    random = np.random.default_rng(seed)
    ends = np.sort(random.integers(0, length + 1, (rows, 2)), axis=1)
    segments = 1 + (np.arange(length)[None, :, None] >= ends[:, None]).sum(-1)
    segments[0, length - length // 5 :] = 0
    return segments.astype(np.int32)


def dense(operands, marks, heads):
    """Output and the five gradients, in numpy float64."""
    *inputs, d_out = (x.astype(np.float64) for x in operands)
    query_segments, key_segments, query_order, key_order = marks
    if query_order is None:
        query_order = key_order = np.broadcast_to(np.arange(query_segments.shape[1]), query_segments.shape)
    visible = query_segments[:, :, None] == key_segments[:, None]
    visible = (visible & (query_order[:, :, None] >= key_order[:, None]))[:, None]
    query_nope, query_rope, key_nope, value, d_out = (
        x.reshape(*x.shape[:2], heads, -1) for x in (*inputs[:3], inputs[4], d_out)
    )
    key_rope = inputs[3]
    scores = np.einsum("blhn,bshn->bhls", query_nope, key_nope) + np.einsum("blhr,bsr->bhls", query_rope, key_rope)
    scores = np.where(visible, scores * SCALE, -np.inf)
    largest = np.maximum(scores.max(-1, keepdims=True), -1e300)
    weights = np.exp(scores - largest)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    d_weights = np.einsum("blhv,bshv->bhls", d_out, value)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * SCALE
    results = (
        np.einsum("bhls,bshv->blhv", weights, value),
        np.einsum("bhls,bshn->blhn", d_scores, key_nope),
        np.einsum("bhls,bsr->blhr", d_scores, key_rope),
        np.einsum("bhls,blhn->bshn", d_scores, query_nope),
        np.einsum("bhls,blhr->bsr", d_scores, query_rope),
        np.einsum("bhls,blhv->bshv", weights, d_out),
    )
    return [x.reshape(*x.shape[:2], -1) for x in results]


@partial(jax.jit, static_argnums=(0, 3))
def run(name, operands, marks, heads):
    """Output and the five gradients of an implementation."""
    function = partial(RUNS[name], num_heads=heads, scale=SCALE)
    out, pull = jax.vjp(lambda *x: function(*x, *marks), *operands[:5])
    return out, *pull(operands[5])


def check(name, operands, marks, heads, tolerance=1e-5):
    wanted = dense(operands, marks, heads)
    results = run(name, operands, marks, heads)
    for result, operand, want in zip(results, (operands[5], *operands[:5]), wanted, strict=True):
        assert result.dtype == operand.dtype and result.shape == operand.shape
        scale = max(np.abs(want).max(), 1)
        np.testing.assert_allclose(np.asarray(result, np.float64), want, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("name", RUNS)
def test_packed_documents_meet_only_themselves(name):
    """At a length that divides nothing and an odd number of heads."""
    segments = packed(2, 301)
    check(name, operands(2, 301, 301, 3, **SIZES), (segments, segments, None, None), 3)


@pytest.mark.parametrize("name", ["reference", "blocks"])
def test_a_row_may_be_one_position(name):
    segments = np.zeros((2, 1), np.int32)
    check(name, operands(2, 1, 1, 1, **SIZES), (segments, segments, None, None), 1)


@pytest.mark.parametrize("name", ["reference", "blocks", "mosaic"])
def test_orders_say_what_comes_before(name, monkeypatch):
    """One device's share of a row under zigzag context parallelism: an early and a late piece meet all keys.

    The TPU's backward pass goes over the keys in parts, as over very long rows.
    """
    monkeypatch.setattr(tpu, "LONGEST", [(8192, 512)])
    length, keys = 150, 600
    segments = packed(1, keys, seed=1)
    order = np.concatenate([np.arange(75, 150), np.arange(450, 525)]).astype(np.int32)[None]
    marks = segments[:, order[0]], segments, order, np.arange(keys, dtype=np.int32)[None]
    check(name, operands(1, length, keys, 2, **SIZES), marks, 2)


@pytest.mark.parametrize("name", ["reference", "blocks", "mosaic"])
def test_a_query_that_sees_nothing_gives_zeros(name):
    marks = np.full((1, 40), 3, np.int32), np.full((1, 50), 3, np.int32)
    marks += np.arange(40, dtype=np.int32)[None], np.arange(20, 70, dtype=np.int32)[None]
    check(name, operands(1, 40, 50, 2, **SIZES), marks, 2)
    assert not np.any(run(name, operands(1, 40, 50, 2, **SIZES), marks, 2)[0][:, :20])


def test_bfloat16_stays_bfloat16():
    inputs = operands(1, 40, 40, 2, **SIZES, dtype=jnp.bfloat16)
    check("blocks", inputs, (np.ones((1, 40), np.int32),) * 2 + (None, None), 2, tolerance=3e-2)


def test_the_tpu_kernels_race_with_nothing_at_the_head_sizes_of_v3_in_bfloat16(monkeypatch, watching):
    """Sizes that need no padding; the interpreter watches every access to memory that is shared."""
    inputs = operands(1, 256, 256, 4, nope=128, rope=64, width=128, dtype=jnp.bfloat16)
    blocks_of_128 = dict(forward_block=(128, 128), backward_block=(128, 128))
    watched = partial(interpreted, **blocks_of_128, interpret=watching)
    monkeypatch.setitem(RUNS, "watched", watched)
    check("watched", inputs, (np.ones((1, 256), np.int32),) * 2 + (None, None), 4, tolerance=3e-2)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), ranks=st.sampled_from([2, 3, 4]))
def test_queries_divided_over_devices_give_what_the_whole_gives(seed, ranks):
    """Context parallelism: every device has some positions' queries and gathers all keys, in the devices' order."""
    length, heads = 24, 2
    *inputs, d_out = operands(1, length, length, heads, **SIZES, seed=seed)
    segments = packed(1, length, seed)
    want = run("blocks", (*inputs, d_out), (segments, segments, None, None), heads)
    order = np.random.default_rng(seed).permutation(length).astype(np.int32)
    at = lambda x, index: x[:, index]  # noqa: E731
    marks_of = at(segments, order), order[None]
    parts = []
    for mine in np.split(order, ranks):
        queries, keys = (at(x, mine) for x in inputs[:2]), (at(x, order) for x in inputs[2:])
        marks = at(segments, mine), marks_of[0], mine[None], marks_of[1]
        parts.append(run("blocks", (*queries, *keys, at(d_out, mine)), marks, heads))
    for part, name in zip(zip(*parts, strict=True), range(6), strict=True):
        result = np.zeros(want[name].shape)
        # Outputs and gradients of queries lie side by side; the devices' gradients of keys add up.
        result[:, order] = np.concatenate(part, axis=1) if name < 3 else sum(part)
        np.testing.assert_allclose(result, want[name], atol=2e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), outer=st.sampled_from(["query", "key"]), ordered=st.booleans())
def test_every_pair_that_sees_each_other_is_visited_once_and_unmasked_blocks_see_all(seed, outer, ordered):
    random = np.random.default_rng(seed)
    rows, length, size = 2, 24, (4, 6)
    order = np.arange(length) if ordered else random.permutation(length)
    segments = np.sort(random.integers(0, 3, (rows, length)), axis=1)[:, order]
    marks = np.stack([np.broadcast_to(order, segments.shape), segments], axis=1).astype(np.int32)
    todo = jax.jit(visits, static_argnums=(2, 3, 4))(marks, marks, size, outer, ordered)
    visible = (marks[:, 0, :, None] >= marks[:, 0, None]) & (marks[:, 1, :, None] == marks[:, 1, None])
    seen = np.zeros(visible.shape, int)
    for row in range(rows):
        for q, k, flag in zip(*(np.asarray(x[row]) for x in todo[:3]), strict=True):
            if flag & VISITED:
                here = row, slice(q * size[0], (q + 1) * size[0]), slice(k * size[1], (k + 1) * size[1])
                seen[here] += 1
                assert flag & PARTLY or np.all(visible[here])
    assert np.all(seen[visible] == 1) and seen.max() == 1


def test_the_automatic_choice_attends_and_large_scores_do_not_overflow():
    inputs = operands(1, 9, 9, 2, **SIZES, dtype=jnp.bfloat16)
    ones = np.ones((1, 9), np.int32)
    out = flash_mla(100 * inputs[0], *inputs[1:5], ones, ones, num_heads=2, scale=100.0)
    assert out.dtype == jnp.bfloat16 and bool(jnp.all(jnp.isfinite(out)))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_heads=3), "num_heads = 3: must divide"),
        (dict(implementation="cuda"), "'cuda': must be one of .*blocks"),
        (dict(query_order=np.zeros((1, 9), np.int32)), "must be given both or neither"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    ones = np.ones((1, 9), np.int32)
    with pytest.raises(ValueError, match=message):
        flash_mla(*operands(1, 9, 9, 2, **SIZES)[:5], ones, ones, **dict(num_heads=2, scale=1.0) | change)


def test_the_tpu_kernel_is_refused_on_a_cpu_and_refuses_wider_rotated_parts():
    ones = np.ones((1, 9), np.int32)
    with pytest.raises(NotImplementedError, match="runs on tpu"):
        flash_mla(*operands(1, 9, 9, 2, **SIZES)[:5], ones, ones, num_heads=2, scale=1.0, implementation="mosaic")
    wide = operands(1, 9, 9, 2, nope=16, rope=80, width=12)[:5]
    with pytest.raises(NotImplementedError, match="rotated size of 80: the TPU kernel takes at most 64"):
        tpu.flash_mla(*wide, ones, ones, None, None, num_heads=2, scale=1.0)


@pytest.mark.parametrize("implementation", [blocks.flash_mla, tpu.flash_mla])
def test_remat_can_keep_what_the_backward_pass_needs(implementation, capsys):
    inputs, ones = operands(1, 9, 9, 2, **SIZES)[:5], np.ones((1, 9), np.int32)
    attend = lambda *x: implementation(*x, ones, ones, None, None, num_heads=2, scale=1.0)  # noqa: E731
    policy = jax.checkpoint_policies.save_only_these_names("attention_output")
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(attend, policy=policy), *inputs)
    kept = [line for line in capsys.readouterr().out.splitlines() if "attention_output" in line]
    assert len(kept) == 2  # the output and the log-sum-exps
