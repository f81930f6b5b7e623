"""Reference of training attention in plain JAX: all scores at once.

B rows, L query length, S key length, H heads, N unrotated size, R rotated size, V value size.
"""

import jax.numpy as jnp


def flash_mla(
    query_nope,
    query_rope,
    key_nope,
    key_rope,
    value,
    query_segments,
    key_segments,
    query_order,
    key_order,
    *,
    num_heads,
    scale,
):
    """See `api.flash_mla`."""
    batch, length = query_nope.shape[:2]
    heads = lambda x: x.reshape(*x.shape[:2], num_heads, -1).astype(jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
    scores = jnp.einsum("blhn,bshn->bhls", heads(query_nope), heads(key_nope))
    scores += jnp.einsum("blhr,bsr->bhls", heads(query_rope), key_rope.astype(scores.dtype))
    if query_order is None:
        query_order = key_order = jnp.arange(length)[None]
    visible = (query_segments[:, :, None] == key_segments[:, None]) & (query_order[:, :, None] >= key_order[:, None])
    visible = visible[:, None]
    scores = jnp.where(visible, scores * scale, -1e30)
    # A query that sees nothing gets zeros.
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)) * visible
    weights /= jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
    out = jnp.einsum("bhls,bshv->blhv", weights, heads(value))
    return out.reshape(batch, length, -1).astype(value.dtype)
