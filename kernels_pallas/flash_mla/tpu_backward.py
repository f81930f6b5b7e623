"""The backward pass of training attention on TPUs, in one kernel; `tpu.py` says how it is laid out.

B rows, L query length, S key length, H heads, P = H / 2 head pairs, N unrotated size, R = 64 rotated size, V value
size, l queries and s keys of a block, T steps.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_mla.tpu_parts import (
    HIDDEN,
    LANES,
    ROPE,
    VMEM_LIMIT,
    both,
    dot,
    eight,
    of_head,
    seen_pairs,
    visible_keys,
)
from kernels_pallas.flash_mla.visits import FIRST, LAST, PARTLY, VISITED, visits


def _delta(plan, out, d_out):
    """Each head's inner product of the output and its gradient, float32 [B, P, 2, L]."""
    batch, length, width = out.shape
    pairs, rows = plan.num_heads // 2, plan.backward_block[0]

    def kernel(out, d_out, delta):
        V = out.shape[1] // 2
        product = (out[...].astype(jnp.float32) * d_out[...].astype(jnp.float32)).T
        for head in range(2):
            delta[pl.ds(head, 1), :] = jnp.sum(product[head * V : (head + 1) * V], axis=0, keepdims=True)

    return pl.pallas_call(
        kernel,
        name="flash_mla_delta",
        grid=(batch, pairs, length // rows),
        in_specs=[pl.BlockSpec((None, rows, width // pairs), lambda b, p, i: (b, i, p))] * 2,
        out_specs=pl.BlockSpec((None, None, 2, rows), lambda b, p, i: (b, p, 0, i)),
        out_shape=jax.ShapeDtypeStruct((batch, pairs, 2, length), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        cost_estimate=pl.CostEstimate(flops=2 * out.size, transcendentals=0, bytes_accessed=2 * out.nbytes),
        interpret=plan.interpret,
    )(out, d_out)


def backward(plan, query_nope, query_rope, key_nope, key_rope, value, query_marks, key_marks, out, log_sum, d_out):
    """Gradients of query_nope, query_rope, key_nope, key_rope and value, in their shapes."""
    length, keys = query_nope.shape[1], key_nope.shape[1]
    delta = _delta(plan, out, d_out)
    parts = [
        (rows, seen)
        for seen in _parts(keys, plan.longest[1], plan.backward_block[1])
        for rows in _parts(length, plan.longest[0], plan.backward_block[0])
        if not plan.ordered or seen.start < rows.stop
    ]
    if len(parts) > 1:
        plan = plan._replace(ordered=False)
    d_inputs = [jnp.zeros(x.shape, jnp.float32) for x in (query_nope, query_rope, key_nope, key_rope, value)]
    for rows, seen in parts:
        d_part = _backward_part(
            plan,
            *(x[:, rows] for x in (query_nope, query_rope)),
            *(x[:, seen] for x in (key_nope, key_rope, value)),
            *(query_marks[..., rows], key_marks[..., seen], log_sum[..., rows], delta[..., rows], d_out[:, rows]),
        )
        if len(parts) == 1:
            return d_part
        at = rows, rows, seen, seen, seen
        d_inputs = [x.at[:, here].add(d) for x, here, d in zip(d_inputs, at, d_part, strict=True)]
    return tuple(d.astype(value.dtype) for d in d_inputs)


def _parts(length, longest, block):
    """Slices of whole blocks that cover the length, each at most the longest."""
    size = max(longest // block, 1) * block
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _backward_part(
    plan, query_nope, query_rope, key_nope, key_rope, value, query_marks, key_marks, log_sum, delta, d_out
):
    """Gradients of query_nope, query_rope, key_nope, key_rope and value, of lengths that VMEM takes."""
    batch, length, keys, pairs = *query_nope.shape[:2], key_nope.shape[1], plan.num_heads // 2
    N, V = query_nope.shape[2] // plan.num_heads, value.shape[2] // plan.num_heads
    rows, columns = plan.backward_block
    todo = visits(query_marks, key_marks, plan.backward_block, "key", plan.ordered)
    # Two cores may share the work; what all heads add to d_key_rope stays in VMEM, so each has its own.
    cores = 2 if pairs % 2 == 0 else 1
    own = pairs // cores

    of_query = lambda c, b, p, t, query, key, flags: (b, query[b, t], c * own + p)  # noqa: E731
    of_key = lambda c, b, p, t, query, key, flags: (b, key[b, t], c * own + p)  # noqa: E731
    of_row = lambda c, b, p, t, query, key, flags: (b, 0, c * own + p)  # noqa: E731
    column = lambda c, b, p, t, query, key, flags: (b, c * own + p, 0, query[b, t])  # noqa: E731
    seen = batch * plan.num_heads * seen_pairs(plan, length, keys)
    read = batch * pairs * todo.query.shape[1] * rows * (2 * N + 2 * V + LANES)
    once = 2 * (query_nope.size + query_rope.size + key_nope.size + value.size)
    d_query_nope, d_query_rope, d_key_nope, d_key_rope, d_value = pl.pallas_call(
        functools.partial(_backward_kernel, scale=plan.scale, wide=plan.wide),
        name="flash_mla_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, batch, own, todo.query.shape[1] if plan.ordered else todo.steps),
            in_specs=[
                pl.BlockSpec((None, rows, 2 * N), of_query),
                pl.BlockSpec((None, rows, LANES), of_query),
                pl.BlockSpec((None, columns, 2 * N), of_key),
                pl.BlockSpec((None, columns, LANES), lambda c, b, p, t, query, key, flags: (b, key[b, t], 0)),
                pl.BlockSpec((None, columns, 2 * V), of_key),
                pl.BlockSpec((None, 8, rows), lambda c, b, p, t, query, key, flags: (b, 0, query[b, t])),
                pl.BlockSpec((None, 8, columns), lambda c, b, p, t, query, key, flags: (b, 0, key[b, t])),
                pl.BlockSpec((None, None, 2, rows), column),
                pl.BlockSpec((None, None, 2, rows), column),
                pl.BlockSpec((None, rows, 2 * V), of_query),
            ],
            out_specs=[
                pl.BlockSpec((None, length, 2 * N), of_row),
                pl.BlockSpec((None, length, LANES), of_row),
                pl.BlockSpec((None, columns, 2 * N), of_key),
                pl.BlockSpec((None, None, ROPE, keys), lambda c, b, p, t, query, key, flags: (c, b, 0, 0)),
                pl.BlockSpec((None, columns, 2 * V), of_key),
            ],
            scratch_shapes=[
                pltpu.VMEM((2, N + ROPE, columns), key_nope.dtype),
                pltpu.VMEM((length // rows, 2, N + ROPE, rows), jnp.float32),
                pltpu.VMEM((2, N + ROPE, columns) if plan.wide else (2, columns, N + LANES), jnp.float32),
                pltpu.VMEM((2, V, columns) if plan.wide else (2, columns, V), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(query_nope.shape, query_nope.dtype),
            jax.ShapeDtypeStruct(query_rope.shape, query_rope.dtype),
            jax.ShapeDtypeStruct(key_nope.shape, key_nope.dtype),
            jax.ShapeDtypeStruct((cores, batch, ROPE, keys), jnp.float32),
            jax.ShapeDtypeStruct(value.shape, value.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * seen * (3 * (N + ROPE) + 2 * V),
            transcendentals=seen,
            bytes_accessed=value.dtype.itemsize * (read + once),
        ),
        interpret=plan.interpret,
    )(
        *todo[:3],
        *(query_nope, query_rope, key_nope, both(key_rope), value, eight(query_marks), eight(key_marks)),
        *(log_sum, delta, d_out),
    )
    d_key_rope = jnp.sum(d_key_rope, axis=0).swapaxes(1, 2).astype(key_rope.dtype)
    return d_query_nope, d_query_rope, d_key_nope, d_key_rope, d_value


def _backward_kernel(
    query_block,
    key_block,
    flags,
    query_nope,
    query_rope,
    key_nope,
    key_rope,
    value,
    query_marks,
    key_marks,
    log_sum,
    delta,
    d_out,
    d_query_nope,
    d_query_rope,
    d_key_nope,
    d_key_rope,
    d_value,
    key_columns,
    d_query_sum,
    d_key_sum,
    d_value_sum,
    *,
    scale,
    wide,
):
    """One pair of heads, one block of queries [l], one of keys [s].

    The sum of d_query holds a head's columns along rows, [block, head, N + R, l]: a size of 192 then fills the matrix
    unit. So do those of d_key and d_value where the unit is wider than a head: [head, N + R, s] and [head, V, s]; else
    [head, s, N + 2R], of which the other head's R say nothing, and [head, s, V].
    """
    row, pair, step = (pl.program_id(axis) for axis in (1, 2, 3))
    flag, i, j = (x[row, step] for x in (flags, query_block, key_block))
    N, V, columns = query_nope.shape[1] // 2, value.shape[1] // 2, key_nope.shape[0]
    nope, own, rope = ([slice(head * size, (head + 1) * size) for head in range(2)] for size in (N, V, ROPE))

    @pl.when(step == 0)
    def _():
        d_query_sum[...] = jnp.zeros_like(d_query_sum)

    @pl.when((step == 0) & (pair == 0))
    def _():
        d_key_rope[...] = jnp.zeros_like(d_key_rope)

    @pl.when(flag & FIRST != 0)
    def _():
        d_key_sum[...] = jnp.zeros_like(d_key_sum)
        d_value_sum[...] = jnp.zeros_like(d_value_sum)
        for head in range(2):
            key_columns[head, :N] = key_nope[:, nope[head]].T
            key_columns[head, N:] = key_rope[...].T[:ROPE]

    def visit(visible):
        turned = query_rope[...].T
        for head in range(2):
            query = jnp.concatenate([query_nope[:, nope[head]], of_head(query_rope[...], head)], axis=1)
            key = jnp.concatenate([key_nope[:, nope[head]], key_rope[...]], axis=1)
            scores = dot(key, query, (1, 1)) * (scale * math.log2(math.e))
            if visible is not None:
                scores = jnp.where(visible, scores, HIDDEN)
            weights = jnp.exp2(scores - log_sum[pl.ds(head, 1), :])
            d_weights = dot(value[:, own[head]], d_out[:, own[head]], (1, 1))
            d_scores = (weights * (d_weights - delta[pl.ds(head, 1), :])).astype(value.dtype)
            if wide:
                query_columns = jnp.concatenate([query_nope[:, nope[head]].T, turned[rope[head]]], axis=0)
                d_value_sum[head] += dot(d_out[:, own[head]].T, weights.astype(value.dtype), (1, 1))
                d_key_sum[head] += dot(query_columns, d_scores, (1, 1))
            else:
                d_value_sum[head] += dot(weights.astype(value.dtype), d_out[:, own[head]], (1, 0))
                d_key_sum[head] += dot(d_scores, query, (1, 0))
            d_query_sum[i, head] += dot(key_columns[head], d_scores, (1, 0))

    @pl.when(flag & VISITED != 0)
    def _():
        masked = lambda: visit(visible_keys(query_marks[...], key_marks[...]))  # noqa: E731
        lax.cond(flag & PARTLY != 0, masked, lambda: visit(None))

    @pl.when(flag & LAST != 0)
    def _():
        here = pl.ds(pl.multiple_of(j * columns, LANES), columns)
        for head in range(2):
            d_key, d_head_value = d_key_sum[head] * scale, d_value_sum[head]
            if wide:
                d_key_nope[:, nope[head]] = d_key[:N].T.astype(d_key_nope.dtype)
                d_value[:, own[head]] = d_head_value.T.astype(d_value.dtype)
                d_key_rope[:, here] += d_key[N:]
            else:
                d_key_nope[:, nope[head]] = d_key[:, :N].astype(d_key_nope.dtype)
                d_value[:, own[head]] = d_head_value.astype(d_value.dtype)
                d_key_rope[:, here] += d_key[:, N:].T[rope[head]]

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        rows = query_nope.shape[0]

        @pl.loop(0, d_query_sum.shape[0])
        def _(i):
            here = pl.ds(pl.multiple_of(i * rows, LANES), rows)
            for head in range(2):
                d_query_nope[here, nope[head]] = (d_query_sum[i, head, :N] * scale).T.astype(d_query_nope.dtype)
            both = jnp.concatenate([d_query_sum[i, 0, N:], d_query_sum[i, 1, N:]], axis=0)
            d_query_rope[here, :] = (both * scale).T.astype(d_query_rope.dtype)
