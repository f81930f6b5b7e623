"""Wide rows to where experts need them and back: copies of rows, and sums of copies, each the other's derivative.

Gathers both ways, where autodiff would make slow scatters of wide rows: whoever makes an index knows its inverse.

N rows, M copies of them, J copies of a row at most, D width.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.target import platform

NOWHERE = 2**30
"""The row of a copy that isn't there."""

BLOCK = 256
"""Rows that one group of the summing matmul makes."""


class CopySlots(NamedTuple):
    """Row of each copy and slots of each row's copies: for rows with about equally many copies."""

    source: Int[Array, "M"]
    """The row of each copy; any row where there is no copy."""
    places: Int[Array, "J N"]
    """The places of each row's copies, from 0 to M - 1."""
    present: Bool[Array, "J N"] | None = None
    """Mask of the slots that hold a copy of that row; None for all."""


class Segments(NamedTuple):
    """Row of each copy, and the copies sorted by row: for rows with very different numbers of copies."""

    source: Int[Array, "M"]
    """The row of each copy, or NOWHERE."""
    order: Int[Array, "M"]
    """The copies' places in the order of their rows, those of NOWHERE last."""
    sorted_source: Int[Array, "M"]
    """`source[order]`."""


def segments(source: Int[Array, "M"]) -> Segments:
    """The `Segments` of copies of these rows."""
    places = jnp.arange(source.size, dtype=jnp.int32)
    sorted_source, order = lax.sort((source, places), num_keys=1, is_stable=False)
    return Segments(source, order, sorted_source)


def copies(rows: Float[Array, "N *D"], index: CopySlots | Segments) -> Float[Array, "M *D"]:
    """`rows[index.source]`; anything, finite or not, where there is no copy."""
    return _copies(rows.shape[0], rows, index)


def sums(rows: Float[Array, "M *D"], index: CopySlots | Segments, num_rows: int) -> Float[Array, "N *D"]:
    """The sum of each row's copies, in float32, rounded once to their dtype. What isn't a copy counts for nothing.

    Rows by `CopySlots` may have several dimensions of their own, by `Segments` one.
    """
    return _sums(num_rows, rows, index)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _copies(num_rows, rows, index):
    return rows.at[index.source].get(mode="clip")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(num_rows, rows, index):
    if isinstance(index, CopySlots):
        return sum_slots(rows, index)
    return (add_rows if platform() == "cpu" else sum_blocks)(rows, index, num_rows)


_copies.defvjp(
    lambda num_rows, rows, index: (_copies(num_rows, rows, index), index),
    lambda num_rows, index, cotangent: (_sums(num_rows, cotangent, index), None),
)
_sums.defvjp(
    lambda num_rows, rows, index: (_sums(num_rows, rows, index), index),
    lambda num_rows, index, cotangent: (_copies(num_rows, cotangent, index), None),
)


def sum_slots(rows: Float[Array, "M *D"], index: CopySlots) -> Float[Array, "N *D"]:
    """`sums` by gathering all places of each row."""
    gathered = rows.at[index.places].get(mode="clip")
    if index.present is not None:
        gathered = jnp.where(lax.expand_dims(index.present, range(2, gathered.ndim)), gathered, 0)
    # One after another: as a reduction over a leading axis, a CPU takes four times as long.
    return sum(place.astype(jnp.float32) for place in gathered).astype(rows.dtype)


def add_rows(rows: Float[Array, "M D"], index: Segments, num_rows: int) -> Float[Array, "N D"]:
    """`sums` by adding one copy after another."""
    zeros = jnp.zeros((num_rows, rows.shape[1]), jnp.float32)
    return zeros.at[index.source].add(rows.astype(jnp.float32), mode="drop").astype(rows.dtype)


def sum_blocks(rows: Float[Array, "M D"], index: Segments, num_rows: int) -> Float[Array, "N D"]:
    """`sums` by matmul: copies sorted by row are a group for each BLOCK of rows, and the matrix of ones that says
    which copy belongs to which row of the block, transposed, times the copies is the block. That product is the
    weights' gradient of a grouped matmul, which never reads what lies beyond its groups.
    """
    blocks = -(-num_rows // BLOCK)
    group_sizes = jnp.sum(index.sorted_source[None] // BLOCK == jnp.arange(blocks)[:, None], axis=1, dtype=jnp.int32)
    ones = (index.sorted_source[:, None] % BLOCK == jnp.arange(BLOCK)).astype(rows.dtype)
    unread = lax.empty((blocks, BLOCK, rows.shape[1]), rows.dtype)
    _, weights_gradient = jax.vjp(lambda weights: grouped_matmul(ones, weights, group_sizes), unread)
    (summed,) = weights_gradient(rows.at[index.order].get(mode="clip"))
    return summed.reshape(-1, rows.shape[1])[:num_rows]
