"""Training attention of MLA for GPUs, in Pallas Triton.

Scores are the sum of two products, over the unrotated 128 columns and the rotated 64, so that nothing is padded to a
power of two. Heads lie side by side in the last axis and each program takes the columns of one; d_key_rope, which the
heads share, is written per head and summed outside. The backward pass is two kernels, one whose programs own keys and
one whose programs own queries: both make the scores again (Dao 2023), and no program adds to another's result.

Which blocks meet is known before the kernels run, from each block's smallest and largest order and segment: a program
loops over the blocks from the first that it meets to the last. Those that it sees wholly go without a mask.

B rows, L query length, S key length, H heads, N unrotated size, R rotated size, V value size; q, k sizes of blocks of
queries and keys.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.chips import OnChip
from kernels_pallas.fitting import EXCHANGED, ON_GPU, check_dtypes, copies, fit, from_shared_memory
from kernels_pallas.target import on_chip

LOG2_E = math.log2(math.e)


class AttentionBlocks(NamedTuple):
    """Queries and keys of a block, and the stages of the pipeline over those that a program goes through."""

    q: int
    k: int
    stages: int = 2

    @property
    def warps(self) -> int:
        """Two warpgroups for 128 queries or keys, one for fewer."""
        return 8 if max(self.q, self.k) >= 128 else 4


class AllBlocks(NamedTuple):
    """Those of each kernel."""

    forward: AttentionBlocks
    keys: AttentionBlocks
    queries: AttentionBlocks


LARGEST = {
    2: AllBlocks(AttentionBlocks(128, 128), AttentionBlocks(32, 128), AttentionBlocks(128, 64)),
    4: AllBlocks(*3 * [AttentionBlocks(32, 32, 1)]),
}
"""Largest blocks by the operands' bytes. 16 bits, for H100: those whose accumulators stay in registers at 128/64/128
columns. float32: without tensor cores, and with operands twice as large."""


class _AttentionCall(NamedTuple):
    """Static arguments of a call; `pairs` of queries and keys that see each other, expected in one row."""

    num_heads: int
    scale: float
    pairs: int
    blocks: AllBlocks
    interpret: bool


class _Marks(NamedTuple):
    """Orders and segments, which decide visibility: int32 [B, L] and [B, S]."""

    query_order: Int[Array, "B L"]
    query_segments: Int[Array, "B L"]
    key_order: Int[Array, "B S"]
    key_segments: Int[Array, "B S"]


def flash_mla(
    query_nope: Float[Array, "B L HN"],
    query_rope: Float[Array, "B L HR"],
    key_nope: Float[Array, "B S HN"],
    key_rope: Float[Array, "B S R"],
    value: Float[Array, "B S HV"],
    query_segments: Int[Array, "B L"],
    key_segments: Int[Array, "B S"],
    query_order: Int[Array, "B L"] | None,
    key_order: Int[Array, "B S"] | None,
    *,
    num_heads: int,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B L HV"]:
    """See `api.flash_mla`. A query that sees nothing gets zeros.

    Raises:
        NotImplementedError: for operands that are not bfloat16, float16 or float32, or not of one dtype, or for heads
            that no block of this chip's shared memory holds.
    """
    operands = query_nope, query_rope, key_nope, key_rope, value
    check_dtypes("flash_mla", ON_GPU, *operands)
    (batch, length), size = query_nope.shape[:2], key_nope.shape[1]
    pairs = length * (length + 1) // 2 if query_order is None else length * size // 2
    if query_order is None:
        query_order = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if key_order is None:
        key_order = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (batch, size))
    marks = _Marks(*(x.astype(jnp.int32) for x in (query_order, query_segments, key_order, key_segments)))
    # Those of the gradients too, so that sizes that one of them can't take are refused before anything runs.
    sizes = (x.shape[2] // num_heads for x in (query_nope, query_rope, value))
    blocks = blocks_for(*sizes, value.dtype.itemsize, on_chip("gpu"))
    return _attention(_AttentionCall(num_heads, scale, pairs, blocks, interpret), *operands, marks)


# ------------------------------------------------------------------------------------------------------ derivatives
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, query_nope, query_rope, key_nope, key_rope, value, marks):
    return _forward(static, query_nope, query_rope, key_nope, key_rope, value, marks)[0]


def _saved_forward(static, *operands_and_marks):
    # Named here, not by the caller: these very arrays are what the backward pass needs.
    out, log_sum = (checkpoint_name(x, "attention_output") for x in _forward(static, *operands_and_marks))
    return out, (*operands_and_marks, out, log_sum)


def _backward(static, saved, d_out):
    *operands, marks, out, log_sum = saved
    heads = (*out.shape[:2], static.num_heads, -1)
    delta = jnp.sum((d_out.astype(jnp.float32) * out.astype(jnp.float32)).reshape(heads), axis=-1).swapaxes(1, 2)
    rest = *operands, d_out, log_sum, delta, marks
    d_key_nope, d_key_ropes, d_value = _key_gradients(static, *rest)
    d_key_ropes = d_key_ropes.reshape(*d_key_ropes.shape[:2], static.num_heads, -1)
    d_key_rope = jnp.sum(d_key_ropes, axis=2, dtype=jnp.float32).astype(d_key_ropes.dtype)
    return *_query_gradients(static, *rest), d_key_nope, d_key_rope, d_value, None


_attention.defvjp(_saved_forward, _backward)


# ------------------------------------------------------------------------------------------------------ blocks
def blocks_for(nope: int, rope: int, width: int, itemsize: int, chip: OnChip) -> AllBlocks:
    """Blocks of each kernel for heads of these sizes.

    Raises:
        NotImplementedError: where no block fits the chip's shared memory.
    """
    sizes = tuple(_columns(size) for size in (nope, rope, width))
    found = {}
    for kernel, largest in LARGEST[itemsize]._asdict().items():
        needed = functools.partial(shared_memory, kernel, sizes, itemsize, chip)
        found[kernel] = fit("flash_mla", _smaller(largest), needed, chip.memory)
    return AllBlocks(**found)


def _smaller(block):
    """Yield these blocks, then smaller and smaller ones."""
    yield block
    while max(block.q, block.k) > 16:
        side = "q" if block.q > block.k else "k"
        block = block._replace(**{side: getattr(block, side) // 2})
        yield block


def shared_memory(
    kernel: str, sizes: tuple[int, int, int], itemsize: int, chip: OnChip, blocks: AttentionBlocks
) -> int:
    """Bytes that the compiler asks for at most.

    Args:
        kernel: a field of `AllBlocks`.
        sizes: columns of blocks for N, R and V.
    """
    nope, rope, width = sizes
    own, met = (blocks.k, blocks.q) if kernel == "keys" else (blocks.q, blocks.k)
    resident = own * (nope + rope + (0 if kernel == "forward" else width))
    step = met * (nope + rope + width)
    held = resident + copies(chip, itemsize, blocks.stages) * step
    if not from_shared_memory(chip, itemsize):
        held += blocks.q * blocks.k if itemsize == 4 or kernel == "keys" else 0  # scores, as operand of a product
    elif chip.generation >= 10 and kernel != "forward":
        held += step + met * max(nope, width)  # turned round
    return itemsize * held + EXCHANGED


def _ranges(marks, size):
    """Smallest and largest mark of each block, [B, blocks]; the last block's own marks fill it up."""
    blocks = jnp.pad(marks, ((0, 0), (0, -marks.shape[1] % size)), mode="edge").reshape(marks.shape[0], -1, size)
    return jnp.min(blocks, axis=2), jnp.max(blocks, axis=2)


