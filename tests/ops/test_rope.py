"""Rotary embedding: what it keeps, and what it makes of positions. Transformers' numbers: tests/interop."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opendeep_jax.config.schema import AttentionConfig, RopeConfig
from opendeep_jax.ops.rope import frequencies, rotate, rotations, softmax_scale

PLAIN = RopeConfig()
HALVES = RopeConfig(interleaved=False)
YARN = RopeConfig(yarn_factor=40.0, yarn_mscale=0.707, yarn_mscale_all_dim=0.707)
SIZE = 8


def turned(x, position, rope):
    """x [R] at one position."""
    cosine, sine = rotations(rope, jnp.array([[position]]), SIZE)
    return np.asarray(rotate(jnp.asarray(x, jnp.float32)[None, None, None], cosine, sine, rope.interleaved)[0, 0, 0])


vectors = st.lists(st.floats(-3, 3, width=32), min_size=SIZE, max_size=SIZE)
ropes = st.sampled_from([PLAIN, HALVES, YARN])


@settings(max_examples=40, deadline=None)
@given(x=vectors, position=st.integers(0, 5000), rope=ropes)
def test_rotation_keeps_the_length_of_a_vector(x, position, rope):
    assert np.linalg.norm(turned(x, position, rope)) == pytest.approx(np.linalg.norm(x), rel=1e-4, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(x=vectors, y=vectors, a=st.integers(0, 500), b=st.integers(0, 500), shift=st.integers(0, 500), rope=ropes)
def test_products_depend_on_the_distance_of_positions_alone(x, y, a, b, shift, rope):
    here = turned(x, a, rope) @ turned(y, b, rope)
    there = turned(x, a + shift, rope) @ turned(y, b + shift, rope)
    assert here == pytest.approx(there, abs=1e-3 * (1 + np.linalg.norm(x) * np.linalg.norm(y)))


@pytest.mark.parametrize("rope", [PLAIN, HALVES, YARN])
def test_position_0_changes_nothing(rope):
    x = np.arange(SIZE, dtype=np.float32)
    np.testing.assert_array_equal(turned(x, 0, rope), x)


def test_pairs_are_neighbors_or_halves():
    for rope, partner in ((PLAIN, 1), (HALVES, SIZE // 2)):
        out = turned(np.eye(SIZE)[0], 1, rope)
        want = np.zeros(SIZE)
        want[0], want[partner] = np.cos(1), np.sin(1)
        np.testing.assert_allclose(out, want, atol=1e-6)


def test_bfloat16_stays_bfloat16():
    cosine, sine = rotations(PLAIN, jnp.arange(4)[None], SIZE)
    assert rotate(jnp.ones((1, 4, 2, SIZE), jnp.bfloat16), cosine, sine, True).dtype == jnp.bfloat16


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    plain, stretched = frequencies(PLAIN, 64), frequencies(YARN, 64)
    assert stretched[0] == plain[0] and stretched[-1] == pytest.approx(plain[-1] / 40)
    ratio = stretched / plain
    assert np.all(np.diff(ratio) <= 1e-12) and len(set(ratio.round(6))) > 4  # between them a ramp


def test_yarn_sharpens_the_softmax_by_its_squared_temperature():
    assert softmax_scale(AttentionConfig(qk_nope_head_dim=128, qk_rope_head_dim=64, rope=PLAIN)) == pytest.approx(
        192**-0.5
    )
    temperature = 0.1 * 0.707 * np.log(40) + 1
    assert softmax_scale(AttentionConfig(qk_nope_head_dim=128, qk_rope_head_dim=64, rope=YARN)) == pytest.approx(
        192**-0.5 * temperature**2
    )


def test_yarn_scales_rotations_by_the_ratio_of_its_two_temperatures():
    rope = dataclasses.replace(YARN, yarn_mscale=1.0, yarn_mscale_all_dim=0.5)
    ratio = (0.1 * np.log(40) + 1) / (0.05 * np.log(40) + 1)
    np.testing.assert_allclose(turned(np.ones(SIZE), 0, rope), np.full(SIZE, ratio), rtol=1e-6)
