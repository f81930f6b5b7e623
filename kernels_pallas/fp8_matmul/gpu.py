"""FP8 products on Hopper, in Mosaic GPU: wgmma on E4M3 operands (QGMMA), promoted to float32 every 128.

A warpgroup owns 64 x 128 outputs. It multiplies 128 of the contraction into fresh accumulators, scales them and adds
them to float32 registers, as DeepSeek-V3 does because Hopper's own sums keep about 14 bits (report, section 3.3.2).
Waiting for each product leaves the tensor cores to the other block of the SM, for which shared memory has room.

8-bit wgmma takes both operands contiguous along the contraction, so operands that are not are turned round as 8-bit
numbers before. Operands come with every group at the beginning of a tile of rows: nothing is masked.

M' rows in tiles of R, C contracted sizes and N' outputs, all multiples of 128, G groups.
"""

import inspect

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.fp8_matmul.quantize import TILE, Tiled

ROWS = TILE
"""R: each group is filled up to a multiple of it."""

OUTPUT_ROWS, OUTPUT_COLUMNS = 64, TILE
STAGES = 3
"""Steps whose operands are on their way or in use. With the output these take 93 KB of shared memory, so that an SM has
room for two blocks."""

# `plgpu.load` takes an index in jax 0.10 and none in 0.12.
_WHOLE = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
_BYTES = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))


def _tile(out, left, right, left_scale, right_scale, left_block, right_block, scale_blocks, steps, store):
    """Accumulate `steps` blocks of 128 of left [·, C] times right [·, C] transposed, and store one tile of outputs.

    Args:
        left_block, right_block: of a step, the places of its blocks of 64 x 128 and 128 x 128.
        scale_blocks: of a step, the places of its 64 and 128 scales in the flat arrays of scales.
        store: takes the tile in shared memory to where it belongs.
    """

    def step(_, left, right, left_scale, right_scale, total):
        def product(sums):
            plgpu.wgmma(sums, left, right.transpose((1, 0)))
            return sums[...]  # waits

        rows = plgpu.load(left_scale, *_WHOLE, layout=plgpu.Layout.WGMMA.reduce(1))
        columns = plgpu.load(right_scale, *_WHOLE, layout=plgpu.Layout.WGMMA.reduce(0))
        part = pl.run_scoped(product, plgpu.ACC((OUTPUT_ROWS, OUTPUT_COLUMNS), jnp.float32))
        part *= lax.broadcast_in_dim(rows, part.shape, [0])
        return total + part * lax.broadcast_in_dim(columns, part.shape, [1])

    zeros = plgpu.layout_cast(jnp.zeros((OUTPUT_ROWS, OUTPUT_COLUMNS), jnp.float32), plgpu.Layout.WGMMA)
    total = plgpu.emit_pipeline(
        step,
        grid=(steps,),
        max_concurrent_steps=STAGES,
        in_specs=[
            plgpu.BlockSpec((OUTPUT_ROWS, TILE), left_block, transforms=_BYTES),
            plgpu.BlockSpec((OUTPUT_COLUMNS, TILE), right_block, transforms=_BYTES),
            plgpu.BlockSpec((OUTPUT_ROWS,), lambda s: (scale_blocks(s)[0],)),
            plgpu.BlockSpec((OUTPUT_COLUMNS,), lambda s: (scale_blocks(s)[1],)),
        ],
        init_carry=zeros,
    )(left, right, left_scale, right_scale)
    out[...] = total.astype(out.dtype)
    plgpu.commit_smem()
    store(out)
    plgpu.wait_smem_to_gmem(0)


def _launch(body, name, out, grid, names, operands, interpret):
    bits = 128 // out.dtype.itemsize
    transforms = plgpu.TilingTransform((8, bits)), plgpu.SwizzleTransform(128)
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=[plgpu.SMEM((OUTPUT_ROWS, OUTPUT_COLUMNS), out.dtype, transforms=transforms)],
        grid=grid,
        grid_names=names,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({"interpret": interpret} if interpret else {}),
    )(*operands)


