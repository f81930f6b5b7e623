"""Attention over the paged cache: the cores that take the place of training's, given what was kept of earlier tokens.

B rows of this device, T new tokens of each, n = B T of them flat, N pages of a row's table of p positions, S = N p,
D model width, H heads, G key/value heads, Q size of a head, C latent, R rotated key.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.flash_mla.blocks import attention as causal_attention
from kernels_pallas.mla_decode import mla_decode
from kernels_pallas.target import widened
from opendeep_jax.generation.cache import PAGE_AXIS, LayerCache, as_numbers, as_stored
from opendeep_jax.generation.requests import MOST_DRAFTS
from opendeep_jax.models.attention import AttentionMarks, GroupedQueryAttention, MultiHeadLatentAttention, Scoring
from opendeep_jax.parallel.collectives import all_gather

FEW = MOST_DRAFTS + 1
"""Up to so many new tokens of a row are attended to as single ones: absorbed, or without blocks."""


class CachePlaces(NamedTuple):
    """Positions and pages of the new tokens."""

    positions: Int[Array, "B T"]
    """Positions in their texts, and so in the cache."""
    present: Bool[Array, "B T"]
    """True where there is a token."""
    pages: Int[Array, "B N"]
    """The rows' page tables, as far as this step looks."""
    lengths: Int[Array, "B"]
    """Positions of each row, the new ones included."""
    first: bool = False
    """True for a first chunk: its tokens see each other alone, and the cache is written to, not read."""


