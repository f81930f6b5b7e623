"""Grouped matmuls whose result is rows (forward, and the rows' gradient) as one Mosaic kernel for TPUs.

The weights of a group stay in VMEM while its rows stream by; those of the next group are copied meanwhile, all the
time that this group takes. Rows come in tiles, but are multiplied a few (a `granule`) at a time, and only granules
that hold rows of the group: so small groups and edges cost little, and the tiles can be large.

M rows, G groups, C contracted size, W width of the result, T rows in a tile, R rows in a granule.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.grouped_matmul.visits import rows_visits

LANES = 128
SUBLANES = 16
COLUMNS_TO_BEGIN = 24
"""Cost of starting other columns, in columns: some hundred of the schedule's bundles."""


class RowsShape(NamedTuple):
    """Sizes that a call's tiles must fit."""

    rows: int
    inner: int
    width: int
    lhs: int = 1
    rhs: int = 1
    outputs: int = 1
    itemsize: int = 2


class RowsTiles(NamedTuple):
    """Tile sizes of a call, in rows and columns."""

    rows: int
    """Rows T that are read and written at a time."""
    granule: int
    """Rows R multiplied at a time. Divides rows."""
    edge: int
    """Rows multiplied at a time where fewer than a granule are left, and what granules begin at a multiple of: what
    the edges of a group cost. Divides granule."""
    columns: int
    """Columns of a group's weights that are held in VMEM."""
    sub_columns: int
    """Columns multiplied at a time. Divides columns."""
    chunk: int
    """Part of the contraction that is multiplied at a time. Divides it."""


def silu_product(sums, row_weights):
    """silu(gate) * up, times the rows' weights if there are any; and gate and up themselves. All float32."""
    gate, up = sums
    hidden = gate * lax.logistic(gate) * up
    return [hidden if row_weights is None else hidden * row_weights, gate, up]


def total(sums, row_weights):
    """The sum of the products."""
    return [functools.reduce(lax.add, sums)]


def rows_by_groups(
    lhs: list[jax.Array],
    rhs: list[jax.Array],
    group_sizes: jax.Array,
    row_weights: jax.Array | None = None,
    *,
    epilogue: Callable = total,
    outputs: int = 1,
    transposed: bool = False,
    tiles: RowsTiles,
    vmem_limit: int | None = None,
    cost: pl.CostEstimate | None = None,
    name: str = "grouped_matmul",
    interpret=False,
) -> list[jax.Array]:
    """Products of rows with their groups' matrices, put together by `epilogue`.

    Args:
        lhs: one [M, C] for all of rhs, or one for each.
        rhs: each [G, C, W], or [G, W, C] if `transposed`.
        row_weights: float32 [M], handed to the epilogue.
        epilogue: (float32 products [R, S] of each rhs, row weights [R, 1] or None) to at least `outputs` results.
        tiles: from `fit`.
    Returns:
        Of each output [M, W] in lhs's dtype; rows beyond the groups are zeros.
    """
    (M, C), (W,) = lhs[0].shape, {r.shape[1 if transposed else 2] for r in rhs}
    rows, width, dtype = M, W, lhs[0].dtype
    # Lanes come in 128s. No real model pays for this copy.
    lhs = [padded(x, SUBLANES, LANES) for x in lhs]
    rhs = [padded(w, 1, LANES, LANES) for w in rhs]
    if row_weights is not None:
        row_weights = padded(row_weights.astype(jnp.float32)[:, None], SUBLANES, 1)
    (M, C), W = lhs[0].shape, rhs[0].shape[1 if transposed else 2]
    T, R, _, columns, sub, chunk = tiles
    visits, num_visits = rows_visits(group_sizes, rows, T)
    kernel = functools.partial(
        _kernel,
        len(lhs),
        len(rhs),
        row_weights is not None,
        outputs,
        epilogue,
        transposed,
        tiles,
        (C, W),
    )

    def tile(n, v, group, tile, *_):
        return tile[v], 0

    def read_tile(n, v, group, tile, begin, end, turn, following):
        # A tile without rows of any group is not read: the last one that was stays.
        last = lax.div(jnp.maximum(end[following.shape[0] - 2], 1) - 1, T)
        return jnp.minimum(tile[v], last), 0

    block = (1, columns, C) if transposed else (1, C, columns)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(visits),
        grid=(pl.cdiv(W, columns), num_visits),
        in_specs=[pl.BlockSpec((T, C), read_tile) for _ in lhs]
        + ([] if row_weights is None else [pl.BlockSpec((T, 1), read_tile)])
        + [pl.BlockSpec(memory_space=pl.ANY) for _ in rhs],
        out_specs=[pl.BlockSpec((T, columns), lambda n, v, group, tile, *_: (tile[v], n)) for _ in range(outputs)],
        scratch_shapes=[pltpu.VMEM((2, *block[1:]), w.dtype) for w in rhs]
        + [pltpu.SemaphoreType.DMA((2, len(rhs)))]
        + ([] if chunk == C else [pltpu.VMEM((len(rhs), R, sub), jnp.float32)]),
    )
    results = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((M, W), dtype)] * outputs,
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=cost,
        name=name,
        interpret=interpret,
    )(*visits, *lhs, *([] if row_weights is None else [row_weights]), *rhs)
    return [result[:rows, :width] for result in results]


