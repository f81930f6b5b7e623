"""Grouped matmul for GPUs, in Pallas Triton.

A Triton kernel has a fixed grid and no scalars before its loads, so a small table says which rows each tile has: every
group is cut into tiles of its own, none straddles two groups, and the rows beyond the groups get tiles that only write
zeros. There are at most ceil(M / block) + G tiles; programs beyond those that are needed end at once, so that the work
follows the real rows.

M rows, G groups, K inner size, N output size; T row tiles; m, k, n sizes of blocks.
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas.chips import OnChip
from kernels_pallas.fitting import EXCHANGED, ON_GPU, check_dtypes, copies, fit
from kernels_pallas.target import on_chip


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    expected_rows: int | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """See `api.grouped_matmul`. Products are summed in float32.

    Raises:
        NotImplementedError: for operands that are not bfloat16, float16 or float32, or not of one dtype.
    """
    check_dtypes("grouped_matmul", ON_GPU, lhs, rhs)
    return _grouped_matmul(_GPUCall(expected_rows or lhs.shape[0], interpret), lhs, rhs, group_sizes)


def grouped_swiglu(
    lhs: Float[Array, "M K"],
    gate: Float[Array, "G K N"],
    up: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    row_weights: Float[Array, "M"] | None = None,
    expected_rows: int | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """See `api.grouped_swiglu`: both products in one kernel, which reads the rows once.

    Raises:
        NotImplementedError: for operands that are not bfloat16, float16 or float32, or not of one dtype.
    """
    check_dtypes("grouped_matmul", ON_GPU, lhs, gate, up)
    weights = jnp.ones(lhs.shape[0], jnp.float32) if row_weights is None else row_weights
    return _grouped_swiglu(_GPUCall(expected_rows or lhs.shape[0], interpret), lhs, gate, up, group_sizes, weights)


class _GPUCall(NamedTuple):
    """Static arguments of a call."""

    expected_rows: int
    interpret: bool


# ------------------------------------------------------------------------------------------------------ derivatives
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(static, lhs, rhs, group_sizes):
    return _rows_by_groups(lhs, rhs, group_sizes, static)


def _matmul_forward(static, lhs, rhs, group_sizes):
    return _rows_by_groups(lhs, rhs, group_sizes, static), (lhs, rhs, group_sizes)


def _matmul_backward(static, saved, d_out):
    lhs, rhs, group_sizes = saved
    d_lhs = _rows_by_transposed_groups([(d_out, rhs)], group_sizes, static)
    return d_lhs, _groups_from_rows(lhs, d_out, group_sizes, rhs.dtype, static), None


_grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_swiglu(static, lhs, gate, up, group_sizes, row_weights):
    return _swiglu(lhs, gate, up, group_sizes, row_weights, static, residuals=False)[0]


def _swiglu_forward(static, lhs, gate, up, group_sizes, row_weights):
    out, gated, upped = _swiglu(lhs, gate, up, group_sizes, row_weights, static, residuals=True)
    gated, upped = checkpoint_name(gated, "expert_gate"), checkpoint_name(upped, "expert_up")
    return out, (lhs, gate, up, group_sizes, row_weights, gated, upped)


def _swiglu_backward(static, saved, d_out):
    lhs, gate, up, group_sizes, row_weights, gated, upped = saved
    d_gated, d_upped, d_weights = _swiglu_gradients(d_out, gated, upped, row_weights)
    # The products ignore what lies beyond the groups; this one must be told.
    d_weights = jnp.where(jnp.arange(lhs.shape[0]) < jnp.sum(group_sizes), d_weights, 0).astype(row_weights.dtype)
    d_lhs = _rows_by_transposed_groups([(d_gated, gate), (d_upped, up)], group_sizes, static)
    d_gate = _groups_from_rows(lhs, d_gated, group_sizes, gate.dtype, static)
    d_up = _groups_from_rows(lhs, d_upped, group_sizes, up.dtype, static)
    return d_lhs, d_gate, d_up, None, d_weights


_grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _swiglu_gradients(d_out, gated, upped, row_weights):
    """Return the gradients of gate's and up's outputs, in their dtype, and the rows' weights, in float32."""
    dtype, weights = gated.dtype, row_weights.astype(jnp.float32)[:, None]
    d_out, gated, upped = (x.astype(jnp.float32) for x in (d_out, gated, upped))
    sigmoid = jax.nn.sigmoid(gated)
    silu = gated * sigmoid
    slope = sigmoid + silu * (1 - sigmoid)
    d_gated, d_upped = d_out * weights * upped * slope, d_out * weights * silu
    return d_gated.astype(dtype), d_upped.astype(dtype), jnp.sum(d_out * silu * upped, axis=1)


