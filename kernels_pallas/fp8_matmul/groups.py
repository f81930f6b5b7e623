"""Rows of groups moved so that every group begins at a multiple of a tile of rows; then each tile has one group.

M rows, G groups, R rows of a tile, M' = R x tiles.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Alignment(NamedTuple):
    """Positions of each group's rows after alignment."""

    sources: Int[Array, "M'"]
    """The row that each aligned row comes from; M where there is none."""
    places: Int[Array, "M"]
    """The aligned row of each row; M' for rows beyond the groups."""
    tile_groups: Int[Array, "tiles"]
    """The group of each tile, ascending; G for tiles behind the last group."""


def align(group_sizes: Int[Array, "G"], rows: int, tile: int) -> Alignment:
    """The alignment of `rows` rows sorted by group; it has room for any group sizes."""
    groups = group_sizes.shape[0]
    tiles = (rows + groups * (tile - 1)) // tile
    ends = jnp.cumsum(group_sizes)
    tiles_of = (group_sizes + tile - 1) // tile
    tile_ends = jnp.cumsum(tiles_of)
    tile_groups = jnp.searchsorted(tile_ends, jnp.arange(tiles), side="right").astype(jnp.int32)
    # What a group's rows move by; nothing belongs to the group G.
    shifts = jnp.append((tile_ends - tiles_of) * tile - (ends - group_sizes), 0)

    aligned = jnp.arange(tiles * tile)
    group = jnp.repeat(tile_groups, tile)
    sources = aligned - shifts[group]
    sources = jnp.where((group < groups) & (sources < jnp.append(ends, 0)[group]), sources, rows)

    row = jnp.arange(rows)
    places = row + shifts[jnp.searchsorted(ends, row, side="right")]
    return Alignment(sources, jnp.where(row < ends[-1], places, tiles * tile), tile_groups)


def dense(rows: int, tile: int) -> Alignment:
    """The alignment of rows that all belong to one group: nothing moves."""
    tiles = -(-rows // tile)
    aligned = jnp.arange(tiles * tile)
    return Alignment(jnp.minimum(aligned, rows), jnp.arange(rows), jnp.zeros((tiles,), jnp.int32))


def take(x: Float[Array, "... K"], indices: Int[Array, "rows"]) -> Float[Array, "rows K"]:
    """Rows of x; zeros for indices beyond its last."""
    return jnp.take(x, indices, axis=0, mode="fill", fill_value=0)