def update_cache(cache: LayerCache, values: dict[str, Array], places: CachePlaces) -> LayerCache:
    """The cache with the new tokens' values [B, T, ...] in their places."""
    size, new = page_size(cache), places.positions.shape[1]
    if places.first and new % size == 0:  # whole pages, which may hold anything behind a row's last token
        table = jnp.pad(places.pages, ((0, 0), (0, max(new // size - places.pages.shape[1], 0))))[:, : new // size]
        begun = jnp.arange(new // size) * size < places.lengths[:, None]
        table = jnp.where(begun, table, 0)

        def paged(name: str, pool: Array) -> Array:
            x = values[name].reshape(*table.shape, size, *values[name].shape[2:])
            return as_stored(jnp.moveaxis(x, 2, 1 + PAGE_AXIS[name]), pool.dtype)

        return {name: pool.at[table].set(paged(name, pool)) for name, pool in cache.items()}
    number = places.positions // size
    page = jnp.take_along_axis(places.pages, number, axis=1, mode="clip")
    page = jnp.where(places.present & (number < places.pages.shape[1]), page, 0)

    def in_pages(name: str) -> tuple:
        return page, *[slice(None)] * (PAGE_AXIS[name] - 1), places.positions % size

    return {
        name: pool.at[in_pages(name)].set(as_stored(values[name], pool.dtype), mode="drop")
        for name, pool in cache.items()
    }


def page_size(cache: LayerCache) -> int:
    """Return the number of positions in a page of an attention layer's cache."""
    name, pool = next(iter(cache.items()))
    return pool.shape[PAGE_AXIS[name]]


def grouped_core(
    attention: GroupedQueryAttention, cache: LayerCache, places: CachePlaces, query, key, value, scoring: Scoring
) -> tuple[Float[Array, "1 n H Q"], LayerCache]:
    """Attend in a GQA layer: return the heads' values of the new tokens and the updated cache."""
    rows, dtype = places.positions.shape, value.dtype
    query, key, value = (y.reshape(*rows, *y.shape[2:]) for y in (query, key, value))
    cache = update_cache(cache, {"key": key, "value": value}, places)
    if places.first:
        own = places.present.astype(jnp.int32)
        out = causal_attention(query, key, value, own, own, None, None, *scoring)
        return out.reshape(1, -1, *out.shape[2:]), cache
    size = page_size(cache)
    pages, first = _visible_pages(places, size, scoring.window)
    keys, values = (_gathered(cache[name], pages) for name in ("key", "value"))
    at = first[:, None, None] + jnp.arange(pages.shape[1] * size).reshape(-1, size)
    inside = at < places.lengths[:, None, None]
    # What lies behind a row's positions may be anything.
    values = jnp.where(inside[:, :, None, :, None], values, 0)
    if rows[1] > FEW:
        flat = lambda y: y.reshape(rows[0], -1, *y.shape[3:])  # noqa: E731
        marks = places.present.astype(jnp.int32), flat(inside).astype(jnp.int32), places.positions, flat(at)
        keys, values = flat(keys.transpose(0, 1, 4, 2, 3)), flat(values.transpose(0, 1, 3, 2, 4))
        out = causal_attention(query, keys, values, *marks, *scoring)
    else:
        out = _attend_few(query, keys, values, at, places.positions, *scoring)
    return out.reshape(1, -1, *out.shape[2:]).astype(dtype), cache


def _visible_pages(places: CachePlaces, size: int, window: int | None) -> tuple[Int[Array, "B N"], Int[Array, "B"]]:
    """The pages that the rows' new tokens may see any of, and the position where the first of them begins."""
    count, new = places.pages.shape[1], places.positions.shape[1]
    needed = count if window is None else min(count, (window + new - 2) // size + 2)
    if needed == count:
        return places.pages, jnp.zeros(len(places.pages), jnp.int32)
    first = jnp.clip((places.positions[:, 0] - window + 1) // size, 0, count - needed)
    return jnp.take_along_axis(places.pages, first[:, None] + jnp.arange(needed), axis=1), first * size


def _gathered(pool: Float[Array, "P *rest"], pages: Int[Array, "B N"]) -> Float[Array, "B N *rest"]:
    return as_numbers(pool.at[pages].get(mode="promise_in_bounds"))


def _attend_few(query, keys, values, at, positions, scale, window, sinks, softcap) -> Float[Array, "B T H Q"]:
    """Attention of a few queries [B, T, H, Q] to keys [B, N, G, Q, p] and values [B, N, G, p, Q]; in float32.

    Each page is multiplied by itself, as it lies: no key is moved but out of the pool.

    Args:
        at: positions of the keys, [B, N, p]; `positions` of the queries, [B, T].
    """
    rows, new, heads, size = query.shape
    count, groups = keys.shape[1:3]
    query = query.reshape(rows, 1, new, groups, -1, size).transpose(0, 1, 3, 4, 2, 5)
    query = jnp.broadcast_to(query, (rows, count, *query.shape[2:]))
    query, keys, values = widened(query, keys, values)
    scores = jnp.einsum("bngrtq,bngqp->bngrtp", query, keys, preferred_element_type=jnp.float32) * scale
    scores = jnp.tanh(scores / softcap) * softcap if softcap else scores
    distance = positions[:, None, :, None] - at[:, :, None]
    seen = (distance >= 0) & (distance < window) if window is not None else distance >= 0
    seen = seen[:, :, None, None]
    scores = jnp.where(seen, scores, -1e30)
    largest = jnp.max(scores, axis=(1, 5), keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(groups, -1, 1, 1)
        largest = jnp.maximum(largest, sinks)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=(1, 5), keepdims=True)
    total = total if sinks is None else total + jnp.exp(sinks - largest)
    weights = jnp.where(seen, weights / total, 0).astype(values.dtype)
    out = jnp.einsum("bngrtp,bngpq->bngrtq", weights, values, preferred_element_type=jnp.float32)
    return jnp.sum(out, axis=1).transpose(0, 3, 1, 2, 4).reshape(rows, new, heads, size)


def latent_core(
    attention: MultiHeadLatentAttention, cache: LayerCache, places: CachePlaces, nope, rope, latent, key_rope
) -> tuple[Float[Array, "1 n HV"], LayerCache]:
    """Attend in a latent-attention layer: return the heads' values of the new tokens and the updated cache.

    A few tokens are attended to with absorbed projections (DeepSeek-V2 report, section 2.1.2): queries go through the
    keys' up-projection, and what comes out of the latents through the values'. For many, as in a prompt, it is cheaper
    to make the keys and values again.
    """
    rows, rank, dtype = places.positions.shape, attention.config.kv_lora_rank, nope.dtype
    new = jnp.concatenate([all_gather(latent, "tensor", 1), all_gather(key_rope, "tensor", 1)], axis=-1)
    width = cache["latent"].shape[2]
    new = jnp.pad(new, ((0, 0), (0, 0), (0, width - new.shape[2]))).reshape(*rows, width)
    cache = update_cache(cache, {"latent": new}, places)
    up, heads = attention.kv_up[...], attention.kv_up.shape[1]
    if rows[1] <= FEW and not places.first:
        up_key, up_value = up[..., : attention.config.qk_nope_head_dim], up[..., attention.config.qk_nope_head_dim :]
        split = lambda y: y.reshape(-1, heads, y.shape[-1] // heads)  # noqa: E731
        absorbed = jnp.einsum("nhq,chq->nhc", *widened(split(nope), up_key.astype(nope.dtype)))
        # Each new token is a row of its own that sees its own positions.
        lengths = jnp.where(places.present, places.positions + 1, 0).reshape(-1)
        pool, pages = cache["latent"], jnp.repeat(places.pages, rows[1], axis=0)
        if pool.dtype != new.dtype:  # stored as integers: only what is looked at is turned into numbers
            pool = _gathered(pool, places.pages).reshape(-1, *pool.shape[1:])
            pages = jnp.repeat(jnp.arange(len(pool)).reshape(places.pages.shape), rows[1], axis=0)
        out = mla_decode(
            absorbed.astype(dtype),
            split(rope),
            pool,
            pages,
            lengths,
            attention.scale,
            attention.implementation if attention.implementation == "reference" else None,
        )
        out = jnp.einsum("nhc,chv->nhv", *widened(out, up_value.astype(out.dtype))).astype(dtype)
    else:
        if places.first:
            held, inside, orders = new, places.present, (None, None)
        else:
            held = _gathered(cache["latent"], places.pages).reshape(rows[0], -1, width)
            at = jnp.broadcast_to(jnp.arange(held.shape[1]), held.shape[:2])
            inside, orders = at < places.lengths[:, None], (places.positions, at)
            held = jnp.where(inside[..., None], held, 0).astype(dtype)
        marks = zip((places.present.astype(jnp.int32), inside.astype(jnp.int32)), orders, strict=True)
        out = attention.flash(
            nope.reshape(*rows, -1),
            rope.reshape(*rows, -1),
            held[..., :rank],
            held[..., rank : rank + attention.config.qk_rope_head_dim],
            *(AttentionMarks(*mark) for mark in marks),
        )
    return out.reshape(1, rows[0] * rows[1], -1), cache


CORES = {GroupedQueryAttention.over_row: grouped_core, MultiHeadLatentAttention.over_row: latent_core}
"""The core over a cache that takes the place of each core of training's."""
