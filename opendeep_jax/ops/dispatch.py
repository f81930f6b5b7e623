"""Tokens to their experts and back, dropless: sort the (token, choice) pairs by expert, multiply by groups, undo.

T tokens, K experts chosen per token, E experts, D model width, F expert width (f with the row of a bias), M rows of the
experts.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.fp8_matmul import fp8_grouped_matmul
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu
from opendeep_jax.config.schema import ExecutionConfig
from opendeep_jax.ops.activation import activated, gated
from opendeep_jax.ops.exchange_rows import CopySlots, copies, sums


class ExpertKind(NamedTuple):
    """Settings of an expert beside its weights."""

    precision: str = "default"
    """Precision, as in `ModelConfig.precision`."""
    bias: bool = False
    """The last row of each matrix is a bias: rows end with a 1, and so does what the down projection takes."""
    activation: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0
    """Clamp, as in `ops.activation.gated`."""


SWIGLU = ExpertKind()


def routed_experts(
    x: Float[Array, "T D"],
    indices: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    gate: Float[Array, "E D F"] | None,
    up: Float[Array, "E D F"],
    down: Float[Array, "E f D"],
    execution: ExecutionConfig | None = None,
    kind: ExpertKind = SWIGLU,
) -> Float[Array, "T D"]:
    """The weighted sum of each token's chosen SwiGLU experts, `sum_k w_k (silu(x G_k) * (x U_k)) D_k`, in x's dtype.

    The weight goes in before the down projection, where rows are narrow and its gradient needs no expert's output.
    `ops.exchange.exchanged_experts` is the same where the experts lie on several devices.

    Args:
        gate: None for experts without a gate, `activation(x U_k) D_k`.
        execution: `grouped_matmul` names the kernels' implementation; None for the platform's own.
        kind: precision, biases and activation.
    """
    order, inverse, group_sizes = checkpoint_name(sort_by_expert(indices, down.shape[0]), "routing")
    places = CopySlots(order // indices.shape[1], inverse.T)
    row_weights = weights.reshape(-1).at[order].get(unique_indices=True, mode="promise_in_bounds")
    rows = grouped_experts(copies(x, places), row_weights, gate, up, down, group_sizes, execution, kind)
    return sums(rows, places, x.shape[0])


def grouped_experts(
    rows: Float[Array, "M D"],
    row_weights: Float[Array, "M"],
    gate: Float[Array, "E D F"] | None,
    up: Float[Array, "E D F"],
    down: Float[Array, "E f D"],
    group_sizes: Int[Array, "E"],
    execution: ExecutionConfig | None = None,
    kind: ExpertKind = SWIGLU,
    expected_rows: int | None = None,
) -> Float[Array, "M D"]:
    """Rows sorted by expert through their own expert's SwiGLU, each times its weight; zeros beyond the groups.

    Args:
        row_weights: of any float dtype.
        gate, execution, kind: as for `routed_experts`.
        expected_rows: how many of the M rows are there when experts are balanced, for the kernels' cost; None for all.
    """
    implementation = (execution and execution.grouped_matmul) or None

    def multiply(lhs, rhs):
        if kind.precision == "fp8":
            return fp8_grouped_matmul(lhs, rhs, group_sizes)
        return grouped_matmul(lhs, rhs, group_sizes, implementation, expected_rows)

    if gate is None:
        up = checkpoint_name(multiply(rows, up), "expert_up")
        return multiply(activated(kind.activation, up) * row_weights[:, None].astype(rows.dtype), down)
    if kind == SWIGLU:  # what the kernels have in one piece
        hidden = grouped_swiglu(rows, gate, up, group_sizes, row_weights, implementation, expected_rows)
        return multiply(hidden, down)
    gate, up = checkpoint_name(multiply(rows, gate), "expert_gate"), checkpoint_name(multiply(rows, up), "expert_up")
    row_weights = row_weights[:, None].astype(rows.dtype)
    hidden = gated(kind.activation, gate, up, kind.alpha, kind.limit) * row_weights
    return multiply(jnp.concatenate([hidden, row_weights], axis=1) if kind.bias else hidden, down)


def sort_by_expert(
    indices: Int[Array, "T K"], num_experts: int
) -> tuple[Int[Array, "T*K"], Int[Array, "T K"], Int[Array, "E"]]:
    """The stable order of all choices by expert, the place of each choice in it, and the choices of each expert."""
    flat = indices.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    group_sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return order, inverse.reshape(indices.shape), group_sizes
