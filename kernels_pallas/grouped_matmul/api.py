"""Grouped matmul: rows sorted by group meet their own group's weights.

M rows, G groups, K inner size, N output size.
"""

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import blocks, gpu, reference, tpu
from kernels_pallas.target import run

ANYWHERE = ("cpu", "tpu", "gpu")


def _ragged_dot(lhs, rhs, group_sizes, expected_rows=None):
    return jax.lax.ragged_dot(lhs, rhs, group_sizes)


def _ragged_dot_swiglu(lhs, gate, up, group_sizes, row_weights=None, expected_rows=None):
    return reference.swiglu_of(_ragged_dot, lhs, gate, up, group_sizes, row_weights)


IMPLEMENTATIONS = {
    "mosaic": (tpu.grouped_matmul, ("tpu",)),
    "triton": (gpu.grouped_matmul, ("gpu",)),
    "blocks": (blocks.grouped_matmul, ANYWHERE),
    "ragged_dot": (_ragged_dot, ANYWHERE),
    "reference": (reference.grouped_matmul, ANYWHERE),
}
"""Each implementation and the platforms that have it, the preferred first. `ragged_dot` is XLA's own: on a CPU and a
GPU it multiplies every row by every group, and it promises nothing about rows beyond the groups that aren't finite."""

SWIGLU_IMPLEMENTATIONS = {
    "mosaic": (tpu.grouped_swiglu, ("tpu",)),
    "triton": (gpu.grouped_swiglu, ("gpu",)),
    "blocks": (blocks.grouped_swiglu, ANYWHERE),
    "ragged_dot": (_ragged_dot_swiglu, ANYWHERE),
    "reference": (reference.grouped_swiglu, ANYWHERE),
}
"""The same for `grouped_swiglu`, by the same names."""


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    implementation: str | None = None,
    expected_rows: int | None = None,
) -> Float[Array, "M N"]:
    """Multiply consecutive row groups of `lhs` by their own matrix: row i of group g gives `lhs[i] @ rhs[g]`.

    Differentiable in lhs and rhs. The work follows the rows that the groups have, not M.

    Args:
        lhs: rows sorted by group; beyond the groups there may be anything, NaN too.
        rhs: one matrix per group.
        group_sizes: int32 rows in each group, any of them 0; rows beyond their sum give zeros.
        implementation: a name in IMPLEMENTATIONS; None takes the first that the platform has
            and that takes these operands.
        expected_rows: what the sum of the group sizes will be about, for the compiler's and the plan's estimates of
            cost; None: M.
    Raises:
        ValueError: for an implementation of another name.
        NotImplementedError: for a named implementation that the platform lacks, or operands that it doesn't take.
    """
    operands = lhs, rhs, group_sizes
    return run("grouped_matmul", IMPLEMENTATIONS, implementation, *operands, expected_rows=expected_rows)


def grouped_swiglu(
    lhs: Float[Array, "M K"],
    gate: Float[Array, "G K N"],
    up: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    row_weights: Float[Array, "M"] | None = None,
    implementation: str | None = None,
    expected_rows: int | None = None,
) -> Float[Array, "M N"]:
    """`silu(lhs @ gate) * (lhs @ up) * row_weights[:, None]` with grouped matmuls, in lhs's dtype.

    Differentiable in lhs, gate, up and row_weights. What the backward pass needs of the two products is named
    "expert_gate" and "expert_up" (`jax.ad_checkpoint.checkpoint_name`), so that remat can keep or recompute it.

    Args:
        gate, up: one matrix of each per group.
        row_weights: a factor on each row, in any floating dtype; None: 1.
        lhs, group_sizes, implementation, expected_rows: as for `grouped_matmul`.
    Raises:
        ValueError, NotImplementedError: as `grouped_matmul`.
    """
    operands = lhs, gate, up, group_sizes, row_weights
    return run("grouped_swiglu", SWIGLU_IMPLEMENTATIONS, implementation, *operands, expected_rows=expected_rows)
