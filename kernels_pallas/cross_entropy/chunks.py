"""Cross-entropy of a chunk of tokens at a time, in plain JAX: each chunk's gradients while its logits are there.

T tokens, C tokens of a chunk, D model width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.target import widened


def loss(hidden, head, targets, mask, z_loss_weight, chunk, softcap=0.0):
    """See `api.fused_cross_entropy`."""
    tokens = hidden.shape[0]
    count = max(-(-tokens // chunk), 1)
    fill = -tokens % count  # chunks of one size, with as little as possible to fill up
    hidden = jnp.pad(hidden, ((0, fill), (0, 0)))
    targets, mask = jnp.pad(targets, (0, fill)), jnp.pad(mask, (0, fill))
    total, each = _loss((count, z_loss_weight, softcap), hidden, head, targets, mask)
    return total, each[:tokens]


def _terms(hidden, head, targets, mask, z_loss_weight, softcap):
    logits = jnp.matmul(*widened(hidden, head), preferred_element_type=jnp.float32)
    logits = jnp.tanh(logits / softcap) * softcap if softcap else logits
    log_z = jax.nn.logsumexp(logits, axis=1)
    target_logit = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    each = jnp.where(mask, log_z - target_logit, 0.0)
    total = jnp.sum(each) + z_loss_weight * jnp.sum(jnp.where(mask, jnp.square(log_z), 0.0))
    return logits, log_z, each, total


def _cut(count, *arrays):
    """Each [T, ...] as [T/C, C, ...]."""
    return tuple(x.reshape(count, -1, *x.shape[1:]) for x in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(how, hidden, head, targets, mask):
    def body(total, inputs):
        hidden, targets, mask = inputs
        _, _, each, part = _terms(hidden, head, targets, mask, *how[1:])
        return total + part, each

    total, each = lax.scan(body, jnp.float32(0), _cut(how[0], hidden, targets, mask))
    return total, each.reshape(-1)


def _forward(how, hidden, head, targets, mask):
    count, z_loss_weight, softcap = how

    def body(carry, inputs):
        total, d_head = carry
        hidden, targets, mask = inputs
        logits, log_z, each, part = _terms(hidden, head, targets, mask, z_loss_weight, softcap)
        # d loss / d logits = softmax * (1 + 2 z log Z) - onehot(target)
        slope = jnp.where(mask, 1.0 + 2.0 * z_loss_weight * log_z, 0.0)[:, None]
        hit = (targets[:, None] == jnp.arange(logits.shape[1])) & mask[:, None]
        d_logits = jnp.exp(logits - log_z[:, None]) * slope - hit
        if softcap:
            d_logits *= 1 - jnp.square(logits / softcap)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("cv,dv->cd", *widened(d_logits, head), preferred_element_type=jnp.float32)
        d_head += jnp.einsum("cd,cv->dv", *widened(hidden, d_logits), preferred_element_type=jnp.float32)
        return (total + part, d_head), (each, d_hidden.astype(hidden.dtype))

    start = jnp.float32(0), jnp.zeros(head.shape, jnp.float32)
    (total, d_head), (each, d_hidden) = lax.scan(body, start, _cut(count, hidden, targets, mask))
    return (total, each.reshape(-1)), (d_hidden.reshape(hidden.shape), d_head.astype(head.dtype))


def _backward(how, saved, cotangents):
    d_hidden, d_head = saved
    slope, _ = cotangents
    return (d_hidden * slope).astype(d_hidden.dtype), (d_head * slope).astype(d_head.dtype), None, None


_loss.defvjp(_forward, _backward)
