"""Schedule of the (tile of rows, group) pairs that a kernel visits: computed before it starts, read by it as scalars.

M rows in tiles of T, G groups, V visits at most.

A tile that lies in two groups is visited once for each, one after the other, so that what is written stays in place.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


class TileVisits(NamedTuple):
    """One entry a visit: group, tile; one entry a group: the rest. All int32. See `rows_visits`, `groups_visits`."""

    group: Int[Array, "V"]
    """Group of a visit; G: no group, the tile holds only rows beyond all groups."""
    tile: Int[Array, "V"]
    """Tile of rows of a visit."""
    begin: Int[Array, "G+1"]
    """First row of a group; 0 for G."""
    end: Int[Array, "G+1"]
    """One beyond a group's last row; 0 for G."""
    turn: Int[Array, "G+1"]
    """Number of nonempty groups before this one."""
    following: Int[Array, "G+1"]
    """The next group that has rows; G if there is none."""


def rows_visits(group_sizes: Int[Array, "G"], num_rows: int, tile: int) -> tuple[TileVisits, Int[Array, ""]]:
    """Visits for a result of rows: each group with rows, then every tile that holds none. Also how many there are."""
    groups = group_sizes.shape[0]
    begin, end = _bounds(group_sizes, num_rows)
    tiles = -(-num_rows // tile)
    used = -(-end[-1] // tile)
    count = jnp.append(jnp.where(end > begin, -(-end // tile) - begin // tile, 0), tiles - used)
    first = jnp.append(begin // tile, used)
    return _visits(count, first, begin, end, tiles + groups)


def groups_visits(group_sizes: Int[Array, "G"], num_rows: int, tile: int) -> tuple[TileVisits, Int[Array, ""]]:
    """Visits for a result of groups: each group at least once, also an empty one. Also how many there are."""
    groups = group_sizes.shape[0]
    begin, end = _bounds(group_sizes, num_rows)
    tiles = -(-num_rows // tile)
    count = jnp.append(jnp.where(end > begin, -(-end // tile) - begin // tile, 1), 0)
    first = jnp.append(jnp.minimum(begin // tile, tiles - 1), 0)
    return _visits(count, first, begin, end, tiles + 2 * groups)


def _bounds(group_sizes, num_rows):
    """First and one-beyond-last row of each group; groups beyond the rows that there are count as empty."""
    end = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), num_rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), end[:-1]]), end


def _visits(count, first, begin, end, most):
    """Visits of groups (and what is no group) that each visit `count` tiles from `first` on, at most `most` in all."""
    until = jnp.cumsum(count)
    visit = jnp.arange(most, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(visit[:, None] >= until, axis=1, dtype=jnp.int32), count.shape[0] - 1)
    tile = first[group] + visit - (until - count)[group]
    groups = begin.shape[0]
    present = end > begin
    index = jnp.where(present, jnp.arange(groups, dtype=jnp.int32), groups)
    following = jnp.append(lax.cummin(index, reverse=True)[1:], jnp.full(2, groups, jnp.int32))
    turn = jnp.cumsum(present, dtype=jnp.int32) - present
    zero = jnp.zeros(1, jnp.int32)
    begin, end, turn = (jnp.concatenate([column.astype(jnp.int32), zero]) for column in (begin, end, turn))
    tile = jnp.where(visit < until[-1], tile, 0).astype(jnp.int32)
    return TileVisits(group, tile, begin, end, turn, following), until[-1].astype(jnp.int32)
