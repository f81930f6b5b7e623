"""Cross-entropy through the head, without the logits of a whole batch ever existing.

B batch, L length, C positions of a row in one chunk, D model width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from opendeep_jax.parallel.axes import batch_shards


def chunked_cross_entropy(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    chunk_tokens: int,
    z_loss_weight: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, "B L"]]:
    """Sums `-log softmax(hidden @ head)[target] + z_loss_weight * logsumexp²` over the positions in `mask`.

    Logits exist for about `chunk_tokens` tokens of a device at a time (the same positions of all its rows), in float32,
    and are never computed twice: where a gradient is wanted, each chunk's share is made while its logits are there.

    Returns:
        The sum (divide by the global count of targets for a mean), and each position's cross-entropy without the
        z-loss, 0 outside the mask; only the first carries a gradient.
    """
    rows, length = hidden.shape[0] // batch_shards(), hidden.shape[1]
    chunk = min(max(chunk_tokens // max(rows, 1), 1), length)
    fill = ((0, 0), (0, -length % chunk))
    hidden = jnp.pad(hidden, (*fill, (0, 0)))
    targets, mask = jnp.pad(targets, fill), jnp.pad(mask, fill)
    total, each = _loss(chunk, z_loss_weight, hidden, head, targets, mask)
    return total, lax.stop_gradient(each[:, :length])


def _chunks(x, chunk):
    """[B, L, …] as [L/C, B, C, …]: cut along positions, so that rows stay on their devices."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _unchunk(x):
    """The inverse of `_chunks`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _chunk_terms(hidden, head, targets, mask, z_loss_weight):
    logits = jnp.einsum("bcd,dv->bcv", hidden, head, preferred_element_type=jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    each = jnp.where(mask, log_z - target_logit, 0.0)
    total = jnp.sum(each) + z_loss_weight * jnp.sum(jnp.where(mask, jnp.square(log_z), 0.0))
    return logits, log_z, each, total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(chunk, z_loss_weight, hidden, head, targets, mask):
    def body(total, inputs):
        hidden, targets, mask = inputs
        _, _, each, part = _chunk_terms(hidden, head, targets, mask, z_loss_weight)
        return total + part, each

    inputs = tuple(_chunks(x, chunk) for x in (hidden, targets, mask))
    total, each = lax.scan(body, jnp.float32(0), inputs)
    return total, _unchunk(each)


def _loss_forward(chunk, z_loss_weight, hidden, head, targets, mask):
    def body(carry, inputs):
        total, d_head = carry
        hidden, targets, mask = inputs
        logits, log_z, each, part = _chunk_terms(hidden, head, targets, mask, z_loss_weight)
        # d loss / d logits = softmax * (1 + 2 z log Z) - onehot(target)
        slope = jnp.where(mask, 1.0 + 2.0 * z_loss_weight * log_z, 0.0)[..., None]
        hit = (targets[..., None] == jnp.arange(logits.shape[-1])) & mask[..., None]
        d_logits = (jnp.exp(logits - log_z[..., None]) * slope - hit).astype(hidden.dtype)
        d_hidden = jnp.einsum("bcv,dv->bcd", d_logits, head, preferred_element_type=jnp.float32)
        d_head += jnp.einsum("bcd,bcv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
        return (total + part, d_head), (each, d_hidden.astype(hidden.dtype))

    inputs = tuple(_chunks(x, chunk) for x in (hidden, targets, mask))
    start = jnp.float32(0), jnp.zeros(head.shape, jnp.float32)
    (total, d_head), (each, d_hidden) = lax.scan(body, start, inputs)
    return (total, _unchunk(each)), (_unchunk(d_hidden), d_head.astype(head.dtype))


def _loss_backward(chunk, z_loss_weight, saved, cotangents):
    d_hidden, d_head = saved
    slope, _ = cotangents
    return (d_hidden * slope).astype(d_hidden.dtype), (d_head * slope).astype(d_head.dtype), None, None


_loss.defvjp(_loss_forward, _loss_backward)