DEFAULT = {"rows": 512, "granule": 128, "edge": 64, "columns": 1792, "sub_columns": 1024, "chunk": 1024}


def fit(wanted: dict[str, int], shape: RowsShape, cores: int, memory: int) -> RowsTiles:
    """Tiles near the wanted ones (or the defaults) that this shape allows and that fit `memory` bytes of VMEM.

    Args:
        cores: how many TensorCores share the columns.
    """
    wanted = DEFAULT | wanted
    M, C, W = (-(-size // unit) * unit for size, unit in zip(shape[:3], (SUBLANES, LANES, LANES), strict=True))
    granule = min(wanted["granule"], M)
    rows = max(min(wanted["rows"], M) // granule, 1) * granule
    edge = wanted["edge"] if granule % wanted["edge"] == 0 else granule
    columns = wanted["columns"]
    while True:
        held = share(W, columns, cores)
        sub = sub_columns(W, held, wanted["sub_columns"])
        sizes = RowsTiles(rows, granule, edge, held, sub, divisor(C, wanted["chunk"]))
        if used_memory(sizes, shape) <= memory:
            return sizes
        if rows > granule and (held <= 512 or rows > 256):
            rows = rows // 2 // granule * granule
        elif held > LANES:
            columns = held - LANES
        else:
            raise NotImplementedError(
                f"grouped_matmul on TPU: a contraction of {C} needs {used_memory(sizes, shape)} bytes of vector "
                f"memory, and there are {memory}. Take implementation='ragged_dot'."
            )


def used_memory(tiles: RowsTiles, shape: RowsShape) -> int:
    """Bytes of VMEM for two buffers of each window and of the weights, and for the sums."""
    C = -(-shape.inner // LANES) * LANES
    weights = shape.rhs * C * tiles.columns
    lhs = shape.lhs * tiles.rows * C
    out = shape.outputs * tiles.rows * tiles.columns
    row_weights = tiles.rows * LANES * 4
    sums = shape.rhs * tiles.granule * tiles.sub_columns * 4
    return 2 * (weights + lhs + out) * shape.itemsize + 2 * row_weights + 2 * sums


def share(size: int, most: int, cores: int) -> int:
    """A tile of `size`, a multiple of 128 and at most about `most`: the largest that leaves no core more than needed,
    and one that divides it if that costs less than half the tile.

    Cores take whole tiles, so one tile too many for one of them is time lost by all others.
    """

    def load(tile):
        count = -(-size // tile)
        return min(-(-count // cores) * tile, size)

    def key(tile):
        return load(tile), size % tile != 0 or 2 * tile < most, -tile

    return min(range(LANES, max(min(most, size), LANES) + 1, LANES), key=key)


def divisor(size: int, wanted: int) -> int:
    """The multiple of 128 nearest to `wanted`, by ratio, that divides `size`."""
    divisors = (d for d in range(LANES, size + 1, LANES) if size % d == 0)
    return min(divisors, key=lambda d: abs(math.log(d / wanted)))


def sub_columns(size: int, tile: int, wanted: int) -> int:
    """A divisor of `tile` that is multiplied at a time: beginning costs as much as some columns, and so does what is
    multiplied beyond `size`."""
    last = size - (-(-size // tile) - 1) * tile
    divisors = [d for d in range(LANES, tile + 1, LANES) if tile % d == 0 and 2 * d <= 3 * wanted] or [LANES]

    def cost(sub):
        times = (size - last) // sub + -(-last // sub)
        return times * (sub + COLUMNS_TO_BEGIN), -sub

    return min(divisors, key=cost)


def padded(x: jax.Array, *multiples: int) -> jax.Array:
    """x with its sizes rounded up to multiples, by zeros."""
    widths = [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, widths) if any(high for _, high in widths) else x


def _kernel(num_lhs, num_rhs, weighted, outputs, epilogue, transposed, tiles, shape, *refs):
    T, R, _, columns, sub, chunk = tiles
    C, W = shape
    (group, tile, begin, end, turn, following), refs = refs[:6], refs[6:]
    lhs, refs = refs[:num_lhs], refs[num_lhs:]
    row_weights, refs = refs[0] if weighted else None, refs[weighted:]
    rhs, out, refs = refs[:num_rhs], refs[num_rhs : num_rhs + outputs], refs[num_rhs + outputs :]
    weights, arrived, sums = refs[:num_rhs], refs[num_rhs], refs[num_rhs + 1 :]
    groups = following.shape[0] - 1
    n, v = pl.program_id(0), pl.program_id(1)
    g, t = group[v], tile[v]
    before = jnp.maximum(v - 1, 0)
    slot = lax.rem(turn[g], 2)
    last_columns = W - (pl.cdiv(W, columns) - 1) * columns

    def copies(which, g, slot):
        """Copies of a group's weights into a slot. The last tile of columns may be narrower."""

        def run(width):
            for i in range(num_rhs):
                part = pl.ds(n * columns, width)
                here = pl.ds(0, width)
                source = rhs[i].at[g, part, :] if transposed else rhs[i].at[g, :, part]
                target = weights[i].at[slot, here, :] if transposed else weights[i].at[slot, :, here]
                getattr(pltpu.make_async_copy(source, target, arrived.at[slot, i]), which)()

        if last_columns == columns:
            return run(columns)
        lax.cond(n == pl.num_programs(0) - 1, lambda: run(last_columns), lambda: run(columns))

    @pl.when((g < groups) & ((v == 0) | (group[before] != g)))
    def _first_of_group():
        @pl.when(v == 0)
        def _first_of_all():
            copies("start", g, slot)

        copies("wait", g, slot)

        @pl.when(following[g] < groups)
        def _fetch_ahead():
            copies("start", following[g], 1 - slot)

    @pl.when(((v == 0) | (tile[before] != t)) & ((t + 1) * T > end[groups - 1]))
    def _zeros_beyond():
        for ref in out:
            ref[...] = jnp.zeros_like(ref)

    low = jnp.maximum(begin[g] - t * T, 0)
    high = jnp.minimum(end[g] - t * T, T)

    def product(i, rows, inner, columns):
        """Rows of lhs times columns of weights i, over a part of the contraction."""
        x = lhs[i if num_lhs > 1 else 0][rows, inner]
        w = weights[i][slot, columns, inner] if transposed else weights[i][slot, inner, columns]
        contract = ((1,), (1 if transposed else 0,))
        return lax.dot_general(x, w, (contract, ((), ())), preferred_element_type=jnp.float32)

    def granule(start, size):
        """All columns of the group's rows among these."""
        rows = pl.ds(pl.multiple_of(start, tiles.edge), size)
        index = start + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        mine = (index >= low) & (index < high)
        scale = row_weights[rows, :] if weighted else None

        def column(s, _):
            part = pl.ds(pl.multiple_of(s * sub, sub), sub)
            if chunk == C:
                results = [product(i, rows, slice(None), part) for i in range(num_rhs)]
            else:
                total = sums[0].at[:, :size]
                total[...] = jnp.zeros_like(total)

                def inner(c):
                    return pl.ds(pl.multiple_of(c * chunk, chunk), chunk)

                def add(c, _):
                    for i in range(num_rhs):
                        total[i] += product(i, rows, inner(c), part)

                # The last chunk goes straight on to the result, so that what comes after overlaps with its product.
                last = C // chunk - 1
                lax.fori_loop(0, last, add, None)
                results = [total[i] + product(i, rows, inner(last), part) for i in range(num_rhs)]
            results = epilogue(results, scale)[:outputs]
            for ref, result in zip(out, results, strict=True):
                ref[rows, part] = jnp.where(mine, result, ref[rows, part].astype(jnp.float32)).astype(ref.dtype)

        # Of the last columns a part may lie beyond the result; it isn't written.
        used = columns if last_columns == columns else jnp.where(n == pl.num_programs(0) - 1, last_columns, columns)
        lax.fori_loop(0, lax.div(used + sub - 1, sub), column, None)

    # Whole granules from the group's first edge on, then what is left.
    first, each = lax.div(low, tiles.edge), R // tiles.edge
    edges = lax.div(high + tiles.edge - 1, tiles.edge) - first
    whole = lax.div(edges, each)
    lax.fori_loop(0, whole, lambda i, _: granule(first * tiles.edge + i * R, R), None)
    if each > 1:
        lax.fori_loop(whole * each, edges, lambda i, _: granule((first + i) * tiles.edge, tiles.edge), None)
