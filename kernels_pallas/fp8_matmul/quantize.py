"""Numbers of 8 bits with float32 scales: E4M3 in tiles of 1x128, 128x1 and 128x128 (DeepSeek-V3 report, section 3.3).

A tile's scale is its largest magnitude times float32(1/448), 448 being E4M3's largest number, and 1 where the tile is
zero; its values are divided by the scale and rounded to the nearest E4M3 number, ties to even. Axes that 128 does not
divide are filled up with zeros, which change no tile's largest magnitude and so no scale.

M rows, K columns, G groups, N output size; K' is K filled up to a multiple of 128.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

TILE = 128
"""Values along one axis that share a scale, and products that are added before they are promoted to float32."""

LARGEST = 448.0
"""The largest finite E4M3 number."""

E4M3 = jnp.float8_e4m3fn


class Tiled(NamedTuple):
    """E4M3 numbers and the float32 scales that their tiles are to be multiplied by."""

    values: jax.Array
    """Values of the carrier's type: float8_e4m3fn, or a wider type that holds the same numbers."""
    scales: jax.Array


def quantize_rows(x: Float[Array, "M K"], carrier=E4M3) -> Tiled:
    """Tiles of 1x128 along each row: values [M, K'], scales [M, K'/128]."""
    x = fill(x, 1)
    scales = _scales(jnp.max(jnp.abs(x).reshape(x.shape[0], -1, TILE), axis=2))
    return Tiled(_round(x.astype(jnp.float32) / jnp.repeat(scales, TILE, axis=1), carrier), scales)


def quantize_columns(x: Float[Array, "M K"], carrier=E4M3) -> Tiled:
    """Tiles of 128x1 down each column, for products that contract over rows: values [M', K], scales [M'/128, K]."""
    x = fill(x, 0)
    tiles = x.reshape(-1, TILE, x.shape[1]).astype(jnp.float32)
    scales = _scales(jnp.max(jnp.abs(tiles), axis=1))
    return Tiled(_round(tiles / scales[:, None], carrier).reshape(x.shape), scales)


def quantize_blocks(w: Float[Array, "G K N"], carrier=E4M3) -> Tiled:
    """Blocks of 128x128 of each matrix: values [G, K', N'], scales [G, K'/128, N'/128]."""
    w = fill(fill(w, 1), 2)
    tiles = w.reshape(w.shape[0], w.shape[1] // TILE, TILE, -1, TILE).astype(jnp.float32)
    scales = _scales(jnp.max(jnp.abs(tiles), axis=(2, 4)))
    return Tiled(_round(tiles / scales[:, :, None, :, None], carrier).reshape(w.shape), scales)


def fill(x: Array, axis: int, multiple: int = TILE) -> Array:
    """x with zeros at the end of an axis, up to a multiple."""
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def _scales(largest):
    # A product, because compilers turn the division into it, or not.
    scales = largest.astype(jnp.float32) * jnp.float32(1 / LARGEST)
    # What is too small for a scale of normal float32 counts as zero. A NaN is kept.
    return jnp.where(scales < jnp.finfo(jnp.float32).tiny, 1.0, scales)


def _round(x, carrier):
    if carrier == E4M3:
        return x.astype(E4M3)
    return round_to_e4m3(x).astype(carrier)


def round_to_e4m3(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """float32 numbers of at most 448 rounded as a conversion to float8_e4m3fn does; on CPUs several times faster."""
    exponent = lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000
    # 3 bits after the leading one; below 2^-6 the numbers are subnormal and 2^-9 apart.
    step = jnp.maximum(lax.bitcast_convert_type(exponent, jnp.float32), 2.0**-6) * 2.0**-3
    return jnp.round(x / step) * step
