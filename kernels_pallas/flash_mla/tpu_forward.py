"""The forward pass of training attention on TPUs; `tpu.py` says how it is laid out.

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


def forward(plan, query_nope, query_rope, key_nope, key_rope, value, query_marks, key_marks):
    """Output [B, L, H*V] and base-2 log-sum-exp float32 [B, P, 2, L] of sizes that fill the hardware's."""
    batch, length, keys, pairs = *query_nope.shape[:2], key_nope.shape[1], plan.num_heads // 2
    N, V = query_nope.shape[2] // plan.num_heads, value.shape[2] // plan.num_heads
    rows, columns = plan.forward_block
    todo = visits(query_marks, key_marks, plan.forward_block, "query", plan.ordered)

    of_query = lambda b, p, t, query, key, flags: (b, query[b, t], p)  # noqa: E731
    of_key = lambda b, p, t, query, key, flags: (b, key[b, t], p)  # noqa: E731
    itemsize = value.dtype.itemsize
    seen = batch * plan.num_heads * seen_pairs(plan, length, keys)
    read = batch * pairs * todo.query.shape[1] * columns * (2 * N + 2 * V + LANES)
    out, log_sum = pl.pallas_call(
        functools.partial(_forward_kernel, scale=plan.scale * math.log2(math.e), chunk=math.gcd(plan.chunk, rows)),
        name="flash_mla_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, pairs, todo.query.shape[1] if plan.ordered else todo.steps),
            in_specs=[
                pl.BlockSpec((None, rows, 2 * N), of_query),
                pl.BlockSpec((None, rows, LANES), of_query),
                pl.BlockSpec((None, columns, 2 * N), of_key),
                pl.BlockSpec((None, columns, LANES), lambda b, p, t, query, key, flags: (b, key[b, t], 0)),
                pl.BlockSpec((None, columns, 2 * V), of_key),
                pl.BlockSpec((None, 8, rows), lambda b, p, t, query, key, flags: (b, 0, query[b, t])),
                pl.BlockSpec((None, 8, columns), lambda b, p, t, query, key, flags: (b, 0, key[b, t])),
            ],
            out_specs=[
                pl.BlockSpec((None, rows, 2 * V), of_query),
                pl.BlockSpec((None, None, 2, rows), lambda b, p, t, query, key, flags: (b, p, 0, query[b, t])),
            ],
            scratch_shapes=[
                pltpu.VMEM((2, rows, N + LANES), query_nope.dtype),
                pltpu.VMEM((2, V, columns), value.dtype),
                pltpu.VMEM((2, V, rows), jnp.float32),
                pltpu.VMEM((2, 1, rows), jnp.float32),
                pltpu.VMEM((2, 1, rows), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, length, plan.num_heads * V), value.dtype),
            jax.ShapeDtypeStruct((batch, pairs, 2, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * seen * (N + ROPE + V),
            transcendentals=seen,
            bytes_accessed=itemsize * (read + query_nope.size + query_rope.size + batch * length * plan.num_heads * V),
        ),
        interpret=plan.interpret,
    )(*todo[:3], query_nope, query_rope, key_nope, both(key_rope), value, eight(query_marks), eight(key_marks))
    return out, log_sum


def _forward_kernel(
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
    out,
    log_sum,
    query,
    value_columns,
    total_out,
    total,
    largest,
    *,
    scale,
    chunk,
):
    """One pair of heads, one block of queries [l], one of keys [s]; the accumulators hold [head, V, l]."""
    flag = flags[pl.program_id(0), pl.program_id(2)]
    N, V = query_nope.shape[1] // 2, value.shape[1] // 2
    nope, own = ([slice(head * size, (head + 1) * size) for head in range(2)] for size in (N, V))

    @pl.when(flag & FIRST != 0)
    def _():
        for head in range(2):
            query[head, :, :N] = query_nope[:, nope[head]]
            query[head, :, N:] = of_head(query_rope[...], head)
        total_out[...] = jnp.zeros_like(total_out)
        total[...] = jnp.zeros_like(total)
        largest[...] = jnp.full_like(largest, HIDDEN)

    def scores_of(head, part, visible):
        key = jnp.concatenate([key_nope[:, nope[head]], key_rope[...]], axis=1)
        scores = dot(key, query[head, part], (1, 1)) * scale
        return scores if visible is None else jnp.where(visible[:, part], scores, HIDDEN)

    def attend(head, part, scores):
        before = largest[head, :, part]
        now = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
        weights = jnp.exp2(scores - now)
        fade = jnp.exp2(before - now)
        largest[head, :, part] = now
        total[head, :, part] = total[head, :, part] * fade + jnp.sum(weights, axis=0, keepdims=True)
        new = dot(value_columns[head], weights.astype(value.dtype), (1, 0))
        total_out[head, :, part] = total_out[head, :, part] * fade + new

    def visit(visible):
        for head in range(2):
            # Through memory: the transpose of an operand is else made by the matrix unit, at twice the product's cost.
            value_columns[head] = value[:, own[head]].T
        # The next part's scores stand before this part's softmax, so that the matrix unit has work meanwhile.
        parts = [(head, slice(start, start + chunk)) for start in range(0, query.shape[1], chunk) for head in range(2)]
        coming = scores_of(*parts[0], visible)
        for this, following in zip(parts, [*parts[1:], None], strict=True):
            scores, coming = coming, None if following is None else scores_of(*following, visible)
            attend(*this, scores)

    @pl.when(flag & VISITED != 0)
    def _():
        masked = lambda: visit(visible_keys(query_marks[...], key_marks[...]))  # noqa: E731
        lax.cond(flag & PARTLY != 0, masked, lambda: visit(None))

    @pl.when(flag & LAST != 0)
    def _():
        for head in range(2):
            sees = largest[head] > HIDDEN / 2
            log_sum[pl.ds(head, 1), :] = jnp.where(sees, largest[head] + jnp.log2(total[head]), 0)
            mean = jnp.where(sees, total_out[head] / total[head], 0)
            out[:, own[head]] = mean.T.astype(out.dtype)
