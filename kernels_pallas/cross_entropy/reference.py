"""Reference of cross-entropy and log-probabilities, with all logits at once; gradients by autodiff. For tests."""

import jax
import jax.numpy as jnp
from jax import lax


def loss(hidden, head, targets, mask, z_loss_weight, chunk, softcap=0.0):
    """See `api.fused_cross_entropy`; `chunk` is not read."""
    logits = _logits(hidden, head, softcap)
    log_z = jax.nn.logsumexp(logits, axis=1)
    each = jnp.where(mask, log_z - jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0], 0.0)
    return jnp.sum(each) + z_loss_weight * jnp.sum(jnp.where(mask, jnp.square(log_z), 0.0)), each


def token_logprobs(hidden, head, targets, mask, temperature, chunk, softcap=0.0):
    """See `api.token_logprobs`; `chunk` is not read."""
    log_p = jax.nn.log_softmax(_logits(hidden, head, softcap) / lax.stop_gradient(temperature), axis=1)
    logprob = jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=1)
    return jnp.where(mask, logprob, 0.0), jnp.where(mask, entropy, 0.0)


def _logits(hidden, head, softcap):
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    return jnp.tanh(logits / softcap) * softcap if softcap else logits
