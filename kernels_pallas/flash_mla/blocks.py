"""Training attention over packed documents, in plain JAX: for CPUs.

What is kept for the backward pass is linear in the length; the scores of one block of queries exist at a time. The
forward pass keeps its output and each query's log-sum-exp; the backward pass makes the scores again from them
(Dao et al. 2022). Where order is the index, a block of queries meets only the keys up to its own end, so that nearly
half of the scores are never computed.

B rows, L query length, S key length, H query heads, G key/value heads, R = H / G query heads per key/value head,
Q query/key head size, V value head size.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.target import widened

MIN_BLOCK = 256
MAX_BLOCKS = 8


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
    heads = lambda x: x.reshape(*x.shape[:2], num_heads, -1)  # noqa: E731
    shared = jnp.broadcast_to(key_rope[:, :, None], (*key_rope.shape[:2], num_heads, key_rope.shape[-1]))
    query = jnp.concatenate([heads(query_nope), heads(query_rope)], axis=-1)
    key = jnp.concatenate([heads(key_nope), shared], axis=-1)
    marks = query_segments, key_segments, query_order, key_order
    out = attention(query, key, heads(value), *marks, scale)
    return out.reshape(*out.shape[:2], -1)


def attention(
    query,
    key,
    value,
    query_segments,
    key_segments,
    query_order,
    key_order,
    scale,
    window=None,
    sinks=None,
    softcap=0.0,
):
    """Attention of query [B, L, H, Q] to key [B, S, G, Q] and value [B, S, G, V]: [B, L, H, V].

    H is a multiple of G; query head h reads key/value head h // R. The rest as in `api.flash_mla`.

    Args:
        window: int32 scalar, tokens that a query sees, itself included; None for all.
        sinks: [H], a score of each head that takes part in the softmax and has no value; None for none.
        softcap: c of `c tanh(score / c)`; 0 leaves the scores as they are.
    """
    batch, length, heads, _ = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, length, groups, heads // groups, -1).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    marks = query_segments, key_segments, query_order, key_order, window
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(groups, -1, 1, 1)
    out = _attention((scale, softcap), query, key, value, sinks, marks)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


def _blocks(length: int, keys: int, ordered: bool) -> Iterator[tuple[slice, slice]]:
    """Queries of each block, and the keys that they meet."""
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    for start in range(0, length, size):
        end = min(start + size, length)
        yield slice(start, end), slice(0, end if ordered else keys)


def _scores(query, key, marks, rows, seen, how):
    """Scores [B, G, R, rows, seen] of a block in float32, -1e30 where a query may not look; the soft cap's slope."""
    scale, softcap = how
    scores, slope = _product("bgrlq,bgsq->bgrls", query[:, :, :, rows], key[:, :, seen]) * scale, 1.0
    if softcap:
        bounded = jnp.tanh(scores / softcap)
        scores, slope = bounded * softcap, 1 - bounded**2
    query_segments, key_segments, query_order, key_order, window = marks
    if query_order is None:
        distance = jnp.arange(rows.start, rows.stop)[:, None] - jnp.arange(seen.stop)
    else:
        distance = query_order[:, rows, None] - key_order[:, None, seen]
    visible = (distance >= 0) & (query_segments[:, rows, None] == key_segments[:, None, seen])
    if window is not None:
        visible &= distance < window
    return jnp.where(visible[:, None, None], scores, -1e30), slope


def _product(equation, *factors):
    """The einsum of two arrays, in float32."""
    return jnp.einsum(equation, *widened(*factors), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how, query, key, value, sinks, marks):
    return _forward(how, query, key, value, sinks, marks)[0]


def _forward(how, query, key, value, sinks, marks):
    outputs, log_sums = [], []
    for rows, seen in _blocks(query.shape[3], key.shape[2], marks[2] is None):
        scores, _ = _scores(query, key, marks, rows, seen, how)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        if sinks is not None:
            largest = jnp.maximum(largest, sinks)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sinks is not None:
            total += jnp.exp(sinks - largest)
        out = _product("bgrls,bgsv->bgrlv", weights.astype(value.dtype), value[:, :, seen])
        # A query that sees nothing gives zeros, and its weights come back as zeros.
        blind = largest < -1e29
        outputs.append(jnp.where(blind, 0, out / total).astype(value.dtype))
        log_sums.append(jnp.where(blind, 0, largest + jnp.log(total)))
    # Named here, not by the caller: these very arrays are what the backward pass needs.
    out = checkpoint_name(jnp.concatenate(outputs, axis=3), "attention_output")
    log_sum = checkpoint_name(jnp.concatenate(log_sums, axis=3), "attention_output")
    return out, (query, key, value, sinks, marks, out, log_sum)


def _backward(how, saved, d_out):
    query, key, value, sinks, marks, out, log_sum = saved
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_key, d_value = (jnp.zeros(jnp.swapaxes(x, 2, 3).shape, jnp.float32) for x in (key, value))
    d_query = []
    for rows, seen in _blocks(query.shape[3], key.shape[2], marks[2] is None):
        scores, slope = _scores(query, key, marks, rows, seen, how)
        weights = jnp.exp(scores - log_sum[:, :, :, rows])
        d_rows = d_out[:, :, :, rows]
        d_weights = _product("bgrlv,bgsv->bgrls", d_rows, value[:, :, seen])
        d_scores = (weights * (d_weights - delta[:, :, :, rows]) * how[0] * slope).astype(query.dtype)
        # Transposed, so that the small operand is put into another order and not the scores.
        d_value = d_value.at[..., seen].add(_product("bgrlv,bgrls->bgvs", d_rows, weights.astype(value.dtype)))
        d_key = d_key.at[..., seen].add(_product("bgrlq,bgrls->bgqs", query[:, :, :, rows], d_scores))
        d_query.append(_product("bgrls,bgsq->bgrlq", d_scores, key[:, :, seen]).astype(query.dtype))
    d_key, d_value = jnp.swapaxes(d_key, 2, 3).astype(key.dtype), jnp.swapaxes(d_value, 2, 3).astype(value.dtype)
    d_sinks = None
    if sinks is not None:
        d_sinks = -jnp.sum(jnp.exp(sinks - log_sum) * delta, axis=(0, 3), keepdims=True)[0]
    return jnp.concatenate(d_query, axis=3), d_key, d_value, d_sinks, None


_attention.defvjp(_forward, _backward)
