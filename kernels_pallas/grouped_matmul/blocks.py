"""Grouped matmul whose work follows the rows that are there, in plain JAX: for CPUs.

One loop over blocks of rows, each of one group: a block is cut out, multiplied by its group's matrix on all cores,
and put in its place. How many blocks there are depends on the data, so the derivatives are written out.

M rows, G groups, K inner size, N output size, R rows in a block, V blocks at most.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from kernels_pallas.grouped_matmul import reference
from kernels_pallas.target import widened


def grouped_matmul(lhs, rhs, group_sizes, expected_rows=None):
    """See `api.grouped_matmul`."""
    return _grouped_matmul(lhs, rhs, group_sizes)


def grouped_swiglu(lhs, gate, up, group_sizes, row_weights=None, expected_rows=None):
    """See `api.grouped_swiglu`: two grouped matmuls. What follows them XLA fuses, and recomputes in a backward pass."""
    return reference.swiglu_of(_grouped_matmul, lhs, gate, up, group_sizes, row_weights)


@jax.custom_vjp
def _grouped_matmul(lhs, rhs, group_sizes):
    return _rows_by_groups("rk,kn->rn", lhs, rhs, group_sizes)


def _forward(lhs, rhs, group_sizes):
    return _grouped_matmul(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(saved, cotangent):
    lhs, rhs, group_sizes = saved
    d_lhs = _rows_by_groups("rn,kn->rk", cotangent, rhs, group_sizes)
    return d_lhs, _groups_from_rows(lhs, cotangent, group_sizes).astype(rhs.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


class RowBlocks(NamedTuple):
    """The blocks of all groups, one after the other."""

    rows: int
    """R, rows in a block: a power of two from 32 to 256, about a quarter of a group, so that little is padding."""
    count: Int[Array, ""]
    """Number of the V entries that are blocks."""
    group: Int[Array, "V"]
    first: Int[Array, "V"]
    """First row; the last block begins early enough to end with the rows."""
    begin: Int[Array, "V"]
    end: Int[Array, "V"]
    """End (exclusive) of the block's rows, which start at `begin`."""

    def own(self, v) -> Array:
        """True [R, 1] for block v's own rows."""
        index = self.first[v] + jnp.arange(self.rows)[:, None]
        return (index >= self.begin[v]) & (index < self.end[v])

    def cut(self, x: Array, v) -> Array:
        """Block v [R, …] of x [M, …]."""
        return lax.dynamic_slice_in_dim(x, self.first[v], self.rows)


def _blocks(group_sizes, num_rows) -> RowBlocks:
    groups = group_sizes.shape[0]
    quarter = 1 << max((num_rows // groups // 4).bit_length() - 1, 0)
    rows = min(max(quarter, 32), 256, num_rows)
    ends = jnp.cumsum(group_sizes)
    count = -(-group_sizes // max(rows, 1))
    until = jnp.cumsum(count)
    v = jnp.arange(num_rows // max(rows, 1) + groups, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(v[:, None] >= until, axis=1, dtype=jnp.int32), groups - 1)
    begin = (ends - group_sizes)[group] + (v - (until - count)[group]) * rows
    return RowBlocks(rows, until[-1], group, jnp.minimum(begin, num_rows - rows), begin, ends[group])


def _update(x, value, index):
    return lax.dynamic_update_slice_in_dim(x, value, index, 0)


@functools.partial(jax.jit, static_argnums=0)
def _rows_by_groups(equation, x, weights, group_sizes):
    """Each row of x [M, ·] times its group's weights [G, ·, ·], zeros beyond the groups."""
    blocks = _blocks(group_sizes, x.shape[0])
    width = weights.shape[2 if equation.endswith("n") else 1]

    def multiply(v, out):
        matrix = lax.dynamic_index_in_dim(weights, blocks.group[v], keepdims=False)
        y = jnp.einsum(equation, *widened(blocks.cut(x, v), matrix), preferred_element_type=jnp.float32)
        return _update(out, jnp.where(blocks.own(v), y, blocks.cut(out, v)), blocks.first[v])

    # Rounded once at the end: a CPU would convert all of a narrower array for each block written into it.
    return lax.fori_loop(0, blocks.count, multiply, jnp.zeros((x.shape[0], width), jnp.float32)).astype(x.dtype)


@jax.jit
def _groups_from_rows(x, y, group_sizes):
    """The sum over each group's rows of the outer products of x [M, K] and y [M, N]: float32 [G, K, N]."""
    blocks = _blocks(group_sizes, x.shape[0])

    def add(v, out):
        # Both, for beyond the groups either may hold anything.
        own = widened(*(jnp.where(blocks.own(v), blocks.cut(operand, v), 0) for operand in (x, y)))
        product = jnp.einsum("rk,rn->kn", *own, preferred_element_type=jnp.float32)
        total = lax.dynamic_slice_in_dim(out, blocks.group[v], 1)
        return _update(out, total + product, blocks.group[v])

    shape = group_sizes.shape[0], x.shape[1], y.shape[1]
    return lax.fori_loop(0, blocks.count, add, jnp.zeros(shape, jnp.float32))