def _block_visibility(marks: _Marks, blocks: AttentionBlocks) -> tuple[Bool[Array, "B Q K"], Bool[Array, "B Q K"]]:
    """Return whether any query of a block may see any key of another, and whether each of them surely sees each."""
    (low, high), (first, last) = (_ranges(x, blocks.q) for x in (marks.query_order, marks.query_segments))
    (key_low, key_high), (key_first, key_last) = (_ranges(x, blocks.k) for x in (marks.key_order, marks.key_segments))
    low, high, first, last = (x[:, :, None] for x in (low, high, first, last))
    key_low, key_high, key_first, key_last = (x[:, None] for x in (key_low, key_high, key_first, key_last))
    meet = (key_low <= high) & (key_first <= last) & (first <= key_last)
    whole = (key_high <= low) & (first == last) & (key_first == key_last) & (first == key_first)
    # Keys beyond the end are no keys.
    full = (jnp.arange(whole.shape[2]) + 1) * blocks.k <= marks.key_order.shape[1]
    return meet, whole & full


def _spans(meet, whole):
    """Return for each block along axis 1 the first that it visits along axis 2, a run that it sees wholly, and the end:
    [B, ·] each.

    Returns:
        first, start of the run, end of the run, end. What lies outside the run may be partly seen or not at all.
    """
    index, count = jnp.arange(meet.shape[2], dtype=jnp.int32), meet.shape[2]
    first = jnp.min(jnp.where(meet, index, count), axis=2)
    end = jnp.max(jnp.where(meet, index + 1, 0), axis=2)
    first = jnp.minimum(first, end)  # nothing: 0 to 0
    start = jnp.min(jnp.where(whole, index, end[:, :, None]), axis=2)
    stop = jnp.min(jnp.where(~whole & (index >= start[:, :, None]), index, end[:, :, None]), axis=2)
    return first, start, stop, end


