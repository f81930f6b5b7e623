"""Grouped matmul: rows sorted by group meet their own group's weights.

M rows, G groups, K inner size, N output size.
"""

from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import blocks, reference

Implementation = Literal["blocks", "ragged_dot", "reference"]

IMPLEMENTATIONS = {
    "blocks": blocks.grouped_matmul,
    "ragged_dot": jax.lax.ragged_dot,
    "reference": reference.grouped_matmul,
}


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """Multiplies consecutive row groups of `lhs` by their own matrix: row i of group g gives `lhs[i] @ rhs[g]`.

    Args:
        lhs: rows sorted by group.
        rhs: one matrix per group.
        group_sizes: int32 rows in each group, any of them 0; rows beyond their sum give zeros.
        implementation: `blocks` (work proportional to the rows present, for CPUs), `ragged_dot` (XLA's own, for TPUs
            and GPUs; on a CPU it multiplies every row by every group), `reference` (a dense mask); None picks by
            platform.
    Raises:
        ValueError: for an implementation of another name.
    """
    if implementation is None:
        implementation = "blocks" if jax.default_backend() == "cpu" else "ragged_dot"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation = {implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}.")
    return IMPLEMENTATIONS[implementation](lhs, rhs, group_sizes)
