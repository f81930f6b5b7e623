"""The weights' gradient of a grouped matmul, a sum over each group's rows, as one Mosaic kernel for TPUs.

M rows, G groups, K and N sizes of the result, T rows in a tile, R rows in a granule.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.grouped_matmul.tpu_rows import LANES, SUBLANES, divisor, padded, share
from kernels_pallas.grouped_matmul.visits import groups_visits


class GroupsShape(NamedTuple):
    """Sizes that a call's tiles must fit."""

    rows: int
    inner: int
    width: int
    itemsize: int = 2


class GroupsTiles(NamedTuple):
    """Tile sizes of a call."""

    rows: int
    """Rows T that are read at a time."""
    granule: int
    """Rows R multiplied at a time at a group's edges. Divides rows."""
    inner: int
    """K of the block of the result that is summed up in VMEM."""
    columns: int
    """N of it."""
    sub_inner: int
    """K of what is multiplied at a time. Divides inner."""
    sub_columns: int
    """N of it. Divides columns."""


def groups_from_rows(
    x: jax.Array,
    y: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: jnp.dtype,
    tiles: GroupsTiles,
    vmem_limit: int | None = None,
    cost: pl.CostEstimate | None = None,
    name: str = "grouped_matmul_weights",
    interpret=False,
) -> jax.Array:
    """The sum over each group's rows of the outer products of x [M, K] and y [M, N]: [G, K, N], zeros where empty.

    A tile of rows that lies in the group is multiplied whole; at the group's edges only the granules that hold rows
    of it, what is not its own masked out of both operands, for beyond the groups there may be anything.

    Args:
        dtype: of the result; sums are float32.
        tiles: from `fit`.
    """
    (rows, inner), width, groups = x.shape, y.shape[1], group_sizes.shape[0]
    x, y = padded(x, SUBLANES, LANES), padded(y, SUBLANES, LANES)
    K, N = x.shape[1], y.shape[1]
    T, block = tiles.rows, (tiles.inner, tiles.columns)
    visits, num_visits = groups_visits(group_sizes, rows, T)
    result = pl.pallas_call(
        functools.partial(_kernel, tiles, (K, N)),
        out_shape=jax.ShapeDtypeStruct((groups, K, N), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(N, block[1]), pl.cdiv(K, block[0]), num_visits),
            in_specs=[
                pl.BlockSpec((T, block[0]), lambda n, k, v, group, tile, *_: (tile[v], k)),
                pl.BlockSpec((T, block[1]), lambda n, k, v, group, tile, *_: (tile[v], n)),
            ],
            out_specs=pl.BlockSpec((1, *block), lambda n, k, v, group, *_: (group[v], k, n)),
            scratch_shapes=[pltpu.VMEM(block, jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=cost,
        name=name,
        interpret=interpret,
    )(*visits, x, y)
    return result[:, :inner, :width]


DEFAULT = {"rows": 512, "granule": 256, "inner": 1024, "columns": 1024, "sub_inner": 512, "sub_columns": 512}


def fit(wanted: dict[str, int], shape: GroupsShape, cores: int, memory: int) -> GroupsTiles:
    """Tiles near the wanted ones (or the defaults) that this shape allows and that fit `memory` bytes of VMEM.

    Args:
        cores: how many TensorCores share the columns.
    """
    wanted = DEFAULT | wanted
    M, K, N = (-(-size // unit) * unit for size, unit in zip(shape[:3], (SUBLANES, LANES, LANES), strict=True))
    granule = min(wanted["granule"], M)
    rows = max(min(wanted["rows"], M) // granule, 1) * granule
    while True:
        block = share(K, wanted["inner"], 1), share(N, wanted["columns"], cores)
        subs = (divisor(size, wanted[name]) for size, name in zip(block, ("sub_inner", "sub_columns"), strict=True))
        sizes = GroupsTiles(rows, granule, *block, *subs)
        if used_memory(sizes, shape) <= memory:
            return sizes
        wanted["inner" if block[0] >= block[1] else "columns"] = max(block) // 2


def used_memory(tiles: GroupsTiles, shape: GroupsShape) -> int:
    """Bytes of VMEM for two buffers of each window, and for the sum."""
    operands = tiles.rows * (tiles.inner + tiles.columns)
    block = tiles.inner * tiles.columns
    return 2 * (operands + block) * shape.itemsize + block * 4


def _kernel(tiles, shape, group, tile, begin, end, turn, following, x, y, out, total):
    T, R, block, sub = tiles.rows, tiles.granule, (tiles.inner, tiles.columns), (tiles.sub_inner, tiles.sub_columns)
    v = pl.program_id(2)
    g, t = group[v], tile[v]
    visits = pl.num_programs(2)
    used = [_used(axis, size, whole) for axis, size, whole in zip((1, 0), shape, block, strict=True)]

    @pl.when((v == 0) | (group[jnp.maximum(v - 1, 0)] != g))
    def _first_of_group():
        total[...] = jnp.zeros_like(total)

    low = jnp.maximum(begin[g] - t * T, 0)
    high = jnp.minimum(end[g] - t * T, T)

    def add(rows, mask):
        """Add the products of these rows, masked or not, sub-block by sub-block."""

        def one(k, n):
            here = [pl.ds(pl.multiple_of(i * size, size), size) for i, size in zip((k, n), sub, strict=True)]
            parts = [ref[rows, columns] for ref, columns in zip((x, y), here, strict=True)]
            parts = parts if mask is None else [jnp.where(mask, part, jnp.zeros_like(part)) for part in parts]
            total[*here] += lax.dot_general(*parts, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        # Of the last block a part may lie beyond the result; it isn't written.
        subs = [lax.div(size + part - 1, part) for size, part in zip(used, sub, strict=True)]
        lax.fori_loop(0, subs[0], lambda k, _: lax.fori_loop(0, subs[1], lambda n, _: one(k, n), None), None)

    def granule(r, _):
        index = r * R + lax.broadcasted_iota(jnp.int32, (R, 1), 0)
        add(pl.ds(pl.multiple_of(r * R, R), R), (index >= low) & (index < high))

    whole = high - low == T
    pl.when(whole)(lambda: add(slice(None), None))

    @pl.when(jnp.logical_not(whole) & (high > low))
    def _edge():
        lax.fori_loop(lax.div(low, R), lax.div(high + R - 1, R), granule, None)

    @pl.when((v == visits - 1) | (group[jnp.minimum(v + 1, visits - 1)] != g))
    def _last_of_group():
        out[0] = total[...].astype(out.dtype)


def _used(axis, size, whole):
    """Return the part of this step's block within the result: all except in the last block."""
    last = size - (-(-size // whole) - 1) * whole
    if last == whole:
        return jnp.int32(whole)
    return jnp.where(pl.program_id(axis) == pl.num_programs(axis) - 1, last, whole)
