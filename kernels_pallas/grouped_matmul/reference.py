"""Reference of a grouped matmul: every row by every group, masked."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def grouped_matmul(lhs, rhs, group_sizes, expected_rows=None):
    """See `api.grouped_matmul`. Costs G times the work; for tests."""
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(lhs.shape[0])[:, None]
    member = (rows >= ends - group_sizes) & (rows < ends)
    present = jnp.any(member, axis=1, keepdims=True)
    member, lhs = member.astype(lhs.dtype), jnp.where(present, lhs, 0)
    wide = jnp.promote_types(lhs.dtype, jnp.float32)
    out = jnp.einsum("mg,mk,gkn->mn", member, lhs, rhs, preferred_element_type=wide)
    return jnp.where(present, out, 0).astype(lhs.dtype)


def grouped_swiglu(lhs, gate, up, group_sizes, row_weights=None, expected_rows=None):
    """See `api.grouped_swiglu`."""
    return swiglu_of(grouped_matmul, lhs, gate, up, group_sizes, row_weights)


def swiglu_of(matmul, lhs, gate, up, group_sizes, row_weights):
    """`api.grouped_swiglu` from two calls of a grouped matmul."""
    gated = checkpoint_name(matmul(lhs, gate, group_sizes), "expert_gate")
    upped = checkpoint_name(matmul(lhs, up, group_sizes), "expert_up")
    hidden = jax.nn.silu(gated) * upped
    if row_weights is None:
        return hidden
    beyond = jnp.arange(lhs.shape[0]) >= jnp.sum(group_sizes)
    return hidden * jnp.where(beyond, 0, row_weights)[:, None].astype(lhs.dtype)
