"""Reference of products of FP8 operands: 128 products at a time, then scales, then float32 sums.

M' rows in tiles of R with one group each, K', N' sizes filled up to multiples of 128, G groups.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.fp8_matmul.quantize import TILE, Tiled


def rows_product(rows: Tiled, blocks: Tiled, tile_groups, transposed: bool, dtype) -> jax.Array:
    """Each row times its group's matrix.

    Args:
        rows: values [M', K'] in 1x128 tiles.
        blocks: values [G, K', N'], or [G, N', K'] if `transposed`, in 128x128 blocks.
        tile_groups: int32 [M'/R], the group of each tile of rows; G for tiles that have none.
        dtype: the result's.
    Returns:
        [M', N']; of tiles without a group, anything.
    """
    values, scales = (jnp.swapaxes(part, 1, 2) if transposed else part for part in blocks)
    group = jnp.repeat(jnp.minimum(tile_groups, values.shape[0] - 1), rows.values.shape[0] // tile_groups.shape[0])
    total = jnp.zeros((rows.values.shape[0], values.shape[2]), jnp.float32)
    for k in range(rows.scales.shape[1]):
        part = slice(k * TILE, (k + 1) * TILE)
        x, w = rows.values[:, part].astype(jnp.float32), values[:, part].astype(jnp.float32)
        product = jnp.einsum("gm,mk,gkn->mn", group == jnp.arange(values.shape[0])[:, None], x, w, precision="highest")
        total += product * rows.scales[:, k, None] * jnp.repeat(scales[group, k], TILE, axis=1)
    return total.astype(dtype)


def groups_product(x: Tiled, y: Tiled, tile_groups, num_groups: int, dtype) -> jax.Array:
    """The sum over each group's rows of the outer products of x and y.

    Args:
        x: values [M', K'] in 128x1 tiles.
        y: values [M', N'] in 128x1 tiles.
        tile_groups: int32 [M'/R], the group of each tile of rows; G for tiles that have none.
        dtype: the result's.
    Returns:
        [G, K', N'], zeros for groups without rows.
    """
    per_tile = x.values.shape[0] // TILE // tile_groups.shape[0]
    group = jnp.repeat(tile_groups, per_tile)
    total = jnp.zeros((num_groups, x.values.shape[1], y.values.shape[1]), jnp.float32)
    for t in range(x.scales.shape[0]):
        part = slice(t * TILE, (t + 1) * TILE)
        a, b = x.values[part].astype(jnp.float32), y.values[part].astype(jnp.float32)
        product = jnp.einsum("mk,mn->kn", a, b, precision="highest")
        total = total.at[group[t]].add(product * x.scales[t, :, None] * y.scales[t], mode="drop")
    return total.astype(dtype)
