"""Pairs of query and key blocks that a kernel must visit.

A query sees the keys of its own segment whose order is at most its own. A block's smallest and largest order and
segment tell, without looking inside, that no query of it sees a key of another block, or that all see all.

B rows, L query length, S key length, T steps of the kernel's innermost grid axis.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

VISITED, PARTLY, FIRST, LAST = 1, 2, 4, 8
"""Bits of a step's flags: it computes; it needs a mask; it begins, ends the accumulation of one outer block."""


class BlockVisits(NamedTuple):
    """The kernel's steps in order; those beyond a row's own number repeat its last blocks and have no flags."""

    query: Int[Array, "B T"]
    """Block of queries of each step."""
    key: Int[Array, "B T"]
    """Block of keys of each step."""
    flags: Int[Array, "B T"]
    """VISITED | PARTLY | FIRST | LAST."""
    steps: Int[Array, ""]
    """Steps of the row that has most."""


def visits(
    query_marks: Int[Array, "B 2 L"], key_marks: Int[Array, "B 2 S"], sizes: tuple[int, int], outer: str, ordered: bool
) -> BlockVisits:
    """The steps of a pass over all blocks that meet, one outer block after the other.

    Args:
        query_marks, key_marks: order and segment of each query and key, int32.
        sizes: queries and keys of a block; they divide L and S.
        outer: "query" or "key": whose block stays while the other's change. Each has at least one step, so that its
            result is written even if it meets nothing.
        ordered: order is the index, so that only blocks up to the diagonal are candidates.
    """
    query_low, query_high = _ranges(query_marks, sizes[0])
    key_low, key_high = _ranges(key_marks, sizes[1])
    pairs = [(q, k) for q in range(query_low.shape[2]) for k in range(key_low.shape[2])]
    if ordered:
        pairs = [(q, k) for q, k in pairs if k * sizes[1] < (q + 1) * sizes[0]]
    q, k = np.array(pairs if outer == "query" else sorted(pairs, key=lambda pair: pair[::-1]), np.int32).T
    mine = q if outer == "query" else k
    q_low, q_high, k_low, k_high = query_low[..., q], query_high[..., q], key_low[..., k], key_high[..., k]
    meet = (k_low[:, 0] <= q_high[:, 0]) & (k_low[:, 1] <= q_high[:, 1]) & (q_low[:, 1] <= k_high[:, 1])
    same_segment = (k_low[:, 1] == k_high[:, 1]) & (q_low[:, 1] == q_high[:, 1]) & (k_low[:, 1] == q_low[:, 1])
    whole = same_segment & (k_high[:, 0] <= q_low[:, 0])

    # The visited steps first, in their order; the last of them again where a row has fewer than others.
    kept = meet | (np.diff(mine, prepend=-1) != 0)
    count = jnp.sum(kept, axis=1, keepdims=True, dtype=jnp.int32)
    step = jnp.arange(len(pairs), dtype=jnp.int32)
    chosen = jnp.take_along_axis(jnp.argsort(~kept, axis=1, stable=True), jnp.minimum(step, count - 1), axis=1)
    of_step = jnp.asarray(mine)[chosen]
    first = jnp.diff(of_step, axis=1, prepend=-1) != 0
    last = (jnp.diff(of_step, axis=1, append=-1) != 0) | (step == count - 1)
    partly = ~jnp.take_along_axis(whole, chosen, axis=1)
    flags = jnp.where(step < count, VISITED + PARTLY * partly + FIRST * first + LAST * last, 0)
    return BlockVisits(jnp.asarray(q)[chosen], jnp.asarray(k)[chosen], flags.astype(jnp.int32), jnp.max(count))


def _ranges(marks, size):
    """Smallest and largest order and segment of each block, [B, 2, blocks]."""
    blocks = marks.reshape(*marks.shape[:2], -1, size)
    return jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)
