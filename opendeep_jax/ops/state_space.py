"""Mamba-2's recurrence and the convolution before it (Dao and Gu 2024, arXiv:2405.21060), for packed documents.

Each head keeps a state S [P, N] and goes through a document token by token:

    S = exp(step * decay) S + step * x b^T        y = S c

A chunk of positions is computed at once, as attention whose scores are `c . b` with a decay between the positions; only
the state passes from chunk to chunk. All of it is float32.

B batch, L length, H heads, P size of a head, G groups of heads, N state size, C channels, K positions of the kernel,
k = K - 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def document_numbers(segment_ids: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Number the runs of equal segment ids from 0: neighbors with one number are one document."""
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(starts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def causal_convolution(
    x: Float[Array, "B L C"],
    kernel: Float[Array, "C K"],
    bias: Float[Array, "C"] | None,
    documents: Int[Array, "B L"],
    before: Float[Array, "B k C"],
) -> Float[Array, "B L C"]:
    """Each channel's sum over its last K positions in the document, times the kernel; the kernel's last is the newest.

    Args:
        documents: `document_numbers`.
        before: what the first position's document had before it; zeros for nothing.
    """
    length, size = x.shape[1], kernel.shape[1]
    x = jnp.concatenate([before.astype(jnp.float32), x.astype(jnp.float32)], axis=1)
    documents = jnp.pad(documents, ((0, 0), (size - 1, 0)), mode="edge")
    own, out = documents[:, size - 1 :], 0.0
    for place in range(size):
        part = slice(place, place + length)
        seen = (documents[:, part] == own)[..., None]
        out += jnp.where(seen, x[:, part], 0) * kernel[:, place].astype(jnp.float32)
    return out if bias is None else out + bias.astype(jnp.float32)


def state_space(
    x: Float[Array, "B L H P"],
    step: Float[Array, "B L H"],
    decay: Float[Array, "H"],
    b: Float[Array, "B L G N"],
    c: Float[Array, "B L G N"],
    documents: Int[Array, "B L"],
    state: Float[Array, "B H P N"],
    chunk_size: int,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """The recurrence's outputs, and its state after the last position.

    Args:
        step: time steps; a position with 0 leaves the state as it is.
        decay: below 0: how fast each head forgets.
        documents: `document_numbers`; the state is zero where one begins.
        state: what the first position's document left before it.
        chunk_size: positions that are computed at once.
    """
    length, groups = x.shape[1], b.shape[2]
    size = min(chunk_size, length)
    rest = -length % size

    def chunks(y, fill="constant"):
        """[chunks, B, size, ...]; what is filled up at the end has steps of 0."""
        y = jnp.pad(y, ((0, 0), (0, rest), *[(0, 0)] * (y.ndim - 2)), mode=fill)
        return jnp.moveaxis(y.reshape(len(y), -1, size, *y.shape[2:]), 1, 0)

    def by_group(y):
        """Heads apart by their groups: [B, l, H, ...] to [B, l, G, H / G, ...]."""
        return y.reshape(*y.shape[:2], groups, -1, *y.shape[3:])

    def one_chunk(carry, parts):
        state, last_document = carry
        x, step, b, c, documents = parts
        step = step.astype(jnp.float32)
        x, b, c = (y.astype(jnp.float32) for y in (x, b, c))
        passed = by_group(jnp.cumsum(step * decay.astype(jnp.float32), axis=1))  # [B, l, G, R]: logarithms of decays
        written = by_group(x * step[..., None])  # [B, l, G, R, P]
        position = jnp.arange(size)
        seen = (position[:, None] >= position) & (documents[:, :, None] == documents[:, None])
        between = passed[:, :, None] - passed[:, None]  # [B, l, s, G, R]
        between = jnp.exp(jnp.where(seen[..., None, None], between, -jnp.inf))
        scores = jnp.einsum("blgn,bsgn->blsg", c, b)[..., None] * between
        out = jnp.einsum("blsgr,bsgrp->blgrp", scores, written)
        held = jnp.where((documents == last_document[:, None])[..., None, None], jnp.exp(passed), 0)
        out += jnp.einsum("blgn,bgrpn->blgrp", c, state) * held[..., None]
        left = jnp.where((documents == documents[:, -1:])[..., None, None], jnp.exp(passed[:, -1:] - passed), 0)
        state = state * held[:, -1, ..., None, None] + jnp.einsum("bsgrp,bsgn->bgrpn", written * left[..., None], b)
        return (state, documents[:, -1]), out.reshape(x.shape)

    grouped = state.astype(jnp.float32).reshape(len(state), groups, -1, *state.shape[2:])
    begin = grouped, documents[:, 0]
    parts = *(chunks(y) for y in (x, step, b, c)), chunks(documents, "edge")
    if parts[0].shape[0] == 1:
        (after, _), out = one_chunk(begin, tuple(y[0] for y in parts))
        return out[:, :length], after.reshape(state.shape)
    # A chunk's scores are made again in the backward pass: kept, they would be as much as attention's.
    (after, _), out = jax.lax.scan(jax.checkpoint(one_chunk), begin, parts)
    out = jnp.moveaxis(out, 0, 1).reshape(len(x), -1, *x.shape[2:])
    return out[:, :length], after.reshape(state.shape)
