"""Grouped matmul whose work follows the rows that are there, in plain JAX: for CPUs.

Groups are taken a few at a time, those of like size together. A loop over blocks of rows multiplies one block of each
of them in one batched matmul, as often as the largest of them needs: weights are read once per group, and the batch
is what lets the CPU backend use all cores. Loop lengths depend on the data, so the derivatives are written out.

M rows, G groups, K inner size, N output size, J batches of groups, B groups in a batch, R rows in a block.
"""

import os

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul import reference
from kernels_pallas.target import widened

BATCH = min(max(os.cpu_count() or 1, 2), 8)
"""Groups multiplied at a time: a core for each, and no more than fit the caches."""


def _block_rows(num_rows, num_groups):
    """Rows R of a block: a power of two from 32 to 256, about a quarter of a group, so that little is padding."""
    quarter = 1 << max((num_rows // num_groups // 4).bit_length() - 1, 0)
    return min(max(quarter, 32), 256, num_rows)


def grouped_matmul(lhs, rhs, group_sizes, expected_rows=None):
    """See `api.grouped_matmul`."""
    return _grouped_matmul(lhs, rhs, group_sizes)


def grouped_swiglu(lhs, gate, up, group_sizes, row_weights=None, expected_rows=None):
    """See `api.grouped_swiglu`: two grouped matmuls. What follows them XLA fuses, and recomputes in a backward pass."""
    return reference.swiglu_of(_grouped_matmul, lhs, gate, up, group_sizes, row_weights)


@jax.custom_vjp
def _grouped_matmul(lhs, rhs, group_sizes):
    return _rows_by_groups("brk,bkn->brn", lhs, rhs, group_sizes)


def _forward(lhs, rhs, group_sizes):
    return _grouped_matmul(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(saved, cotangent):
    lhs, rhs, group_sizes = saved
    d_lhs = _rows_by_groups("brn,bkn->brk", cotangent, rhs, group_sizes)
    return d_lhs, _groups_from_rows(lhs, cotangent, group_sizes).astype(rhs.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


def _batches(group_sizes):
    """Groups, their first rows and their sizes, each [J, B]. What fills the last batch up has size 0."""
    batch = min(BATCH, group_sizes.shape[0])
    order = jnp.argsort(group_sizes)
    columns = order, (jnp.cumsum(group_sizes) - group_sizes)[order], group_sizes[order]
    fill = -group_sizes.shape[0] % batch
    return [jnp.pad(column, (0, fill)).reshape(-1, batch) for column in columns]


def _take(x, starts, rows):
    """Blocks [B, R, …] of x from each start."""
    return jnp.stack([lax.dynamic_slice_in_dim(x, start, rows) for start in starts])


def _present(first, begins, ends, rows):
    """True [B, R, 1] for the rows of blocks from `first` that lie from `begins` to before `ends`."""
    index = (first[:, None] + jnp.arange(rows))[..., None]
    return (index >= begins[:, None, None]) & (index < ends[:, None, None])


def _rows_by_groups(equation, x, weights, group_sizes):
    """Each row of x [M, ·] times its group's weights [G, ·, ·], zeros beyond the groups."""
    rows = _block_rows(x.shape[0], weights.shape[0])
    groups, starts, sizes = _batches(group_sizes)
    width = weights.shape[2] if equation.endswith("n") else weights.shape[1]

    def batch(j, out):
        batch_weights = weights[groups[j]]

        def block(state):
            offset, out = state
            # The last block of all begins early enough to end with x; it leaves alone what is not its own.
            first = jnp.minimum(starts[j] + offset, x.shape[0] - rows)
            present = _present(first, starts[j] + offset, starts[j] + sizes[j], rows)
            mine = widened(_take(x, first, rows), batch_weights)
            y = jnp.einsum(equation, *mine, preferred_element_type=jnp.float32)
            for b in range(groups.shape[1]):
                kept = lax.dynamic_slice_in_dim(out, first[b], rows)
                merged = jnp.where(present[b], y[b], kept)
                out = lax.dynamic_update_slice_in_dim(out, merged, first[b], 0)
            return offset + rows, out

        return lax.while_loop(lambda state: state[0] < jnp.max(sizes[j]), block, (0, out))[1]

    # Rounded once at the end: a CPU would convert all of a narrower array for each block written into it.
    return lax.fori_loop(0, groups.shape[0], batch, jnp.zeros((x.shape[0], width), jnp.float32)).astype(x.dtype)


def _groups_from_rows(x, y, group_sizes):
    """The sum over each group's rows of the outer products of x [M, K] and y [M, N]: float32 [G, K, N]."""
    rows = _block_rows(x.shape[0], group_sizes.shape[0])
    groups, starts, sizes = _batches(group_sizes)

    def batch(j, out):
        def block(state):
            offset, total = state
            first = jnp.minimum(starts[j] + offset, x.shape[0] - rows)
            present = _present(first, starts[j] + offset, starts[j] + sizes[j], rows)
            # Both, for beyond the groups either may hold anything.
            mine = widened(*(jnp.where(present, _take(operand, first, rows), 0) for operand in (x, y)))
            product = jnp.einsum("brk,brn->bkn", *mine, preferred_element_type=jnp.float32)
            return offset + rows, total + product

        total = jnp.zeros((groups.shape[1], x.shape[1], y.shape[1]), jnp.float32)
        total = lax.while_loop(lambda state: state[0] < jnp.max(sizes[j]), block, (0, total))[1]
        for b in range(groups.shape[1]):
            # What fills the last batch up names group 0 again, with nothing to add.
            fresh = (j * groups.shape[1] + b) < group_sizes.shape[0]
            kept = lax.dynamic_index_in_dim(out, groups[j, b], keepdims=False)
            out = lax.dynamic_update_index_in_dim(out, jnp.where(fresh, total[b], kept), groups[j, b], 0)
        return out

    out = jnp.zeros((group_sizes.shape[0], x.shape[1], y.shape[1]), jnp.float32)
    return lax.fori_loop(0, groups.shape[0], batch, out)
