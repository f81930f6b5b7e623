"""Parts shared by the forward and backward TPU kernels.

R = 64 rotated size, l queries and s keys of a block.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from kernels_pallas.chips import MIB

LANES = 128
ROPE = LANES // 2
"""Rotated size that the kernels take: two heads fill the lanes."""
HIDDEN = -1e30
"""Score of a key that a query may not see; finite, so that no difference of scores is NaN."""
VMEM_LIMIT = 48 * MIB
"""Bytes that a kernel may use; the chips have 64 MiB and more."""


class CallPlan(NamedTuple):
    """Static arguments of a call."""

    num_heads: int
    scale: float
    ordered: bool
    """Order is the index."""
    forward_block: tuple[int, int]
    backward_block: tuple[int, int]
    longest: tuple[int, int]
    """Queries and keys of one call of the backward kernel, whose needs of VMEM grow with both; longer rows go in
    parts."""
    chunk: int
    """Queries whose scores the forward kernel makes at a time."""
    wide: bool
    """The matrix unit is wider than a head."""
    interpret: object


def forward_memory(block: tuple[int, int], nope: int, width: int, itemsize: int) -> int:
    """Bytes of VMEM that the forward kernel needs for heads of nope + 64 and width columns: windows, sums, scores."""
    queries, keys = block
    windows = 2 * itemsize * ((queries + keys) * (2 * nope + LANES + 2 * width)) + 128 * (queries + keys)
    scratch = itemsize * 2 * (queries * (nope + LANES) + width * keys) + 8 * width * queries + 128 * queries
    return windows + scratch + _temporaries(block, nope, itemsize)


def backward_memory(block: tuple[int, int], longest: tuple[int, int], nope: int, width: int, itemsize: int) -> int:
    """The same of the backward kernel, which keeps the gradients of all its queries and of the shared keys."""
    queries, keys = block
    windows = 2 * itemsize * (queries * (2 * nope + LANES + 2 * width) + keys * (4 * nope + LANES + 4 * width))
    scratch = keys * (2 * (nope + ROPE) * itemsize + 8 * (nope + LANES) + 8 * width) + 128 * (queries + keys)
    grown = longest[0] * (2 * itemsize * (2 * nope + LANES) + 8 * (nope + ROPE)) + longest[1] * 8 * ROPE
    return windows + scratch + grown + _temporaries(block, nope, itemsize)


def _temporaries(block, nope, itemsize):
    queries, keys = block
    return 4 * (4 + itemsize) * queries * keys + 3 * itemsize * (queries + keys) * (nope + LANES)


def both(key_rope):
    """The shared part twice [B, S, 2R], under the rotated parts of both heads of a pair."""
    return jnp.concatenate([key_rope, key_rope], axis=-1)


def of_head(pair, head):
    """One head's half of a pair's rotated parts [·, 2R], zeros in the other: the product then leaves that one out."""
    lane = lax.broadcasted_iota(jnp.int32, pair.shape, 1)
    return jnp.where((lane < ROPE) == (head == 0), pair, jnp.zeros_like(pair))


def dot(lhs, rhs, contract):
    """Product over axis contract[0] of lhs and contract[1] of rhs, in float32."""
    precision = lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(lhs, rhs, dimensions, precision=precision, preferred_element_type=jnp.float32)


def visible_keys(query_marks, key_marks):
    """Return the mask of keys [s, 1] that queries [1, l] see; rows of marks [·, l], [·, s]: order and segment."""
    keys = key_marks.T
    return (keys[:, 0:1] <= query_marks[0:1]) & (keys[:, 1:2] == query_marks[1:2])


def seen_pairs(plan, length, keys):
    """Pairs of query and key that a row's scores have: of a triangle, or of the half of a rectangle."""
    return length * (length + 1) // 2 if plan.ordered else length * keys // 2


def eight(marks):
    """Return marks [B, 2, ·] as the first of 8 rows, the height of a register."""
    return jnp.pad(marks, ((0, 0), (0, 6), (0, 0)))
