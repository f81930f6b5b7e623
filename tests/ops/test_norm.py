"""RMSNorm."""

import jax.numpy as jnp
import numpy as np

from opendeep_jax.ops.norm import rms_norm


def test_it_divides_by_the_root_mean_square_and_scales():
    x, scale = np.random.default_rng(0).normal(size=(2, 3, 8)), np.arange(8.0)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale
    np.testing.assert_allclose(rms_norm(jnp.float32(x), jnp.float32(scale), 1e-3), want, rtol=1e-5)


def test_zeros_stay_zeros():
    assert not rms_norm(jnp.zeros((2, 8)), jnp.ones(8), 1e-6).any()


def test_bfloat16_is_normalized_in_float32():
    x = jnp.full((1, 256), 3e4, jnp.bfloat16)  # a sum of squares in bfloat16 would be far off
    out = rms_norm(x, jnp.ones(256), 1e-6)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, rtol=1e-2)
