"""Training attention on TPUs, through Mosaic: one kernel forward, one backward.

Scores are computed with keys along the rows and queries along the columns: softmax then reduces down the rows, which
needs no exchange between lanes, and in every product that leaves the scores the head size is what streams through the
matrix unit, so that 64, 128 and 192 all fill it. The rotated parts of two heads share one 128-wide column block, so a
step treats two heads, and the matrix unit works on one while the vector unit works on the other.

Only blocks that meet are visited (`visits.py`). Departs from Dao et al. 2022 in making d_query, d_key and d_value in
one pass: one head pair's d_query stays in VMEM while the blocks of keys go by.

B rows, L query length, S key length, H heads, P = H / 2 head pairs, N unrotated size, R = 64 rotated size, V value
size, l queries and s keys of a block, T steps.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.fitting import ON_TPU, check_dtypes, fit
from kernels_pallas.flash_mla.tpu_backward import backward
from kernels_pallas.flash_mla.tpu_forward import forward
from kernels_pallas.flash_mla.tpu_parts import LANES, ROPE, VMEM_LIMIT, CallPlan, backward_memory, forward_memory
from kernels_pallas.target import on_chip

LONGEST = (8192, 16384), (4096, 16384), (4096, 8192), (2048, 8192), (2048, 2048), (512, 2048)
"""Queries and keys of one call of the backward kernel."""


def flash_mla(
    query_nope,
    query_rope,
    key_nope,
    key_rope,
    value,
    query_segments,
    key_segments,
    query_order,
    key_order,
    *,
    num_heads,
    scale,
    forward_block=None,
    backward_block=None,
    chunk=None,
    wide=None,
    interpret=False,
):
    """See `api.flash_mla`. Sizes that don't fill the hardware's are padded.

    Raises:
        NotImplementedError: for rotated parts above 64, operands that are not bfloat16 or float32, or not of one dtype,
            and heads too wide for the smallest blocks.

    Args:
        forward_block, backward_block: queries and keys of a block, multiples of 128.
        chunk: queries whose scores the forward kernel makes at a time, a multiple of 128.
        wide: the matrix unit is wider than a head; None: as the chip's is.
    """
    length, keys, rope = query_nope.shape[1], key_nope.shape[1], key_rope.shape[-1]
    if rope > ROPE:
        raise NotImplementedError(f"flash_mla: a rotated size of {rope}: the TPU kernel takes at most {ROPE}.")
    check_dtypes("flash_mla", ON_TPU, query_nope, query_rope, key_nope, key_rope, value)
    ordered = query_order is None
    if ordered:
        query_order = key_order = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), query_segments.shape)
    nope, width = (_up(x.shape[-1] // num_heads, LANES) for x in (query_nope, value))
    found = fit_blocks((length, keys), nope, width, value.dtype.itemsize, forward_block, backward_block)
    forward_block, backward_block, longest = found
    rows, columns = (_up(n, math.lcm(forward_block[i], backward_block[i])) for i, n in enumerate((length, keys)))
    heads = _up(num_heads, 2)
    fill = functools.partial(_fill_heads, num_heads=num_heads, heads=heads)
    queries = fill(query_nope, rows=rows, size=nope), fill(query_rope, rows=rows, size=ROPE)
    key_rope = _fill(key_rope, columns, ROPE)
    keys_values = fill(key_nope, rows=columns, size=nope), key_rope, fill(value, rows=columns, size=width)
    # What is filled up belongs to segments of its own.
    query_marks = jnp.stack([_fill_row(query_order, rows, -2), _fill_row(query_segments, rows, -2)], axis=1)
    key_marks = jnp.stack([_fill_row(key_order, columns, -1), _fill_row(key_segments, columns, -1)], axis=1)

    wide = on_chip("tpu").matrix > LANES if wide is None else wide
    plan = CallPlan(heads, scale, ordered, forward_block, backward_block, longest, chunk or 256, wide, interpret)
    out = _attention(plan, *queries, *keys_values, query_marks, key_marks)
    if out.shape[1:] == (length, value.shape[-1]):
        return out
    out = out.reshape(*out.shape[:2], heads, width)[:, :length, :num_heads, : value.shape[-1] // num_heads]
    return out.reshape(*out.shape[:2], -1)


def fit_blocks(
    lengths: tuple[int, int],
    nope: int,
    width: int,
    itemsize: int,
    forward_block: tuple[int, int] | None = None,
    backward_block: tuple[int, int] | None = None,
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Queries and keys of a forward and a backward block, and of one call of the backward kernel, that fit VMEM.

    Args:
        lengths: of queries and keys.
        nope, width: columns of a head, multiples of 128.
        forward_block, backward_block: what is asked for instead.
    Raises:
        NotImplementedError: where heads are too wide for the smallest blocks.
    """

    def blocks(wanted):
        sizes = [wanted] if wanted else [(512, 512), (256, 256), (128, 128)]
        return [tuple(min(size, _up(n, LANES)) for size, n in zip(block, lengths, strict=True)) for block in sizes]

    def held(call):
        longest, block = call
        padded = (
            _up(n, math.lcm(*sizes)) for n, sizes in zip(lengths, zip(forward_block, block, strict=True), strict=True)
        )
        return backward_memory(block, tuple(map(min, longest, padded)), nope, width, itemsize)

    forward_needs = functools.partial(forward_memory, nope=nope, width=width, itemsize=itemsize)
    forward_block = fit("flash_mla", blocks(forward_block), forward_needs, VMEM_LIMIT, "vector memory")
    calls = itertools.product(LONGEST, blocks(backward_block))
    longest, backward_block = fit("flash_mla", calls, held, VMEM_LIMIT, "vector memory")
    return forward_block, backward_block, longest


def _up(size, multiple):
    return -(-size // multiple) * multiple


def _fill(x, rows, size):
    """x [B, ·, ·] with zeros to [B, rows, size]."""
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, size - x.shape[2])))


def _fill_row(x, length, value):
    return jnp.pad(x.astype(jnp.int32), ((0, 0), (0, length - x.shape[1])), constant_values=value)


def _fill_heads(x, *, num_heads, heads, rows, size):
    """x [B, ·, num_heads * ·] with zeros to [B, rows, heads * size]."""
    batch, length, width = x.shape
    own = width // num_heads
    if (heads, size) != (num_heads, own):
        x = x.reshape(batch, length, num_heads, own)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, heads - num_heads), (0, size - own))).reshape(batch, length, -1)
    return _fill(x, rows, heads * size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan, query_nope, query_rope, key_nope, key_rope, value, query_marks, key_marks):
    return _forward(plan, query_nope, query_rope, key_nope, key_rope, value, query_marks, key_marks)[0]


def _forward(plan, query_nope, query_rope, key_nope, key_rope, value, query_marks, key_marks):
    arguments = query_nope, query_rope, key_nope, key_rope, value, query_marks, key_marks
    out, log_sum = forward(plan, *arguments)
    # Named here, not by the caller: these very arrays are what the backward pass needs.
    out, log_sum = (checkpoint_name(x, "attention_output") for x in (out, log_sum))
    return out, (*arguments, out, log_sum)


def _backward(plan, saved, d_out):
    return *backward(plan, *saved, d_out), None, None


_attention.defvjp(_forward, _backward)