def _loop(spans, row, block, step, carry):
    """Run step(block, carry, masked) for the blocks of a span: those of the run first, then those around it."""
    first, start, stop, end = (span[row, block] for span in spans)
    carry = lax.fori_loop(start, stop, lambda i, carry: step(i, carry, False), carry)

    def around(i, carry):
        return step(first + i + jnp.where(first + i < start, 0, stop - start), carry, True)

    return lax.fori_loop(0, end - first - (stop - start), around, carry)


def _columns(width):
    """Columns of a block that holds `width`: Triton's sizes are powers of two, and its products' at least 16."""
    return max(16, pl.next_power_of_2(width))


def _load(array, row, first, count, head, width):
    """A block [count, columns] of one head's columns; zeros beyond the array's length and the head's width."""
    columns = _columns(width)
    at = array.at[row, pl.ds(first, count), pl.ds(head * width, columns)]
    if array.shape[1] % count == 0 and columns == width:
        return plgpu.load(at)
    mask = (first + jnp.arange(count) < array.shape[1])[:, None] & (jnp.arange(columns) < width)[None]
    return plgpu.load(at, mask=mask, other=0)


def _store(array, row, first, head, width, values):
    count, columns = values.shape
    mask = (first + jnp.arange(count) < array.shape[1])[:, None] & (jnp.arange(columns) < width)[None]
    at = array.at[row, pl.ds(first, count), pl.ds(head * width, columns)]
    plgpu.store(at, values.astype(array.dtype), mask=mask)


def _load_vector(array, at, first, count, fill=0):
    """Entries first … of the array's last axis, `fill` beyond its end."""
    at = array.at[(*at, pl.ds(first, count))]
    if array.shape[-1] % count == 0:
        return plgpu.load(at)
    return plgpu.load(at, mask=first + jnp.arange(count) < array.shape[-1], other=fill)


def _visible(marks, row, blocks, i, j):
    """Return the mask of the keys of block j that the queries of block i see, [q, k]."""
    # A key beyond the end is of no segment that there is.
    order, segments = (_load_vector(x, (row,), i * blocks.q, blocks.q, -1) for x in marks[:2])
    key_order, key_segments = (_load_vector(x, (row,), j * blocks.k, blocks.k, -2) for x in marks[2:])
    return (order[:, None] >= key_order) & (segments[:, None] == key_segments)


