"""Tokens that an exchange's buffers have no room for: chunk by chunk, so that no choice of experts is ever dropped.

Buffers are sized for experts that are nearly balanced, and these loops then do nothing. Otherwise a round takes one
chunk of tokens from every device, gathers them everywhere, and each device runs its experts on those that chose them,
a block of one expert's rows at a time. How many rounds there are depends on the data, so the derivative is written
out; it begins with the gradients of what did fit and adds to them in place.

T tokens of a device, N = n T tokens of all, n devices, K experts chosen per token, e experts of a device, D model
width, F expert width, C tokens of a device in a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Int

from opendeep_jax.config.schema import ExecutionConfig
from opendeep_jax.ops.dispatch import ExpertKind, grouped_experts
from opendeep_jax.ops.exchange_rows import NOWHERE
from opendeep_jax.parallel.collectives import all_gather, axis_index, axis_size, psum_scatter

AXIS = "expert"
"""The mesh axis that the experts are divided over."""
CHUNKS = 32
"""Chunks that a device's tokens are divided into."""
BLOCK = 256
"""Rows of one expert multiplied at a time."""


def chunk_size(tokens: int) -> int:
    """Tokens C of each device in a chunk; the last chunk may have fewer."""
    return -(-tokens // CHUNKS)


def sorted_choices(
    choices: Int[Array, "K N"], place: Int[Array, "N"], num_rows: int, local_experts: int
) -> tuple[Int[Array, "K*N"], Int[Array, "K*N"], Int[Array, "e"]]:
    """The choices of this device's experts, by expert and then by their token's row.

    Args:
        choices: expert of each choice, of all E.
        place: row of each token that chose any of this device's experts, from 0 to `num_rows` - 1.
    Returns:
        `expert * num_rows + row`, NOWHERE for the other choices, which come last; the choices' places in `choices`; how
        many there are of each expert.
    """
    local = choices - axis_index(AXIS) * local_experts
    here = (local >= 0) & (local < local_experts)
    key = jnp.where(here, local * num_rows + place, NOWHERE).reshape(-1)
    key, choice = lax.sort((key, jnp.arange(key.size, dtype=jnp.int32)), num_keys=1, is_stable=False)
    return key, choice, jnp.sum(local == jnp.arange(local_experts)[:, None, None], axis=(1, 2), dtype=jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_overflow(main, kind: ExpertKind, arrays, choices: Int[Array, "K N"], fitting: Int[Array, ""]):
    """`main(arrays, choices)` of the first `fitting` tokens of every device, and of the others the same by rounds.

    Args:
        main: takes arrays and choices and gives [T, D], zeros for tokens that chose nothing.
        kind: the experts' kind, biases and activation.
        arrays: x [T, D] of this device, weights [K, N] of all tokens, and this device's gate, up [e, D, F] and down
            [e, F, D]; differentiable in these.
        choices: the experts of all tokens.
        fitting: a multiple of `chunk_size(T)`, or T; the same on all devices of the axis.
    """
    return _add_rounds(main(arrays, _fitting(choices, fitting)), kind, arrays, choices, fitting)


def _forward(main, kind, arrays, choices, fitting):
    first, pull = jax.vjp(lambda arrays: main(arrays, _fitting(choices, fitting)), arrays)
    return _add_rounds(first, kind, arrays, choices, fitting), (pull, arrays, choices, fitting)


def _backward(main, kind, saved, cotangent):
    pull, arrays, choices, fitting = saved
    gradients = _add_round_gradients(pull(cotangent)[0], cotangent, kind, arrays, choices, fitting)
    return gradients, None, None


with_overflow.defvjp(_forward, _backward)


def _fitting(choices, fitting):
    tokens = choices.shape[1] // axis_size(AXIS)
    return jnp.where(jnp.tile(jnp.arange(tokens) < fitting, axis_size(AXIS)), choices, NOWHERE)


def _add_rounds(out, kind, arrays, choices, fitting):
    x, weights, *kernels = arrays

    def round_(r, out):
        start, rows, (key, choice), chunk_weights = _chunk(r, x, weights, choices, kernels[0].shape[0])

        def block(begin, summed):
            source, chosen, taken, mine = _block(begin, key, choice, rows.shape[0], chunk_weights, kernels)
            y = _experts(kind, taken)(rows[source], *mine)
            return summed.at[source].add(y.astype(summed.dtype))

        summed = _blocks(block, key, rows.shape[0], jnp.zeros(rows.shape, jnp.float32))
        return _add_slice(out, psum_scatter(summed.astype(out.dtype), AXIS, 0), start, 0)

    return lax.fori_loop(fitting // chunk_size(x.shape[0]), _rounds(x), round_, out)


def _add_round_gradients(gradients, cotangent, kind, arrays, choices, fitting):
    x, weights, *kernels = arrays

    def round_(r, gradients):
        d_x, d_weights, *d_kernels = gradients
        start, rows, (key, choice), chunk_weights = _chunk(r, x, weights, choices, kernels[0].shape[0])
        d_rows = all_gather(lax.dynamic_slice_in_dim(cotangent, start, chunk_size(x.shape[0])), AXIS, 0)

        def block(begin, sums):
            d_chunk, d_chunk_weights, *d_kernels = sums
            source, chosen, taken, mine = _block(begin, key, choice, rows.shape[0], chunk_weights, kernels)
            pull = jax.vjp(_experts(kind, taken), rows[source], *mine)[1]
            d_mine, d_row_weights, *d_slices = pull(d_rows[source])
            expert = key[begin] // rows.shape[0]
            return (
                d_chunk.at[source].add(d_mine.astype(d_chunk.dtype)),
                d_chunk_weights.at[chosen].add(d_row_weights, mode="drop"),
                *(
                    _add_slice(d, _row_major(more[None]), expert, 0)
                    for d, more in zip(d_kernels, d_slices, strict=True)
                ),
            )

        start_sums = (jnp.zeros(rows.shape, jnp.float32), jnp.zeros_like(chunk_weights), *d_kernels)
        d_chunk, d_chunk_weights, *d_kernels = _blocks(block, key, rows.shape[0], start_sums)
        d_x = _add_slice(d_x, psum_scatter(d_chunk.astype(d_x.dtype), AXIS, 0), start, 0)
        by_device = d_weights.reshape(d_weights.shape[0], axis_size(AXIS), -1)
        d_chunk_weights = d_chunk_weights.reshape(*by_device.shape[:2], -1)
        d_weights = _add_slice(by_device, d_chunk_weights, start, 2).reshape(d_weights.shape)
        return d_x, d_weights, *d_kernels

    return lax.fori_loop(fitting // chunk_size(x.shape[0]), _rounds(x), round_, tuple(gradients))


def _rounds(x):
    return -(-x.shape[0] // chunk_size(x.shape[0]))


def _chunk(r, x, weights, choices, local_experts):
    """Return the start of chunk r, its tokens of all devices [n C, D], their sorted choices here, and weights [K n C].

    The last chunk starts early enough to be whole; tokens of the one before choose nothing in it.
    """
    tokens, n = x.shape[0], axis_size(AXIS)
    chunk = chunk_size(tokens)
    start = jnp.minimum(r * chunk, tokens - chunk)

    def part(array):
        by_device = array.reshape(array.shape[0], n, tokens)
        return lax.dynamic_slice_in_dim(by_device, start, chunk, axis=2)

    fresh = start + jnp.arange(chunk) >= r * chunk
    chosen = jnp.where(fresh, part(choices), NOWHERE).reshape(choices.shape[0], -1)
    rows = all_gather(lax.dynamic_slice_in_dim(x, start, chunk), AXIS, 0)
    key, choice, _ = sorted_choices(chosen, jnp.arange(n * chunk, dtype=jnp.int32), n * chunk, local_experts)
    return start, rows, (jnp.pad(key, (0, BLOCK), constant_values=NOWHERE), choice), part(weights).reshape(-1)


def _blocks(block, key, num_rows, state):
    """`state = block(begin, state)` for each block of the sorted choices: BLOCK of one expert, or what there is."""

    def step(carry):
        begin, state = carry
        same = lax.dynamic_slice_in_dim(key, begin, BLOCK) // num_rows == key[begin] // num_rows
        return begin + jnp.sum(same, dtype=jnp.int32), block(begin, state)

    return lax.while_loop(lambda carry: key[carry[0]] < NOWHERE, step, (jnp.int32(0), state))[1]


def _block(begin, key, choice, num_rows, weights, kernels):
    """The row of each choice in a block, its place among all, how many there are, and what the experts need."""
    expert = key[begin] // num_rows
    keys = lax.dynamic_slice_in_dim(key, begin, BLOCK)
    mine = keys // num_rows == expert
    chosen = jnp.where(mine, jnp.pad(choice, (0, BLOCK))[begin + jnp.arange(BLOCK)], weights.size)
    row_weights = weights.at[chosen].get(mode="fill", fill_value=0)
    slices = (lax.dynamic_index_in_dim(kernel, expert, keepdims=False) for kernel in kernels)
    return jnp.where(mine, keys % num_rows, 0), chosen, jnp.sum(mine, dtype=jnp.int32), (row_weights, *slices)


def _experts(kind, rows):
    """One expert on the first `rows` rows of a block; zeros beyond them."""
    execution = ExecutionConfig(grouped_matmul="reference")

    def run(block, row_weights, gate, up, down):
        kernels = gate[None], up[None], down[None]
        return grouped_experts(block, row_weights, *kernels, rows[None], execution, kind, expected_rows=0)

    return run


def _row_major(x):
    """`x` as it is. Without this XLA lays the loop's gradients out for the loop and copies them there and back."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _add_slice(x, more, start, axis):
    """`x` with `more` added to its part from `start`."""
    kept = lax.dynamic_slice_in_dim(x, start, more.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(x, kept + more.astype(x.dtype), start, axis)
