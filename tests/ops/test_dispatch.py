"""Experts by sorting and grouped matmuls against each token by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import compiled

from opendeep_jax.ops.dispatch import routed_experts, sort_by_expert

TOKENS, CHOSEN, EXPERTS, WIDTH, HIDDEN = 13, 3, 7, 5, 4


def inputs(skewed=False):
    random = np.random.default_rng(0)
    indices = np.stack([random.permutation(EXPERTS)[:CHOSEN] for _ in range(TOKENS)])
    if skewed:
        indices[:] = [4, 1, 6]  # four experts get nothing
    weights = random.uniform(size=(TOKENS, CHOSEN))
    shapes = (TOKENS, WIDTH), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    x, gate, up, down = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)
    return jnp.asarray(indices), (x, jnp.float32(weights), gate, up, down)


def by_token(indices, x, weights, gate, up, down):
    """Each token with copies of its own experts' matrices."""
    hidden = jax.nn.silu(jnp.einsum("td,tkdf->tkf", x, gate[indices])) * jnp.einsum("td,tkdf->tkf", x, up[indices])
    return jnp.einsum("tk,tkf,tkfd->td", weights, hidden, down[indices])


@pytest.mark.parametrize("skewed", [False, True])
def test_output_and_gradients_are_those_of_each_token_by_itself(skewed):
    indices, arrays = inputs(skewed)

    def gradients(function):
        def loss(*arrays):
            out = function(*arrays)
            return jnp.sum(jnp.sin(out)), out

        return compiled(jax.value_and_grad(loss, argnums=range(5), has_aux=True), *arrays)

    (_, out), grads = gradients(lambda x, weights, *kernels: routed_experts(x, indices, weights, *kernels))
    (_, want), want_grads = gradients(lambda *arrays: by_token(indices, *arrays))
    np.testing.assert_allclose(out, want, atol=1e-4)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_bfloat16():
    indices, (x, weights, *kernels) = inputs()
    kernels = [kernel.astype(jnp.bfloat16) for kernel in kernels]
    out = compiled(routed_experts, x.astype(jnp.bfloat16), indices, weights, *kernels)
    assert out.dtype == jnp.bfloat16
    want = compiled(by_token, indices, x, weights, *(kernel.astype(jnp.float32) for kernel in kernels))
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.03 * np.abs(want).max())


def test_sorting_is_stable_and_has_an_inverse():
    indices, _ = inputs()
    order, inverse, group_sizes = map(np.asarray, sort_by_expert(indices, EXPERTS))
    flat = np.asarray(indices).reshape(-1)
    np.testing.assert_array_equal(order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(order[inverse.reshape(-1)], np.arange(flat.size))
    np.testing.assert_array_equal(group_sizes, np.bincount(flat, minlength=EXPERTS))
