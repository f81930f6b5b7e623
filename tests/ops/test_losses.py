"""The chunked cross-entropy against the plain one, and what it never holds in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import shapes_in
from small_models import compiled

from opendeep_jax.ops.losses import chunked_cross_entropy

ROWS, LENGTH, WIDTH, VOCABULARY = 3, 11, 4, 17


def inputs(seed=0, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    hidden = jnp.asarray(random.normal(size=(ROWS, LENGTH, WIDTH)), dtype)
    head = jnp.asarray(random.normal(size=(WIDTH, VOCABULARY)), dtype)
    targets = jnp.asarray(random.integers(0, VOCABULARY, (ROWS, LENGTH)))
    return hidden, head, targets, jnp.asarray(random.random((ROWS, LENGTH)) < 0.6)


def with_gradients(function, *arguments):
    """((total, each), gradients of total for hidden and head)."""
    return compiled(jax.value_and_grad(function, argnums=(0, 1), has_aux=True), *arguments)


def dense_cross_entropy(hidden, head, targets, mask, z_loss_weight):
    """With all logits at once: (sum with z-loss, each position's cross-entropy)."""
    logits = (hidden @ head).astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    each = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(mask, each + z_loss_weight * log_z**2, 0)), jnp.where(mask, each, 0)


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 13, 33, 1024])  # tokens; 13 are 4 positions of each row, which don't divide 11
def test_loss_and_gradients_are_those_of_all_logits_at_once(chunk, z_loss_weight):
    hidden, head, targets, mask = inputs()

    def chunked(hidden, head):
        return chunked_cross_entropy(hidden, head, targets, mask, chunk, z_loss_weight)

    def dense(hidden, head):
        return dense_cross_entropy(hidden, head, targets, mask, z_loss_weight)

    (total, each), grads = with_gradients(chunked, hidden, head)
    (want_total, want_each), want_grads = with_gradients(dense, hidden, head)
    np.testing.assert_allclose(total, want_total, rtol=1e-6)
    np.testing.assert_allclose(each, want_each, rtol=1e-5, atol=1e-6)
    for grad, want in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-5)


def test_the_value_is_the_same_with_and_without_a_gradient():
    hidden, head, targets, mask = inputs()

    def loss(hidden, head):
        return chunked_cross_entropy(hidden, head, targets, mask, 13, 0.1)

    plain, _ = compiled(loss, hidden, head)
    (total, _), _ = with_gradients(loss, hidden, head)
    np.testing.assert_allclose(plain, total, rtol=1e-6)


def test_gradients_scale_with_what_comes_after():
    hidden, head, targets, mask = inputs()
    once, thrice = (
        compiled(
            jax.grad(lambda h, factor=factor: factor * chunked_cross_entropy(hidden, h, targets, mask, 13)[0]), head
        )
        for factor in (1.0, 3.0)
    )
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)


def test_nothing_to_predict_is_no_loss_and_no_gradient():
    hidden, head, targets, mask = inputs()
    nothing = jnp.zeros_like(mask)
    (total, each), grads = with_gradients(
        lambda hidden, head: chunked_cross_entropy(hidden, head, targets, nothing, 13, 0.1), hidden, head
    )
    assert total == 0 and not each.any() and not any(grad.any() for grad in grads)


def test_bfloat16_inputs_give_a_float32_loss_and_bfloat16_gradients():
    hidden, head, targets, mask = inputs(dtype=jnp.bfloat16)
    (total, each), grads = with_gradients(
        lambda hidden, head: chunked_cross_entropy(hidden, head, targets, mask, 13), hidden, head
    )
    assert total.dtype == each.dtype == jnp.float32
    assert [grad.dtype for grad in grads] == [jnp.bfloat16] * 2
    want, _ = dense_cross_entropy(hidden.astype(jnp.float32), head.astype(jnp.float32), targets, mask, 0.0)
    np.testing.assert_allclose(total, want, rtol=1e-2)


def test_no_array_of_all_logits_ever_exists():
    hidden, head, targets, mask = inputs()
    function = jax.value_and_grad(chunked_cross_entropy, argnums=(0, 1), has_aux=True)
    jaxpr = jax.make_jaxpr(function, static_argnums=4)(hidden, head, targets, mask, 9)
    sizes = {int(np.prod(shape)) for shape in shapes_in(jaxpr) if VOCABULARY in shape}
    assert max(sizes) == 9 * VOCABULARY  # one chunk's logits: larger than the head here
