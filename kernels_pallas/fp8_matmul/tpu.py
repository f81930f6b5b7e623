"""FP8 products on TPUs whose matrix units take E4M3 (v7x), in Mosaic.

Both kernels multiply 128 of the contraction at a time and add the scaled product to a float32 sum in VMEM, so a result
is what `reference` gives up to the order of 128 float32 additions. Operands come with every group at the beginning of
a tile of rows: a tile has one group, nothing is masked, and tiles without a group are passed over.

M' rows in tiles of R, C contracted sizes and N' outputs, all multiples of 128, U blocks of 128 that are unrolled.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.chips import MIB
from kernels_pallas.fitting import ON_TPU, fit
from kernels_pallas.fp8_matmul.quantize import TILE, Tiled
from kernels_pallas.target import on_chip

ROWS = 256
"""R: as many rows as a matrix unit of v7x has, and more than groups should be filled up by."""


def _divisor(size, most):
    """The largest divisor of `size` that is at most `most`."""
    return max(n for n in range(1, min(size, most) + 1) if size % n == 0)


def _rows_kernel(tile_groups, x, x_scale, w, w_scale, out, total, *, unrolled, groups):
    """A tile of rows by a tile of outputs: x [R, C], x_scale [C/128/U, R, U], w [1, C, N], w_scale [1, C/128, N]."""

    @pl.when(tile_groups[pl.program_id(1)] < groups)
    def _():
        total[...] = jnp.zeros_like(total)

        def chunk(c, _):
            for u in range(unrolled):
                k = c * unrolled + u
                part = pl.ds(pl.multiple_of(k * TILE, TILE), TILE)
                product = jnp.dot(x[:, part], w[0, part, :], preferred_element_type=jnp.float32)
                total[...] += product * x_scale[c][:, u : u + 1] * w_scale[0, pl.ds(k, 1), :]

        jax.lax.fori_loop(0, x.shape[1] // TILE // unrolled, chunk, None)
        out[...] = total[...].astype(out.dtype)


def check(inner: int, outputs: int) -> None:
    """Raise NotImplementedError for a matrix of these sizes that the products, forwards and backwards, can't take."""
    for contracted, width in ((inner, outputs), (outputs, inner)):
        _columns(*(-(-size // TILE) * TILE for size in (contracted, width)))


def _columns(inner, outputs):
    """Columns of a tile of outputs, and the bytes of vector memory that the kernel then needs."""
    scales = 2 * 4 * ROWS * TILE * (inner // TILE // _divisor(inner // TILE, 16))  # lanes come in 128s

    def needed(tile):
        return 2 * inner * (ROWS + tile) + max(scales + 12 * MIB, 24 * MIB)

    tiles = sorted({TILE * _divisor(outputs // TILE, most) for most in (4, 3, 2, 1)}, reverse=True)
    tile = fit("fp8_matmul", tiles, needed, on_chip("tpu").memory - MIB, "vector memory")
    return tile, needed(tile)


def _written(dtype) -> jnp.dtype:
    """Return the dtype that a kernel writes for results of `dtype`: Mosaic has no float16."""
    return jnp.dtype(dtype if jnp.dtype(dtype).name in ON_TPU else "float32")


def rows_product(rows: Tiled, blocks: Tiled, tile_groups, transposed: bool, dtype, interpret=False) -> jax.Array:
    """See `reference.rows_product`."""
    # The contraction comes first, also for a transposed product: turned as 8-bit numbers, before the kernel.
    values, scales = (jnp.swapaxes(part, 1, 2) if transposed else part for part in blocks)
    (tokens, inner), (groups, _, outputs) = rows.values.shape, values.shape
    scales = jnp.repeat(scales, TILE, axis=2)
    (tile, memory), unrolled = _columns(inner, outputs), _divisor(inner // TILE, 16)
    row_scales = jnp.moveaxis(rows.scales.reshape(tokens, -1, unrolled), 1, 0)
    size = tokens // tile_groups.shape[0]

    def group(m, tile_groups):
        return jnp.minimum(tile_groups[m], groups - 1)

    return pl.pallas_call(
        functools.partial(_rows_kernel, unrolled=unrolled, groups=groups),
        name="fp8_rows_product",
        out_shape=jax.ShapeDtypeStruct((tokens, outputs), _written(dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(outputs // tile, tile_groups.shape[0]),
            in_specs=[
                pl.BlockSpec((size, inner), lambda n, m, groups: (m, 0)),
                pl.BlockSpec((row_scales.shape[0], size, unrolled), lambda n, m, groups: (0, m, 0)),
                pl.BlockSpec((1, inner, tile), lambda n, m, groups: (group(m, groups), 0, n)),
                pl.BlockSpec((1, inner // TILE, tile), lambda n, m, groups: (group(m, groups), 0, n)),
            ],
            out_specs=pl.BlockSpec((size, tile), lambda n, m, groups: (m, n)),
            scratch_shapes=[pltpu.VMEM((size, tile), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=memory),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * inner * outputs,
            bytes_accessed=rows.values.size * (outputs // tile) + values.size + tokens * outputs * dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
    )(tile_groups, rows.values, row_scales, values, scales).astype(dtype)


def _groups_kernel(tile_groups, x, x_scale, y, y_scale, out, total, *, groups):
    """Add a tile of rows to its group's product: x [K, R], x_scale [1, K, R/128], y [R, N], y_scale [1, R/128, N]."""
    tile, last = pl.program_id(2), pl.num_programs(2) - 1
    group = tile_groups[tile]

    @pl.when((tile == 0) | (tile_groups[jnp.maximum(tile - 1, 0)] != group))
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(group < groups)
    def _():
        for u in range(y_scale.shape[1]):
            part = pl.ds(u * TILE, TILE)
            product = jnp.dot(x[:, part], y[part, :], preferred_element_type=jnp.float32)
            total[...] += product * x_scale[0][:, u : u + 1] * y_scale[0, pl.ds(u, 1), :]

    @pl.when((group < groups) & ((tile == last) | (tile_groups[jnp.minimum(tile + 1, last)] != group)))
    def _():
        out[0] = total[...].astype(out.dtype)


def groups_product(x: Tiled, y: Tiled, tile_groups, num_groups: int, dtype, interpret=False) -> jax.Array:
    """See `reference.groups_product`."""
    (tokens, inner), outputs = x.values.shape, y.values.shape[1]
    tiles = tile_groups.shape[0]
    size, parts = tokens // tiles, tokens // tiles // TILE
    rows, columns = (TILE * _divisor(n // TILE, 8) for n in (inner, outputs))
    x_scales = jnp.swapaxes(x.scales.reshape(tiles, parts, inner), 1, 2)
    y_scales = y.scales.reshape(tiles, parts, outputs)
    out = pl.pallas_call(
        functools.partial(_groups_kernel, groups=num_groups),
        name="fp8_groups_product",
        out_shape=jax.ShapeDtypeStruct((num_groups, inner, outputs), _written(dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(inner // rows, outputs // columns, tiles),
            in_specs=[
                pl.BlockSpec((rows, size), lambda k, n, m, groups: (k, m)),
                pl.BlockSpec((1, rows, parts), lambda k, n, m, groups: (m, k, 0)),
                pl.BlockSpec((size, columns), lambda k, n, m, groups: (m, n)),
                pl.BlockSpec((1, parts, columns), lambda k, n, m, groups: (m, 0, n)),
            ],
            out_specs=pl.BlockSpec(
                (1, rows, columns), lambda k, n, m, groups: (jnp.minimum(groups[m], num_groups - 1), k, n)
            ),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=40 << 20
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * inner * outputs,
            bytes_accessed=x.values.size * (outputs // columns)
            + y.values.size * (inner // rows)
            + num_groups * inner * outputs * dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
    )(tile_groups, x.values.T, x_scales, y.values, y_scales)
    # Of a group without rows no tile was written.
    present = jnp.any(tile_groups[:, None] == jnp.arange(num_groups), axis=0)
    return jnp.where(present[:, None, None], out, 0).astype(dtype)
