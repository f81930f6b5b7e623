"""The products of FP8 operands in float32, for machines without FP8 units: for CPUs, and to study the numerics.

E4M3 numbers have 4 significant bits, so their products are exact in float32. Here values are multiplied by their
scales first and added up by one float32 product, where `reference` adds up each 128 before it applies the scales: the
two are the same sum, rounded to float32 in another order.

M' rows in tiles of R with one group each, K', N' sizes filled up to multiples of 128, G groups.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.fp8_matmul.quantize import Tiled


def dequantized(x: Tiled) -> jax.Array:
    """Values times scales, in float32; tiles are recognized by the two shapes."""
    scales = x.scales
    for axis, (size, tiles) in enumerate(zip(x.values.shape, x.scales.shape, strict=True)):
        if size != tiles:
            scales = jnp.repeat(scales, size // tiles, axis)
    return x.values.astype(jnp.float32) * scales


def rows_product(rows: Tiled, blocks: Tiled, tile_groups, transposed: bool, dtype) -> jax.Array:
    """See `reference.rows_product`."""
    x, w = dequantized(rows), dequantized(blocks)
    if w.shape[0] == 1:
        out = jnp.matmul(x, w[0].T if transposed else w[0], precision="highest")
        return out.astype(dtype)
    tiles = x.reshape(tile_groups.shape[0], -1, x.shape[1])
    each = jnp.take(w, tile_groups, axis=0, mode="fill", fill_value=0)
    out = jnp.einsum("trn,tkn->trk" if transposed else "trk,tkn->trn", tiles, each, precision="highest")
    return out.reshape(x.shape[0], -1).astype(dtype)


def groups_product(x: Tiled, y: Tiled, tile_groups, num_groups: int, dtype) -> jax.Array:
    """See `reference.groups_product`."""
    x, y = dequantized(x), dequantized(y)
    if num_groups == 1:
        return jnp.matmul(x.T, y, precision="highest").astype(dtype)[None]
    x, y = (z.reshape(tile_groups.shape[0], -1, z.shape[1]) for z in (x, y))
    each = jnp.einsum("trk,trn->tkn", x, y, precision="highest")
    return jax.ops.segment_sum(each, tile_groups, num_groups, indices_are_sorted=True).astype(dtype)