def _dot(a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _call(kernel, name, grid, flops, exponentials, outs, blocks, static, operands):
    """Run a kernel over a grid; `flops` and `exponentials` for each head's pair of a query and a key."""
    kernel.__name__ = name  # the lowering puts the function's name into the program, not `name`
    pairs = grid[1] * grid[2] * static.pairs
    cost = pl.CostEstimate(
        flops=flops * pairs,
        transcendentals=exponentials * pairs,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((operands, outs))),
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
def _sizes(static, query_nope, query_rope, value):
    """N, R and V."""
    return tuple(x.shape[2] // static.num_heads for x in (query_nope, query_rope, value))


def _filled(key_rope):
    """Its columns up to those of a block: here a block has no neighbors' columns to run into."""
    return jnp.pad(key_rope, ((0, 0), (0, 0), (0, _columns(key_rope.shape[2]) - key_rope.shape[2])))


def _forward(static, query_nope, query_rope, key_nope, key_rope, value, marks):
    """The output [B, L, H*V], and float32 [B, H, L] each query's log2-sum-exp2 of its scores."""
    (batch, length), blocks = query_nope.shape[:2], static.blocks.forward
    nope, rope, width = _sizes(static, query_nope, query_rope, value)
    spans = _spans(*_block_visibility(marks, blocks))
    num_blocks = pl.cdiv(length, blocks.q)

    def kernel(*refs):
        spans, marks, (query_nope, query_rope, key_nope, key_rope, value, out, log_sum) = refs[:4], refs[4:8], refs[8:]
        # The last queries meet the most keys: they start first.
        i, head, row = num_blocks - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)
        queries = _load(query_nope, row, i * blocks.q, blocks.q, head, nope)
        rotated = _load(query_rope, row, i * blocks.q, blocks.q, head, rope)

        def step(j, carry, masked):
            total, largest, weight_sum = carry
            load = functools.partial(_load, row=row, first=j * blocks.k, count=blocks.k)
            scores = _dot(queries, load(key_nope, head=head, width=nope).T)
            scores += _dot(rotated, load(key_rope, head=0, width=key_rope.shape[2]).T)
            if masked:
                scores = jnp.where(_visible(marks, row, blocks, i, j), scores, -jnp.inf)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=1) * (static.scale * LOG2_E))
            weights = jnp.exp2(scores * (static.scale * LOG2_E) - new_largest[:, None])
            decay = jnp.exp2(largest - new_largest)
            values = load(value, head=head, width=width)
            total = total * decay[:, None] + _dot(weights.astype(values.dtype), values)
            return total, new_largest, weight_sum * decay + jnp.sum(weights, axis=1)

        # Finite, so that a query that has seen nothing yet does not subtract infinities.
        start = jnp.full(blocks.q, -1e30, jnp.float32), jnp.zeros(blocks.q, jnp.float32)
        total = jnp.zeros((blocks.q, _columns(width)), jnp.float32)
        total, largest, weight_sum = _loop(spans, row, i, step, (total, *start))
        weight_sum = jnp.where(weight_sum > 0, weight_sum, 1)
        _store(out, row, i * blocks.q, head, width, total / weight_sum[:, None])
        at = log_sum.at[row, head, pl.ds(i * blocks.q, blocks.q)]
        plgpu.store(
            at, largest + jnp.log(weight_sum) * LOG2_E, mask=i * blocks.q + jnp.arange(blocks.q) < log_sum.shape[2]
        )

    grid = num_blocks, static.num_heads, batch
    outs = [
        jax.ShapeDtypeStruct((batch, length, static.num_heads * width), value.dtype),
        jax.ShapeDtypeStruct((batch, static.num_heads, length), jnp.float32),
    ]
    operands = *spans, *marks, query_nope, query_rope, key_nope, _filled(key_rope), value
    return _call(kernel, "flash_mla", grid, 2 * (nope + rope + width), 1, outs, blocks, static, operands)


