"""Causal attention over packed documents, in plain JAX.

What is kept for the backward pass is linear in the length; the scores of one block of queries exist at a time. The
forward pass keeps its output and each query's log-sum-exp; the backward pass makes the scores again from them
(Dao et al. 2022). Queries go in blocks that meet only the keys up to their own end, so that nearly half of the scores
are never computed.

B batch, L length, H query heads, G key/value heads, R = H / G query heads per key/value head, Q query/key head size,
V value head size, S keys that a block of queries meets.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

MIN_BLOCK = 256
MAX_BLOCKS = 8


def causal_attention(
    query: Float[Array, "B L H Q"],
    key: Float[Array, "B L G Q"],
    value: Float[Array, "B L G V"],
    query_segments: Int[Array, "B L"],
    key_segments: Int[Array, "B S"],
    query_order: Int[Array, "B L"] | None,
    key_order: Int[Array, "B S"] | None,
    scale: float,
) -> Float[Array, "B L H V"]:
    """Softmax attention of each position to the earlier ones (and itself) of its own segment; softmax in float32.

    H is a multiple of G; query head h reads key/value head h // R. Orders are indices in the row; without them L and S
    are the same positions. The output is named "attention_output" for remat.
    """
    batch, length, heads, _ = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, length, groups, heads // groups, -1).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    places = (query_segments, query_order), (key_segments, key_order)
    out = _attention(scale, query, key, value, places)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


def _blocks(length: int, places) -> Iterator[tuple[slice, slice]]:
    """Queries of each block and the keys that it meets: in a row's own order, those up to its end."""
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield slice(start, stop), slice(0, stop if places[0][1] is None else None)


def _scores(query, key, places, rows, seen, scale):
    """Scaled scores [B, G, R, rows, S] of a block in float32, and -1e30 where a query may not look."""
    scores = jnp.einsum("bgrlq,bgsq->bgrls", query[:, :, :, rows], key[:, :, seen], preferred_element_type=jnp.float32)
    (query_segments, query_order), (key_segments, key_order) = places
    if query_order is None:
        causal = jnp.arange(rows.start, rows.stop)[:, None] >= jnp.arange(seen.stop)
    else:
        causal = query_order[:, rows, None] >= key_order[:, None, seen]
    visible = causal & (query_segments[:, rows, None] == key_segments[:, None, seen])
    return jnp.where(visible[:, None, None], scores * scale, -1e30)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale, query, key, value, places):
    return _forward(scale, query, key, value, places)[0]


def _forward(scale, query, key, value, places):
    outputs, log_sums = [], []
    for rows, seen in _blocks(query.shape[3], places):
        scores = _scores(query, key, places, rows, seen, scale)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum(
            "bgrls,bgsv->bgrlv",
            weights.astype(value.dtype),
            value[:, :, seen],
            preferred_element_type=jnp.float32,
        )
        outputs.append((out / total).astype(value.dtype))
        log_sums.append(largest + jnp.log(total))
    # Named here, not by the caller: these very arrays are what the backward pass needs.
    out = checkpoint_name(jnp.concatenate(outputs, axis=3), "attention_output")
    log_sum = checkpoint_name(jnp.concatenate(log_sums, axis=3), "attention_output")
    return out, (query, key, value, places, out, log_sum)


def _backward(scale, saved, d_out):
    query, key, value, places, out, log_sum = saved
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_key, d_value = (jnp.zeros(jnp.swapaxes(x, 2, 3).shape, jnp.float32) for x in (key, value))
    d_query = []
    for rows, seen in _blocks(query.shape[3], places):
        weights = jnp.exp(_scores(query, key, places, rows, seen, scale) - log_sum[:, :, :, rows])
        d_rows = d_out[:, :, :, rows]
        d_weights = product("bgrlv,bgsv->bgrls", d_rows, value[:, :, seen])
        d_scores = (weights * (d_weights - delta[:, :, :, rows]) * scale).astype(query.dtype)
        # Transposed, so that the small operand is put into another order and not the scores.
        d_value = d_value.at[..., seen].add(product("bgrlv,bgrls->bgvs", d_rows, weights.astype(value.dtype)))
        d_key = d_key.at[..., seen].add(product("bgrlq,bgrls->bgqs", query[:, :, :, rows], d_scores))
        d_query.append(product("bgrls,bgsq->bgrlq", d_scores, key[:, :, seen]).astype(query.dtype))
    d_key, d_value = jnp.swapaxes(d_key, 2, 3).astype(key.dtype), jnp.swapaxes(d_value, 2, 3).astype(value.dtype)
    return jnp.concatenate(d_query, axis=3), d_key, d_value, None


_attention.defvjp(_forward, _backward)
