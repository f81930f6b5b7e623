"""Tokens to their experts and back, dropless: sort the (token, choice) pairs by expert, multiply by groups, undo.

T tokens, K experts chosen per token, E experts, D model width, F expert width.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import grouped_matmul


def routed_experts(
    x: Float[Array, "T D"],
    indices: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "T D"]:
    """The weighted sum of each token's chosen SwiGLU experts, `sum_k w_k (silu(x G_k) * (x U_k)) D_k`, in x's dtype.

    The weight goes in before the down projection, where rows are narrow and its gradient needs no expert's output.
    """
    order, inverse, group_sizes = checkpoint_name(sort_by_expert(indices, gate.shape[0]), "routing")
    rows = scatter_to_experts(x, order, inverse)
    gated = checkpoint_name(grouped_matmul(rows, gate, group_sizes), "expert_gate")
    upped = checkpoint_name(grouped_matmul(rows, up, group_sizes), "expert_up")
    hidden = jax.nn.silu(gated) * upped * weights.reshape(-1, 1)[order].astype(x.dtype)
    return gather_from_experts(grouped_matmul(hidden, down, group_sizes), order, inverse)


def sort_by_expert(
    indices: Int[Array, "T K"], num_experts: int
) -> tuple[Int[Array, "T*K"], Int[Array, "T K"], Int[Array, "E"]]:
    """The stable order of all choices by expert, the place of each choice in it, and the choices of each expert."""
    flat = indices.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    group_sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return order, inverse.reshape(indices.shape), group_sizes


@jax.custom_vjp
def scatter_to_experts(x, order, inverse):
    """Rows of x [T, D] in expert order, [T*K, D], each token once for each of its experts."""
    return x[order // inverse.shape[1]]


@jax.custom_vjp
def gather_from_experts(rows, order, inverse):
    """Rows in expert order [T*K, D] back in token order, summed over a token's experts: [T, D]."""
    return jnp.sum(rows[inverse], axis=1, dtype=jnp.float32).astype(rows.dtype)


# Each one's derivative is the other: gathers both, where autodiff would make slow scatters.
def _scatter_forward(x, order, inverse):
    return scatter_to_experts(x, order, inverse), (order, inverse)


def _scatter_backward(saved, cotangent):
    return gather_from_experts(cotangent, *saved), None, None


def _gather_forward(rows, order, inverse):
    return gather_from_experts(rows, order, inverse), (order, inverse)


def _gather_backward(saved, cotangent):
    return scatter_to_experts(cotangent, *saved), None, None


scatter_to_experts.defvjp(_scatter_forward, _scatter_backward)
gather_from_experts.defvjp(_gather_forward, _gather_backward)
