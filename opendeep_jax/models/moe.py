"""Mixture of experts: shared experts for every token, routed experts for those that choose them (DeepSeekMoE).

B batch, L length, D model width, E experts, K chosen per token, F expert width.
"""

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.models.layers import Context, FeedForward, bias, weight
from opendeep_jax.ops import routing
from opendeep_jax.ops.dispatch import ExpertKind, routed_experts
from opendeep_jax.ops.exchange import exchanged_experts, most_devices
from opendeep_jax.ops.linear import project
from opendeep_jax.parallel.collectives import axis_size
from opendeep_jax.parallel.shares import Shares, Sum


class RouterBias(nnx.Variable):
    """Bias added to an expert's score for selection only. Moved by the expert load, never by a gradient."""


class MoE(nnx.Module):
    """The feed-forward of a MoE block."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        moe, D, std, dtype = config.moe, config.hidden_size, config.init_std, config.weight_dtype
        E, F = moe.num_experts, moe.expert_size
        self.router = weight(rngs, (D, E), ("embed", "router"), std)
        if moe.use_router_bias:
            self.router_bias = RouterBias(jnp.zeros((E,), jnp.float32), logical_axes=("router",))
        into = rngs, (E, D, F), ("experts", "expert_embed", "expert_mlp"), std, dtype
        self.gate = weight(*into) if config.gated_mlp else None
        self.up = weight(*into)
        self.down = weight(rngs, (E, F, D), ("experts", "expert_mlp", "expert_embed"), std, dtype)
        if moe.router_linear_bias:
            self.router_linear_bias = bias((E,), ("router",))
        if moe.expert_bias:
            self.gate_bias = bias((E, F), ("experts", "expert_mlp"))
            self.up_bias = bias((E, F), ("experts", "expert_mlp"))
            self.down_bias = bias((E, D), ("experts", "expert_embed"))
        if moe.num_shared_experts:
            self.shared = FeedForward(config, moe.shared_size, rngs=rngs)
        self.config = moe
        self.execution = config.execution
        self.kind = ExpertKind(
            config.precision, moe.expert_bias, config.activation, config.swiglu_alpha, config.swiglu_limit
        )

    def __call__(self, x: Float[Array, "B L D"], context: Context) -> tuple[Float[Array, "B L D"], Shares]:
        """Shared plus routed experts of each position, and the router's report: `load`, int32 [E] tokens that chose
        each expert, and `balance_loss`, the sequence-wise one summed over rows.
        """
        weights, indices, scores = self.route(x)
        indices = checkpoint_name(indices, "routing")
        counts = routing.expert_counts(indices, context.valid, self.config.num_experts)
        balance = routing.sequence_balance_loss(scores, counts, context.valid, self.config.experts_per_token)
        out = self.routed(x, indices, weights, context)
        if self.config.num_shared_experts:
            out += self.shared(x)
        return out, {"load": Sum(jnp.sum(counts, axis=0)), "balance_loss": Sum(jnp.sum(balance))}

    def route(self, x: Float[Array, "B L D"]) -> tuple[Array, Array, Array]:
        """Weights and indices [B, L, K] of the chosen experts and all scores [B, L, E], in float32."""
        logits = project(x.astype(jnp.float32), self.router[...])
        if self.config.router_linear_bias:
            logits += self.router_linear_bias[...].astype(jnp.float32)
        logits = checkpoint_name(logits, "router_logits")
        bias = self.router_bias[...] if self.config.use_router_bias else None
        return routing.route(logits, bias, self.config)

    def routed(self, x, indices, weights, context: Context) -> Float[Array, "B L D"]:
        """The routed experts' output, wherever the experts are."""
        kernels = [k if k is None else k[...].astype(x.dtype) for k in (self.gate, self.up, self.down)]
        rows, chosen, shares = (array.reshape(-1, array.shape[-1]) for array in (x, indices, weights))
        if self.config.expert_bias:
            # A bias is one more row of its matrix, for a 1 at the end of what is multiplied: nothing else has to know.
            biases = self.gate_bias, self.up_bias, self.down_bias
            kernels = [
                jnp.concatenate([kernel, bias[...].astype(x.dtype)[:, None]], axis=1)
                for kernel, bias in zip(kernels, biases, strict=True)
            ]
            rows = jnp.concatenate([rows, jnp.ones((len(rows), 1), rows.dtype)], axis=1)
            kernels[2] = jnp.pad(kernels[2], ((0, 0), (0, 0), (0, 1)))  # what leaves is as wide as what came
        moe, devices = self.config, axis_size("expert")
        if devices == 1:
            out = routed_experts(rows, chosen, shares, *kernels, self.execution, self.kind)
            return out[:, : x.shape[-1]].reshape(x.shape)
        out = exchanged_experts(
            rows,
            chosen,
            shares,
            context.valid.reshape(-1),
            *kernels,
            self.execution,
            moe.num_experts,
            most_devices(moe.num_experts, moe.experts_per_token, moe.num_groups, moe.groups_per_token, devices),
            self.kind,
        )
        return out[:, : x.shape[-1]].reshape(x.shape)