# ------------------------------------------------------------------------------------------------------ blocks
class MatmulBlocks(NamedTuple):
    """Sizes of a block of the result and of the contraction, and the stages of the pipeline over the latter."""

    rows: int
    columns: int
    inner: int
    stages: int = 4

    @property
    def warps(self) -> int:
        """Two warpgroups for 128 rows of an accumulator, of 64 each; one for fewer."""
        return 8 if self.rows >= 128 else 4


LARGEST = {2: MatmulBlocks(128, 256, 64), 4: MatmulBlocks(64, 128, 32)}
"""Largest blocks by the operands' bytes. 16 bits: the most accumulators that two warpgroups hold. float32 has no tensor
cores: its products are unrolled, and larger blocks are no faster, only longer to compile."""


def blocks_for(rows: int, columns: int, inner: int, matrices: int, itemsize: int, chip: OnChip) -> MatmulBlocks:
    """Blocks for a result of rows x columns and a contraction of `inner`.

    Args:
        matrices: right sides that are multiplied at once; they share the columns' accumulators.
    """
    most = LARGEST[itemsize]
    rows, inner = _block(rows, most.rows), _block(inner, most.inner)
    columns = _block(columns, most.columns // matrices)

    def smaller():
        block = MatmulBlocks(rows, columns, inner, most.stages)
        while True:
            yield block
            if block.stages > 2:
                block = block._replace(stages=block.stages - 1)
            elif max(block.rows, block.columns) > 16:
                side = "rows" if block.rows > block.columns else "columns"
                block = block._replace(**{side: getattr(block, side) // 2})
            else:
                return

    return fit("grouped_matmul", smaller(), partial(shared_memory, matrices, itemsize, chip), chip.memory)


def shared_memory(matrices: int, itemsize: int, chip: OnChip, blocks: MatmulBlocks) -> int:
    """Bytes that the compiler asks for at most."""
    step = itemsize * blocks.inner * (blocks.rows + matrices * blocks.columns)
    result = 4 * blocks.rows * blocks.columns  # on its way to memory, when the operands are done with
    return max(copies(chip, itemsize, blocks.stages) * step, result) + EXCHANGED


def _block(size, largest):
    return min(largest, max(16, pl.next_power_of_2(size)))


def _blocks(rows, columns, inner, dtype, matrices=1):
    return blocks_for(rows, columns, inner, matrices, dtype.itemsize, on_chip("gpu"))


def _row_tiles(group_sizes, num_rows, block):
    """Each tile's group, first row and its group's end, int32 [T]: group G is rows beyond, a spare tile is empty."""
    num_tiles = pl.cdiv(num_rows, block) + group_sizes.shape[0]
    sizes = jnp.append(group_sizes, num_rows - jnp.sum(group_sizes)).astype(jnp.int32)
    tiles, ends = pl.cdiv(sizes, block), jnp.cumsum(sizes)
    tile_ends = jnp.cumsum(tiles)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(tile[:, None] >= tile_ends, axis=1, dtype=jnp.int32), group_sizes.shape[0])
    start = (ends - sizes)[group] + (tile - (tile_ends - tiles)[group]) * block
    return group, jnp.minimum(start, num_rows), ends[group]


def _load(matrix, first_row, rows, row_end, first_column, columns):
    """A block of a matrix (a 2D reference), zeros from `row_end` and beyond the matrix's own columns."""
    mask = (first_row + jnp.arange(rows) < row_end)[:, None]
    if matrix.shape[1] % columns:
        mask &= (first_column + jnp.arange(columns) < matrix.shape[1])[None, :]
    mask = jnp.broadcast_to(mask, (rows, columns))
    return plgpu.load(matrix.at[pl.ds(first_row, rows), pl.ds(first_column, columns)], mask=mask, other=0)


def _load_weights(matrices, group, first_row, rows, first_column, columns):
    """A block of one group's matrix; zeros beyond its end, where blocks do not divide it."""
    _, size, width = matrices.shape
    at = matrices.at[group, pl.ds(first_row, rows), pl.ds(first_column, columns)]
    if size % rows == 0 and width % columns == 0:
        return plgpu.load(at)
    mask = (first_row + jnp.arange(rows) < size)[:, None] & (first_column + jnp.arange(columns) < width)[None, :]
    return plgpu.load(at, mask=mask, other=0)


def _store(out, group, first_row, row_end, first_column, values):
    """Write a block into a matrix, of one group where `group` is (g,), up to `row_end` and its last column."""
    rows, columns = values.shape
    mask = (first_row + jnp.arange(rows) < row_end)[:, None] & (first_column + jnp.arange(columns) < out.shape[-1])
    at = out.at[(*group, pl.ds(first_row, rows), pl.ds(first_column, columns))]
    plgpu.store(at, values.astype(out.dtype), mask=mask)


def _dot(a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _call(kernel, name, grid, flops, outs, blocks, static, operands):
    """Run a kernel over a grid; `flops` a row."""
    kernel.__name__ = name  # the lowering puts the function's name into the program, not `name`
    arrays = jax.tree.leaves((operands, outs))
    cost = pl.CostEstimate(
        flops=flops * static.expected_rows,
        transcendentals=0,
        bytes_accessed=sum(math.prod(each.shape) * each.dtype.itemsize for each in arrays),
    )
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=outs,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=cost,
        # The Triton lowering drops the estimate; this it writes into the program, as `serialized_metadata`.
        metadata={key: str(value) for key, value in dataclasses.asdict(cost).items() if value},
        interpret=static.interpret,
        name=name,
    )(*operands)


# ------------------------------------------------------------------------------------------------------ kernels
def _rows_by_groups(lhs, rhs, group_sizes, static):
    """Each row of lhs [M, K] times its group's rhs [G, K, N]: [M, N]."""
    (num_rows, inner), (num_groups, _, width) = lhs.shape, rhs.shape
    blocks = _blocks(pl.cdiv(num_rows, num_groups), width, inner, lhs.dtype)
    m, n, k, _ = blocks
    tiles = _row_tiles(group_sizes, num_rows, m)

    def kernel(groups, starts, ends, lhs, rhs, out):
        group, start, end = (table[pl.program_id(1)] for table in (groups, starts, ends))
        column = pl.program_id(0) * n

        def step(i, total):
            rows = _load(lhs, start, m, end, i * k, k)
            return total + _dot(rows, _load_weights(rhs, group, i * k, k, column, n))

        steps = jnp.where((group < num_groups) & (start < end), jnp.int32(pl.cdiv(inner, k)), 0)
        _store(out, (), start, end, column, lax.fori_loop(0, steps, step, jnp.zeros((m, n), jnp.float32)))

    grid, out = (pl.cdiv(width, n), tiles[0].shape[0]), jax.ShapeDtypeStruct((num_rows, width), lhs.dtype)
    return _call(kernel, "grouped_matmul", grid, 2 * inner * width, out, blocks, static, (*tiles, lhs, rhs))


def _rows_by_transposed_groups(pairs, group_sizes, static):
    """The sum over pairs of rows [M, N] times their group's matrix [G, K, N] transposed: [M, K]."""
    (num_rows, inner), (num_groups, width, _) = pairs[0][0].shape, pairs[0][1].shape
    blocks = _blocks(pl.cdiv(num_rows, num_groups), width, inner, pairs[0][0].dtype)
    m, n, k, _ = blocks
    tiles = _row_tiles(group_sizes, num_rows, m)

    def kernel(groups, starts, ends, *operands_and_out):
        *operands, out = operands_and_out
        group, start, end = (table[pl.program_id(1)] for table in (groups, starts, ends))
        column = pl.program_id(0) * n
        steps = jnp.where((group < num_groups) & (start < end), jnp.int32(pl.cdiv(inner, k)), 0)
        total = jnp.zeros((m, n), jnp.float32)
        for lhs, rhs in zip(operands[::2], operands[1::2], strict=True):

            def step(i, total, lhs=lhs, rhs=rhs):
                rows = _load(lhs, start, m, end, i * k, k)
                return total + _dot(rows, _load_weights(rhs, group, column, n, i * k, k).T)

            total = lax.fori_loop(0, steps, step, total)
        _store(out, (), start, end, column, total)

    grid, out = (pl.cdiv(width, n), tiles[0].shape[0]), jax.ShapeDtypeStruct((num_rows, width), pairs[0][0].dtype)
    operands = (*tiles, *(operand for pair in pairs for operand in pair))
    return _call(kernel, "grouped_matmul_d_lhs", grid, 2 * len(pairs) * inner * width, out, blocks, static, operands)


def _groups_from_rows(lhs, rhs, group_sizes, dtype, static):
    """The sum over each group's rows of the outer products of lhs [M, K] and rhs [M, N]: [G, K, N]."""
    (num_rows, inner), width, num_groups = lhs.shape, rhs.shape[1], group_sizes.shape[0]
    blocks = _blocks(inner, width, num_rows, lhs.dtype)
    k, n, m, _ = blocks
    ends = jnp.cumsum(group_sizes).astype(jnp.int32)

    def kernel(starts, ends, lhs, rhs, out):
        group, first, column = pl.program_id(2), pl.program_id(1) * k, pl.program_id(0) * n
        start, end = starts[group], ends[group]

        def step(i, total):
            row = start + i * m
            return total + _dot(_load(lhs, row, m, end, first, k).T, _load(rhs, row, m, end, column, n))

        total = lax.fori_loop(0, pl.cdiv(end - start, m), step, jnp.zeros((k, n), jnp.float32))
        _store(out, (group,), first, inner, column, total)

    grid = pl.cdiv(width, n), pl.cdiv(inner, k), num_groups
    out = jax.ShapeDtypeStruct((num_groups, inner, width), dtype)
    operands = ends - group_sizes.astype(jnp.int32), ends, lhs, rhs
    return _call(kernel, "grouped_matmul_d_rhs", grid, 2 * inner * width, out, blocks, static, operands)


def _swiglu(lhs, gate, up, group_sizes, row_weights, static, residuals):
    """silu(lhs gate) * (lhs up) * weight, and with `residuals` the two products: [M, N] each, None without."""
    (num_rows, inner), (num_groups, _, width) = lhs.shape, gate.shape
    blocks = _blocks(pl.cdiv(num_rows, num_groups), width, inner, lhs.dtype, matrices=2)
    m, n, k, _ = blocks
    tiles = _row_tiles(group_sizes, num_rows, m)

    def kernel(groups, starts, ends, lhs, gate, up, weights, *outs):
        group, start, end = (table[pl.program_id(1)] for table in (groups, starts, ends))
        column = pl.program_id(0) * n

        def step(i, totals):
            rows = _load(lhs, start, m, end, i * k, k)
            products = (_dot(rows, _load_weights(each, group, i * k, k, column, n)) for each in (gate, up))
            return tuple(total + product for total, product in zip(totals, products, strict=True))

        steps = jnp.where((group < num_groups) & (start < end), jnp.int32(pl.cdiv(inner, k)), 0)
        zeros = jnp.zeros((m, n), jnp.float32)
        gated, upped = lax.fori_loop(0, steps, step, (zeros, zeros))
        present = start + jnp.arange(m) < jnp.where(group < num_groups, end, 0)  # beyond the groups weights may be NaN
        weight = plgpu.load(weights.at[pl.ds(start, m)], mask=present, other=0).astype(jnp.float32)
        hidden = gated / (1 + jnp.exp(-gated)) * upped * weight[:, None]
        for out, values in zip(outs, (hidden, gated, upped), strict=False):
            _store(out, (), start, end, column, values)

    grid = pl.cdiv(width, n), tiles[0].shape[0]
    outs = [jax.ShapeDtypeStruct((num_rows, width), lhs.dtype)] * (3 if residuals else 1)
    operands = *tiles, lhs, gate, up, row_weights
    out = _call(kernel, "grouped_swiglu", grid, 4 * inner * width, outs, blocks, static, operands)
    return out if residuals else (*out, None, None)
