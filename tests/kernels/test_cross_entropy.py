"""Every implementation of the cross-entropy through the head agrees with its definition in float64, gradients too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.cross_entropy import fused_cross_entropy, tpu
from kernels_pallas.cross_entropy.api import IMPLEMENTATIONS

INTERPRETER = pltpu.InterpretParams()
TOKENS, WIDTH, VOCAB = 45, 24, 307  # multiples of no tile or chunk


def definition(hidden, head, targets, mask, z_loss_weight):
    """Sum, each token's cross-entropy and both gradients of the sum, in numpy float64."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    logits = hidden @ head
    largest = logits.max(axis=1)
    log_z = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    rows = np.arange(len(targets))
    each = np.where(mask, log_z - logits[rows, targets], 0)
    d_logits = np.exp(logits - log_z[:, None]) * (1 + 2 * z_loss_weight * log_z)[:, None]
    d_logits[rows, targets] -= 1
    d_logits *= mask[:, None]
    total = each.sum() + z_loss_weight * (log_z**2 * mask).sum()
    return total, each, d_logits @ head.T, hidden.T @ d_logits


def operands(tokens=TOKENS, width=WIDTH, vocab=VOCAB, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    hidden = np.asarray(jnp.asarray(random.normal(size=(tokens, width)), dtype))
    head = np.asarray(jnp.asarray(random.normal(size=(width, vocab)), dtype))
    return hidden, head, random.integers(0, vocab, tokens).astype(np.int32), random.random(tokens) < 0.7


def on_tpu(*arguments, z_loss_weight=0.0, chunk=1024, interpret=INTERPRETER):
    return tpu.loss(*arguments, z_loss_weight, chunk, interpret=interpret)


RUNS = {
    name: partial(fused_cross_entropy, implementation=name)
    for name, (_, platforms) in IMPLEMENTATIONS.items()
    if "cpu" in platforms
} | {"mosaic_tpu, interpreted": on_tpu}


@pytest.fixture(params=RUNS)
def loss(request):
    return RUNS[request.param]


def check(loss, hidden, head, targets, mask, tolerance=1e-5, z_loss_weight=0.0, **keywords):
    def scaled(hidden, head):
        total, each = loss(hidden, head, targets, mask, z_loss_weight=z_loss_weight, **keywords)
        return 3 * total, each

    (total, each), gradients = jax.jit(jax.value_and_grad(scaled, (0, 1), has_aux=True))(hidden, head)
    assert total.dtype == each.dtype == jnp.float32
    results = total / 3, each, *(np.asarray(gradient, np.float64) / 3 for gradient in gradients)
    for gradient, operand in zip(gradients, (hidden, head), strict=True):
        assert gradient.dtype == operand.dtype
    for result, want in zip(results, definition(hidden, head, targets, mask, z_loss_weight), strict=True):
        scale = max(np.abs(want).max(), 1)
        np.testing.assert_allclose(np.asarray(result), want, atol=tolerance * scale, rtol=0)


def test_sum_each_token_and_gradients_are_those_of_the_definition(loss):
    check(loss, *operands(), chunk=16)


def test_the_z_loss_is_in_the_sum_and_the_gradients_but_not_in_each_token(loss):
    check(loss, *operands(), z_loss_weight=0.1, chunk=16)


def test_bfloat16_operands_give_bfloat16_gradients(loss):
    check(loss, *operands(dtype=jnp.bfloat16), tolerance=2e-2)


@pytest.mark.parametrize("tokens, vocab", [(1, 2), (129, 128), (130, 1281)])
def test_sizes_that_fill_no_tile_or_just_one(loss, tokens, vocab):
    check(loss, *operands(tokens=tokens, vocab=vocab), chunk=64)


def test_targets_outside_the_mask_are_not_looked_at(loss):
    hidden, head, targets, mask = operands()
    wild = np.where(mask, targets, -7).astype(np.int32)
    run = jax.jit(loss)
    results = [run(hidden, head, which, mask)[0] for which in (targets, wild)]
    assert results[0] == results[1]


def test_nothing_in_the_mask_gives_zero_and_no_gradient(loss):
    hidden, head, targets, mask = operands()
    check(loss, hidden, head, targets, np.zeros_like(mask))


def test_logits_too_large_for_exp_are_no_problem(loss):
    hidden, head, targets, mask = operands()
    check(loss, hidden * 100, head, targets, mask, tolerance=1e-3, z_loss_weight=1e-4)


def test_each_tokens_loss_carries_no_gradient(loss):
    hidden, head, targets, mask = operands()
    gradient = jax.jit(jax.grad(lambda hidden: jnp.sum(loss(hidden, head, targets, mask)[1])))(hidden)
    assert not np.any(gradient)


@settings(max_examples=6, deadline=None)
@given(tokens=st.integers(1, 60), chunk=st.integers(1, 70))
def test_the_chunk_changes_nothing(tokens, chunk):
    hidden, head, targets, mask = operands(tokens=tokens)
    total, each = fused_cross_entropy(hidden, head, targets, mask, chunk=chunk, implementation="chunks")
    want = definition(hidden, head, targets, mask, 0)
    np.testing.assert_allclose(total, want[0], rtol=1e-5)
    np.testing.assert_allclose(each, want[1], rtol=1e-4, atol=1e-5)


def test_chunks_hold_the_logits_of_one_chunk_alone():
    hidden, head, targets, mask = operands(tokens=64)
    run = jax.grad(lambda h: fused_cross_entropy(h, head, targets, mask, chunk=8, implementation="chunks")[0])
    shapes = {var.aval.shape for eqn in jax.make_jaxpr(run)(hidden).eqns for var in eqn.outvars}
    assert (64, VOCAB) not in shapes


def test_a_chunk_of_nothing_and_unknown_or_absent_implementations_are_refused():
    with pytest.raises(ValueError, match="chunk = 0: must be at least 1"):
        fused_cross_entropy(*operands(), chunk=0)
    with pytest.raises(ValueError, match="'fused': must be one of chunks"):
        fused_cross_entropy(*operands(), implementation="fused")
    with pytest.raises(NotImplementedError, match="mosaic_tpu.*runs on tpu"):
        fused_cross_entropy(*operands(), implementation="mosaic_tpu")


def test_the_tpu_kernels_race_with_nothing(watching):
    check(partial(on_tpu, interpret=watching), *operands(tokens=300, width=130, vocab=700))


@pytest.mark.parametrize("implementation", ["chunks", "reference"])
def test_a_soft_cap_bounds_the_logits_and_their_gradients(implementation):
    hidden, head, targets, mask = operands()

    def loss(hidden, head):
        total, each = fused_cross_entropy(
            hidden, head, targets, mask, 0.1, chunk=17, implementation=implementation, softcap=2.0
        )
        return total, each

    def capped(hidden, head):
        logits = jnp.tanh(hidden @ head / 2.0) * 2.0
        log_z = jax.nn.logsumexp(logits, axis=1)
        each = jnp.where(mask, log_z - logits[jnp.arange(len(targets)), targets], 0)
        return jnp.sum(each) + 0.1 * jnp.sum(jnp.where(mask, log_z**2, 0)), each

    (got, each), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)
    (want, wanted), expected = jax.value_and_grad(capped, (0, 1), has_aux=True)(hidden, head)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(each, wanted, atol=1e-4)
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_tpu_kernel_refuses_a_soft_cap():
    with pytest.raises(NotImplementedError, match="soft cap"):
        tpu.loss(*operands(), 0.0, 1024, 2.0)