def _key_gradients(static, query_nope, query_rope, key_nope, key_rope, value, d_out, log_sum, delta, marks):
    """d_key_nope, d_key_rope of each head [B, S, H*R], d_value. Scores are made transposed, [k, q]."""
    (batch, size), blocks = key_nope.shape[:2], static.blocks.keys
    nope, rope, width = _sizes(static, query_nope, query_rope, value)
    spans = _spans(*(x.swapaxes(1, 2) for x in _block_visibility(marks, blocks)))

    def kernel(*refs):
        spans, marks, refs = refs[:4], refs[4:8], refs[8:]
        query_nope, query_rope, key_nope, key_rope, value, d_out, log_sum, delta, *outs = refs
        j, head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        load = functools.partial(_load, row=row, first=j * blocks.k, count=blocks.k)
        keys, values = load(key_nope, head=head, width=nope), load(value, head=head, width=width)
        rotated_keys = load(key_rope, head=0, width=key_rope.shape[2])

        def step(i, carry, masked):
            d_keys, d_rotated, d_values = carry
            load = functools.partial(_load, row=row, first=i * blocks.q, count=blocks.q, head=head)
            queries, rotated = load(query_nope, width=nope), load(query_rope, width=rope)
            d_outs = load(d_out, width=width)
            scores = _dot(keys, queries.T) + _dot(rotated_keys, rotated.T)
            sums, deltas = (_load_vector(x, (row, head), i * blocks.q, blocks.q) for x in (log_sum, delta))
            weights = jnp.exp2(scores * (static.scale * LOG2_E) - sums)
            if masked:
                weights = jnp.where(_visible(marks, row, blocks, i, j).T, weights, 0)
            d_values += _dot(weights.astype(d_outs.dtype), d_outs)
            d_scores = (weights * (_dot(values, d_outs.T) - deltas)).astype(queries.dtype)
            return d_keys + _dot(d_scores, queries), d_rotated + _dot(d_scores, rotated), d_values

        carry = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, rotated_keys, values))
        d_keys, d_rotated, d_values = _loop(spans, row, j, step, carry)
        results = (d_keys * static.scale, nope), (d_rotated * static.scale, rope), (d_values, width)
        for out, (result, columns) in zip(outs, results, strict=True):
            _store(out, row, j * blocks.k, head, columns, result)

    grid = pl.cdiv(size, blocks.k), static.num_heads, batch
    widths = [static.num_heads * each for each in (nope, rope, width)]
    outs = [jax.ShapeDtypeStruct((batch, size, each), value.dtype) for each in widths]
    operands = *spans, *marks, query_nope, query_rope, key_nope, _filled(key_rope), value, d_out, log_sum, delta
    return _call(kernel, "flash_mla_d_keys", grid, 4 * (nope + rope + width), 1, outs, blocks, static, operands)


def _query_gradients(static, query_nope, query_rope, key_nope, key_rope, value, d_out, log_sum, delta, marks):
    """d_query_nope and d_query_rope."""
    (batch, length), blocks = query_nope.shape[:2], static.blocks.queries
    nope, rope, width = _sizes(static, query_nope, query_rope, value)
    spans = _spans(*_block_visibility(marks, blocks))
    num_blocks = pl.cdiv(length, blocks.q)

    def kernel(*refs):
        spans, marks, refs = refs[:4], refs[4:8], refs[8:]
        query_nope, query_rope, key_nope, key_rope, value, d_out, log_sum, delta, *outs = refs
        i, head, row = num_blocks - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)
        load = functools.partial(_load, row=row, first=i * blocks.q, count=blocks.q, head=head)
        queries, rotated = load(query_nope, width=nope), load(query_rope, width=rope)
        d_outs = load(d_out, width=width)
        sums, deltas = (_load_vector(x, (row, head), i * blocks.q, blocks.q)[:, None] for x in (log_sum, delta))

        def step(j, carry, masked):
            d_queries, d_rotated = carry
            load = functools.partial(_load, row=row, first=j * blocks.k, count=blocks.k)
            keys, rotated_keys = load(key_nope, head=head, width=nope), load(key_rope, head=0, width=key_rope.shape[2])
            scores = _dot(queries, keys.T) + _dot(rotated, rotated_keys.T)
            weights = jnp.exp2(scores * (static.scale * LOG2_E) - sums)
            if masked:
                weights = jnp.where(_visible(marks, row, blocks, i, j), weights, 0)
            d_weights = _dot(d_outs, load(value, head=head, width=width).T)
            d_scores = (weights * (d_weights - deltas)).astype(keys.dtype)
            return d_queries + _dot(d_scores, keys), d_rotated + _dot(d_scores, rotated_keys)

        carry = tuple(jnp.zeros(x.shape, jnp.float32) for x in (queries, rotated))
        d_queries, d_rotated = _loop(spans, row, i, step, carry)
        for out, result, columns in zip(outs, (d_queries, d_rotated), (nope, rope), strict=True):
            _store(out, row, i * blocks.q, head, columns, result * static.scale)

    grid = num_blocks, static.num_heads, batch
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query_nope, query_rope)]
    operands = *spans, *marks, query_nope, query_rope, key_nope, _filled(key_rope), value, d_out, log_sum, delta
    flops = 4 * (nope + rope) + 2 * width
    return _call(kernel, "flash_mla_d_queries", grid, flops, 1, outs, blocks, static, operands)
