"""Log-probabilities and entropies of tokens agree with their definition in float64, gradients of both too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import shapes_in

from kernels_pallas.cross_entropy import token_logprobs
from kernels_pallas.cross_entropy.api import LOGPROB_IMPLEMENTATIONS

SHAPE, WIDTH, VOCAB = (5, 9), 24, 307  # multiples of no chunk


def definition(hidden, head, targets, mask, temperature, softcap, weights):
    """Both results and the gradients of sum(logprob * weights[0] + entropy * weights[1]), in numpy float64."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    raw = hidden @ head
    logits = (np.tanh(raw / softcap) * softcap if softcap else raw) / temperature
    log_p = logits - logits.max(axis=-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
    p, hit = np.exp(log_p), np.arange(head.shape[1]) == targets[..., None]
    logprob, entropy = (log_p * hit).sum(axis=-1), -(p * log_p).sum(axis=-1)
    d_logits = weights[0][..., None] * (hit - p) - weights[1][..., None] * p * (log_p + entropy[..., None])
    d_raw = d_logits * mask[..., None] / temperature * (1 - np.tanh(raw / softcap) ** 2 if softcap else 1)
    d_head = hidden.reshape(-1, len(head)).T @ d_raw.reshape(-1, head.shape[1])
    return np.where(mask, logprob, 0), np.where(mask, entropy, 0), d_raw @ head.T, d_head


def operands(shape=SHAPE, vocab=VOCAB, dtype=np.float32):
    random = np.random.default_rng(0)
    hidden, head = random.normal(size=(*shape, WIDTH)), random.normal(size=(WIDTH, vocab)) / 2
    hidden, head = (np.asarray(jnp.asarray(x, dtype)) for x in (hidden, head))
    targets, mask = random.integers(0, vocab, shape).astype(np.int32), random.random(shape) < 0.7
    return hidden, head, targets, mask, random.normal(size=(2, *shape)).astype(np.float32)


def check(shape=SHAPE, vocab=VOCAB, dtype=np.float32, temperature=1.0, softcap=0.0, tolerance=1e-5, **options):
    hidden, head, targets, mask, weights = operands(shape, vocab, dtype)
    wild = np.where(mask, targets, -7).astype(np.int32)  # targets outside the mask are not looked at

    def weighted(hidden, head, temperature):
        results = token_logprobs(hidden, head, wild, temperature, mask, softcap=softcap, **options)
        return sum(jnp.sum(w * x) for w, x in zip(weights, results, strict=True)), results

    gradients, results = jax.jit(jax.grad(weighted, (0, 1), has_aux=True))(hidden, head, temperature)
    assert [x.dtype for x in results] == [jnp.float32] * 2 and [x.dtype for x in gradients] == [dtype] * 2
    wanted = definition(hidden, head, targets, mask, temperature, softcap, weights)
    for result, want in zip((*results, *gradients), wanted, strict=True):
        scale = np.abs(want).max(initial=1)
        np.testing.assert_allclose(np.asarray(result, np.float64), want, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("implementation", LOGPROB_IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature, softcap", [(1.0, 0.0), (0.6, 0.0), (1.5, 3.0)])
def test_both_results_and_their_gradients_are_those_of_the_definition(implementation, temperature, softcap):
    check(temperature=temperature, softcap=softcap, implementation=implementation, chunk=16)


def test_bfloat16_operands_give_bfloat16_gradients():
    check(dtype=jnp.bfloat16, tolerance=2e-2, chunk=16)


@pytest.mark.parametrize("shape, vocab, chunk", [((1,), 2, 64), ((130,), 129, 64), ((3, 7), 5, 1), ((0,), 3, 4)])
def test_sizes_that_divide_nothing(shape, vocab, chunk):
    check(shape, vocab, chunk=chunk)


def test_without_a_mask_all_tokens_count():
    hidden, head, targets, _, _ = operands()
    results = token_logprobs(hidden, head, targets), token_logprobs(hidden, head, targets, 1.0, np.ones(SHAPE, bool))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.all(results[0][0] < 0)


def test_logits_too_large_for_exp_give_finite_results_and_gradients():
    hidden, head, targets, _, _ = operands()
    run = jax.grad(lambda h: sum(map(jnp.sum, token_logprobs(h, head, targets, chunk=16))))
    assert np.all(np.isfinite(run(hidden * 100)))


def test_logits_of_all_tokens_exist_neither_forwards_nor_backwards():
    hidden, head, targets, _, weights = operands((64,))

    def run(hidden, head, chunk):
        logprob, entropy = token_logprobs(hidden, head, targets, chunk=chunk)
        return jnp.sum(weights[0] * logprob + weights[1] * entropy)

    largest = {
        chunk: max(
            np.prod(shape)
            for shape in shapes_in(jax.make_jaxpr(jax.grad(partial(run, chunk=chunk), (0, 1)))(hidden, head))
        )
        for chunk in (16, 64)
    }
    assert largest == {16: max(16, WIDTH) * VOCAB, 64: 64 * VOCAB}


def test_a_chunk_of_nothing_and_an_unknown_implementation_are_refused():
    with pytest.raises(ValueError, match="token_logprobs: chunk = 0: must be at least 1"):
        token_logprobs(*operands()[:3], chunk=0)
    with pytest.raises(ValueError, match="'fused': must be one of chunks, reference"):
        token_logprobs(*operands()[:3], implementation="fused")