def rows_product(rows: Tiled, blocks: Tiled, tile_groups, transposed: bool, dtype, interpret=False) -> jax.Array:
    """See `reference.rows_product`."""
    # Outputs come first, also for a product that is not transposed.
    values, scales = (part if transposed else jnp.swapaxes(part, 1, 2) for part in blocks)
    (tokens, inner), (groups, outputs, _) = rows.values.shape, values.shape
    steps, tile_blocks = inner // TILE, tokens // tile_groups.shape[0] // OUTPUT_ROWS
    row_blocks, column_blocks = tokens // OUTPUT_ROWS, outputs // OUTPUT_COLUMNS
    column_scales = jnp.repeat(jnp.swapaxes(scales, 1, 2), TILE, axis=2)  # [G, C/128, N']

    def body(tile_groups, left, right, left_scale, right_scale, out, tile):
        m, n = lax.axis_index("m"), lax.axis_index("n")
        group = tile_groups[m // tile_blocks]

        @pl.when(group < groups)
        def _():
            _tile(
                tile,
                left,
                right,
                left_scale,
                right_scale,
                lambda k: (m, k),
                lambda k: (group * column_blocks + n, k),
                lambda k: (k * row_blocks + m, (group * steps + k) * column_blocks + n),
                steps,
                lambda tile: plgpu.copy_smem_to_gmem(
                    tile, out.at[pl.ds(m * OUTPUT_ROWS, OUTPUT_ROWS), pl.ds(n * OUTPUT_COLUMNS, OUTPUT_COLUMNS)]
                ),
            )

    operands = (
        tile_groups,
        rows.values,
        values.reshape(-1, inner),
        rows.scales.T.reshape(-1),
        column_scales.reshape(-1),
    )
    out = jax.ShapeDtypeStruct((tokens, outputs), dtype)
    grid = row_blocks, column_blocks
    return _launch(body, "fp8_rows_product", out, grid, ("m", "n"), operands, interpret)


def groups_product(x: Tiled, y: Tiled, tile_groups, num_groups: int, dtype, interpret=False) -> jax.Array:
    """See `reference.groups_product`."""
    (tokens, inner), outputs = x.values.shape, y.values.shape[1]
    blocks_of_tile = tokens // tile_groups.shape[0] // TILE
    edges = jnp.searchsorted(tile_groups, jnp.arange(num_groups + 1), side="left").astype(jnp.int32) * blocks_of_tile
    row_blocks, column_blocks = inner // OUTPUT_ROWS, outputs // OUTPUT_COLUMNS

    def body(edges, left, right, left_scale, right_scale, out, tile):
        group, k, n = (lax.axis_index(name) for name in ("g", "k", "n"))
        first, steps = edges[group], edges[group + 1] - edges[group]

        @pl.when(steps > 0)
        def _():
            _tile(
                tile,
                left,
                right,
                left_scale,
                right_scale,
                lambda t: (k, first + t),
                lambda t: (n, first + t),
                lambda t: ((first + t) * row_blocks + k, (first + t) * column_blocks + n),
                steps,
                lambda tile: plgpu.copy_smem_to_gmem(
                    tile,
                    out.at[group, pl.ds(k * OUTPUT_ROWS, OUTPUT_ROWS), pl.ds(n * OUTPUT_COLUMNS, OUTPUT_COLUMNS)],
                ),
            )

    operands = edges, x.values.T, y.values.T, x.scales.reshape(-1), y.scales.reshape(-1)
    out = jax.ShapeDtypeStruct((num_groups, inner, outputs), dtype)
    grid = num_groups, row_blocks, column_blocks
    out = _launch(body, "fp8_groups_product", out, grid, ("g", "k", "n"), operands, interpret)
    # Of a group without rows no tile was written.
    return jnp.where((edges[1:] > edges[:-1])[:, None, None], out, 0)
