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
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.flash_mla.tpu_backward import backward
from kernels_pallas.flash_mla.tpu_forward import forward
from kernels_pallas.flash_mla.tpu_parts import LANES, ROPE, Plan
from kernels_pallas.target import chip


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
    """See `api.flash_mla`. Sizes that don't fill the hardware's are padded; rotated parts above 64 aren't there.

    Args:
        forward_block, backward_block: queries and keys of a block, multiples of 128.
        chunk: queries whose scores the forward kernel makes at a time, a multiple of 128.
        wide: the matrix unit is wider than a head; None: as the chip's is.
    """
    length, keys, rope = query_nope.shape[1], key_nope.shape[1], key_rope.shape[-1]
    if rope > ROPE:
        raise NotImplementedError(f"flash_mla: a rotated size of {rope}: the TPU kernel takes at most {ROPE}.")
    ordered = query_order is None
    if ordered:
        query_order = key_order = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), query_segments.shape)
    forward_block, backward_block = (
        tuple(min(size, _up(n, LANES)) for size, n in zip(block or (512, 512), (length, keys), strict=True))
        for block in (forward_block, backward_block)
    )
    rows, columns = (_up(n, math.lcm(forward_block[i], backward_block[i])) for i, n in enumerate((length, keys)))
    heads = _up(num_heads, 2)
    nope, width = (_up(x.shape[-1] // num_heads, LANES) for x in (query_nope, value))
    fill = functools.partial(_fill_heads, num_heads=num_heads, heads=heads)
    queries = fill(query_nope, rows=rows, size=nope), fill(query_rope, rows=rows, size=ROPE)
    key_rope = _fill(key_rope, columns, ROPE)
    keys_values = fill(key_nope, rows=columns, size=nope), key_rope, fill(value, rows=columns, size=width)
    # What is filled up belongs to segments of its own.
    query_marks = jnp.stack([_fill_row(query_order, rows, -2), _fill_row(query_segments, rows, -2)], axis=1)
    key_marks = jnp.stack([_fill_row(key_order, columns, -1), _fill_row(key_segments, columns, -1)], axis=1)

    wide = chip() not in ("v5e", "v5p") if wide is None else wide
    plan = Plan(heads, scale, ordered, forward_block, backward_block, chunk or 256, wide, interpret)
    out = _attention(plan, *queries, *keys_values, query_marks, key_marks)
    if out.shape[1:] == (length, value.shape[-1]):
        return out
    out = out.reshape(*out.shape[:2], heads, width)[:, :length, :num_heads, : value.shape[-1] // num_heads]
    return out.reshape(*out.shape[:2], -1)


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
