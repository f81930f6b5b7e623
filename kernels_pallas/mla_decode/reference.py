"""Reference of absorbed latent decoding in plain JAX: every row's pages gathered, and a mask."""

import jax.numpy as jnp


def mla_decode(query_latent, query_rope, cache, page_table, lengths, scale):
    """See `api.mla_decode`."""
    exact = jnp.promote_types(cache.dtype, jnp.float32)
    latent_size = query_latent.shape[-1]
    cached = cache[page_table].reshape(page_table.shape[0], -1, cache.shape[-1]).astype(exact)
    seen = jnp.arange(cached.shape[1]) < lengths[:, None]
    # What lies beyond a row's length may be anything, NaN too.
    cached = jnp.where(seen[..., None], cached, 0)
    query = jnp.concatenate([query_latent, query_rope], axis=-1).astype(exact)
    scores = jnp.einsum("bhc,bsc->bhs", query, cached[..., : query.shape[-1]]) * scale
    scores = jnp.where(seen[:, None], scores, -1e30)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)) * seen[:, None]
    weights /= jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
    return jnp.einsum("bhs,bsc->bhc", weights, cached[..., :latent_size]).astype(query_latent.dtype)
