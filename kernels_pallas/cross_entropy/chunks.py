"""Cross-entropy and log-probabilities of a chunk of tokens at a time, in plain JAX.

Of the cross-entropy each chunk's gradients are made while its logits are there; log-probabilities, whose gradients
depend on what follows them, make the logits again in the backward pass.

T tokens, C tokens of a chunk, D model width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.target import widened


def loss(hidden, head, targets, mask, z_loss_weight, chunk, softcap=0.0):
    """See `api.fused_cross_entropy`."""
    count, padded = _padded(chunk, hidden, targets, mask)
    total, each = _loss((count, z_loss_weight, softcap), head, *padded)
    return total, each[: len(targets)]


def token_logprobs(hidden, head, targets, mask, temperature, chunk, softcap=0.0):
    """See `api.token_logprobs`."""
    count, padded = _padded(chunk, hidden, targets, mask)
    logprob, entropy = _logprobs((count, softcap), head, jnp.asarray(temperature, jnp.float32), *padded)
    return logprob[: len(targets)], entropy[: len(targets)]


def _padded(chunk, *arrays):
    """The number of chunks, and arrays [T, ...] padded, as little as possible, so that all chunks have one size."""
    tokens = len(arrays[0])
    count = max(-(-tokens // chunk), 1)
    return count, [jnp.pad(x, ((0, -tokens % count), *[(0, 0)] * (x.ndim - 1))) for x in arrays]


def _cut(count, *arrays):
    """Each [T, ...] as [T/C, C, ...]."""
    return tuple(x.reshape(count, len(x) // count, *x.shape[1:]) for x in arrays)


def _logits(hidden, head, softcap):
    logits = jnp.matmul(*widened(hidden, head), preferred_element_type=jnp.float32)
    return jnp.tanh(logits / softcap) * softcap if softcap else logits


def _pull_back(hidden, head, logits, d_logits, softcap):
    """Gradients to a chunk's hidden, in its type, and to the head, in float32, from those to its capped logits."""
    if softcap:
        d_logits *= 1 - jnp.square(logits / softcap)
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = jnp.einsum("cv,dv->cd", *widened(d_logits, head), preferred_element_type=jnp.float32)
    d_head = jnp.einsum("cd,cv->dv", *widened(hidden, d_logits), preferred_element_type=jnp.float32)
    return d_hidden.astype(hidden.dtype), d_head


def _hits(targets, logits):
    """True [C, V] at each token's target."""
    return targets[:, None] == jnp.arange(logits.shape[1])


def _terms(hidden, head, targets, mask, z_loss_weight, softcap):
    logits = _logits(hidden, head, softcap)
    log_z = jax.nn.logsumexp(logits, axis=1)
    target_logit = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    each = jnp.where(mask, log_z - target_logit, 0.0)
    total = jnp.sum(each) + z_loss_weight * jnp.sum(jnp.where(mask, jnp.square(log_z), 0.0))
    return logits, log_z, each, total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(how, head, hidden, targets, mask):
    def body(total, inputs):
        hidden, targets, mask = inputs
        _, _, each, part = _terms(hidden, head, targets, mask, *how[1:])
        return total + part, each

    total, each = lax.scan(body, jnp.float32(0), _cut(how[0], hidden, targets, mask))
    return total, each.reshape(-1)


def _loss_forward(how, head, hidden, targets, mask):
    count, z_loss_weight, softcap = how

    def body(carry, inputs):
        total, d_head = carry
        hidden, targets, mask = inputs
        logits, log_z, each, part = _terms(hidden, head, targets, mask, z_loss_weight, softcap)
        # d loss / d logits = softmax * (1 + 2 z log Z) - onehot(target)
        slope = jnp.where(mask, 1.0 + 2.0 * z_loss_weight * log_z, 0.0)[:, None]
        d_logits = jnp.exp(logits - log_z[:, None]) * slope - (_hits(targets, logits) & mask[:, None])
        d_hidden, more = _pull_back(hidden, head, logits, d_logits, softcap)
        return (total + part, d_head + more), (each, d_hidden)

    start = jnp.float32(0), jnp.zeros(head.shape, jnp.float32)
    (total, d_head), (each, d_hidden) = lax.scan(body, start, _cut(count, hidden, targets, mask))
    return (total, each.reshape(-1)), (d_head.astype(head.dtype), d_hidden.reshape(hidden.shape))


def _loss_backward(how, gradients, cotangents):
    d_head, d_hidden = ((x * cotangents[0]).astype(x.dtype) for x in gradients)
    return d_head, d_hidden, None, None


_loss.defvjp(_loss_forward, _loss_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(how, head, temperature, hidden, targets, mask):
    return _logprobs_forward(how, head, temperature, hidden, targets, mask)[0]


def _logprobs_forward(how, head, temperature, hidden, targets, mask):
    def body(_, inputs):
        hidden, targets, mask = inputs
        logits = _logits(hidden, head, how[1]) / temperature
        log_z = jax.nn.logsumexp(logits, axis=1)
        log_p = logits - log_z[:, None]
        logprob = jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=1)
        return None, (jnp.where(mask, logprob, 0.0), jnp.where(mask, entropy, 0.0), log_z)

    _, columns = lax.scan(body, None, _cut(how[0], hidden, targets, mask))
    logprob, entropy, log_z = (column.reshape(-1) for column in columns)
    return (logprob, entropy), (head, temperature, hidden, targets, mask, log_z, entropy)


def _logprobs_backward(how, saved, cotangents):
    head, temperature, hidden, *columns = saved
    count, softcap = how

    def body(d_head, inputs):
        hidden, targets, mask, log_z, entropy, slope, entropy_slope = inputs
        capped = _logits(hidden, head, softcap)
        log_p = capped / temperature - log_z[:, None]
        # d log p(target) / d logits = onehot(target) - p, d entropy / d logits = -p (log p + entropy)
        slope, entropy_slope = (jnp.where(mask, x / temperature, 0.0)[:, None] for x in (slope, entropy_slope))
        falls = jnp.exp(log_p) * (slope + entropy_slope * (log_p + entropy[:, None]))
        d_logits = jnp.where(_hits(targets, log_p), slope, 0.0) - falls
        d_hidden, more = _pull_back(hidden, head, capped, d_logits, softcap)
        return d_head + more, d_hidden

    start = jnp.zeros(head.shape, jnp.float32)
    d_head, d_hidden = lax.scan(body, start, _cut(count, hidden, *columns, *cotangents))
    return d_head.astype(head.dtype), None, d_hidden.reshape(hidden.shape), None, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)
