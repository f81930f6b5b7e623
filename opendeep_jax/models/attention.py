"""Multi-head latent attention (DeepSeek-V2 report, section 2.1; V3, 2.1.1) and grouped-query attention.

Queries, keys, values, norms, gates and the output's projection are made here, for training and generation alike; what
lies between is the core: `over_row`, or what a cache gives in its place (`generation/attention.py:CORES`).

Departs from the reports in nothing. Heads are divided over the `tensor` axis: each device makes the queries of its
heads for the tokens of that axis' devices, and keys for those of `context` too. What travels for that are MLA's
latents, which are an order of magnitude narrower than the keys and values made of them.

B batch, L length on this device, T on all devices of its `tensor` axis, D model width, H heads, G key/value heads, N/R
sizes of a head's unrotated and rotated part, Q = N + R size of a head, V value head size, C rank of a latent.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.flash_mla import flash_mla
from kernels_pallas.flash_mla.blocks import attention as causal_attention
from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.models.layers import Context, Positions, RMSNorm, bias, make_norm, weight
from opendeep_jax.ops.linear import project
from opendeep_jax.ops.rope import halves_first, rotate, softmax_scale
from opendeep_jax.parallel.collectives import all_gather, psum_scatter

KEYS = ("context", "tensor")
"""Mesh axes whose devices have the other tokens of a row."""


def make_attention(config: ModelConfig, rngs: nnx.Rngs) -> "MultiHeadLatentAttention | GroupedQueryAttention":
    """The attention that the configuration names."""
    kinds = {"mla": MultiHeadLatentAttention, "gqa": GroupedQueryAttention}
    return kinds[config.attention.kind](config, rngs=rngs)


class AttentionMarks(NamedTuple):
    """Order and segment of tokens, as attention cores read them; `layers.Positions` has the same two."""

    segment_ids: Int[Array, "B L"]
    order: Int[Array, "B L"] | None


class Scoring(NamedTuple):
    """Scaling, sinks and limits of the scores of grouped-query attention; each core takes these, in this order."""

    scale: float
    window: Array | int | None
    """Tokens that a query sees, itself included; None for all."""
    sinks: Float[Array, "H"] | None
    softcap: float


class MultiHeadLatentAttention(nnx.Module):
    """Keys and values of all heads come from one latent; a small key part, shared by the heads, carries positions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        attention, D, std, dtype = config.attention, config.hidden_size, config.init_std, config.weight_dtype
        H, N, R, V = attention.num_heads, attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim
        q_rank, kv_rank = attention.q_lora_rank, attention.kv_lora_rank
        if q_rank:
            self.q_down = weight(rngs, (D, q_rank), ("embed", None), std, dtype)
            self.q_norm = RMSNorm(q_rank, attention.latent_norm_epsilon)
            self.q_up = weight(rngs, (q_rank, H, N + R), ("embed", "heads", "head_dim"), std, dtype)
        else:
            self.q_proj = weight(rngs, (D, H, N + R), ("embed", "heads", "head_dim"), std, dtype)
        self.kv_down = weight(rngs, (D, kv_rank + R), ("embed", None), std, dtype)
        self.kv_norm = RMSNorm(kv_rank, attention.latent_norm_epsilon)
        self.kv_up = weight(rngs, (kv_rank, H, N + V), ("embed", "heads", "head_dim"), std, dtype)
        self.out = weight(rngs, (H, V, D), ("heads", "head_dim", "embed"), std, dtype)
        self.config, self.implementation = attention, config.execution.attention or None
        self.precision, self.scale = config.precision, softmax_scale(attention)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context,
        sliding: Array | bool | None = None,
        core: Callable | None = None,
    ) -> Float[Array, "B L D"]:
        """Attend within each segment, by `over_row` or another core. No layer of this kind slides."""
        out = (core or type(self).over_row)(self, context, *self.queries(x, context), *self.latents(x, context))
        out = project(out, self.out[...].reshape(-1, x.shape[-1]), precision=self.precision)
        return psum_scatter(out, "tensor", 1)

    def over_row(self, context: Context, nope, rope, latent, key_rope) -> Float[Array, "B T HV"]:
        """The core of training: the heads' values for the two parts of their queries, which see their segments.

        Args:
            latent, key_rope: of this device's own tokens, the latter rotated, as all heads share it.
        """
        key_rope, latent = all_gather(key_rope, KEYS, 1), all_gather(latent, KEYS, 1)
        return self.flash(nope, rope, latent, key_rope, context.queries, context.keys)

    def flash(
        self, nope, rope, latent, key_rope, queries: AttentionMarks, keys: AttentionMarks
    ) -> Float[Array, "B T HV"]:
        """Attention to the keys and values that latents [B, S, C] and rotated keys [B, S, R] stand for."""
        key, value = self.keys_values(latent)
        return flash_mla(
            nope,
            rope,
            key,
            key_rope,
            value,
            queries.segment_ids,
            keys.segment_ids,
            queries.order,
            keys.order,
            num_heads=self.kv_up.shape[1],
            scale=self.scale,
            implementation=self.implementation,
        )

    def queries(self, x: Float[Array, "B L D"], context: Context) -> tuple[Float[Array, "B T HN"], Array]:
        """The two parts of this device's heads' queries, heads side by side, the second rotated."""
        if self.config.q_lora_rank:
            latent = self.q_norm(checkpoint_name(project(x, self.q_down[...], precision=self.precision), "q_latent"))
            up = self.q_up[...]
        else:
            latent, up = x, self.q_proj[...]
        latent = all_gather(latent, "tensor", 1)
        nope, rope = self.split_heads(up)
        nope = checkpoint_name(project(latent, nope, precision=self.precision), "query")
        rope = checkpoint_name(project(latent, rope, precision=self.precision), "query")
        return nope, self.turn(rope, context.queries)

    def keys_values(self, latent: Float[Array, "B S C"]) -> tuple[Array, Array]:
        """Keys without position [B, S, H*N] and values [B, S, H*V]. A cache that absorbs the up-projection into its
        queries (`generation.attention.latent_core`) repeats this in other words.
        """
        up_key, up_value = self.split_heads(self.kv_up[...], rotated=False)
        key = checkpoint_name(project(latent, up_key, precision=self.precision), "key_value")
        value = checkpoint_name(project(latent, up_value, precision=self.precision), "key_value")
        return key, value

    def latents(
        self, x: Float[Array, "B L D"], context: Context
    ) -> tuple[Float[Array, "B L C"], Float[Array, "B L R"]]:
        """Return the cached values of each position: the normalized latent, and the rotated part of its key."""
        compressed = checkpoint_name(project(x, self.kv_down[...], precision=self.precision), "kv_latent")
        rank = self.config.kv_lora_rank
        latent, key_rope = self.kv_norm(compressed[..., :rank]), compressed[..., rank:]
        if self.config.rope.interleaved:
            key_rope = halves_first(key_rope)
        return latent, self.turn(key_rope, context.own)

    def split_heads(self, up: Float[Array, "C H Q"], rotated: bool = True) -> tuple[Array, Array]:
        """An up-projection's columns as two matrices [C, H*N], [C, H*…]: cut here, where they are small.

        Neighbors that are rotated together are put into two halves: queries and keys alike, so no score changes.
        """
        first, second = up[..., : self.config.qk_nope_head_dim], up[..., self.config.qk_nope_head_dim :]
        if rotated and self.config.rope.interleaved:
            second = halves_first(second)
        return first.reshape(up.shape[0], -1), second.reshape(up.shape[0], -1)

    def turn(self, x: Float[Array, "B T HR"], positions) -> Float[Array, "B T HR"]:
        """Rotate heads that lie side by side."""
        heads = x.reshape(*x.shape[:2], -1, self.config.qk_rope_head_dim)
        return rotate(heads, positions.cosine, positions.sine, interleaved=False).reshape(x.shape)


class GroupedQueryAttention(nnx.Module):
    """Each key/value head serves several query heads (Ainslie et al. 2023).

    Biases, norms of queries and keys, sliding windows, sinks and soft caps as the configuration says.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        attention, D, std, dtype = config.attention, config.hidden_size, config.init_std, config.weight_dtype
        H, G, Q = attention.num_heads, attention.num_kv_heads, attention.head_dim
        self.query = weight(rngs, (D, H, Q), ("embed", "heads", "head_dim"), std, dtype)
        self.key = weight(rngs, (D, G, Q), ("embed", "heads", "head_dim"), std, dtype)
        self.value = weight(rngs, (D, G, Q), ("embed", "heads", "head_dim"), std, dtype)
        self.out = weight(rngs, (H, Q, D), ("heads", "head_dim", "embed"), std, dtype)
        if attention.qkv_bias:
            self.query_bias = bias((H, Q), ("heads", "norm"))
            self.key_bias = bias((G, Q), ("heads", "norm"))
            self.value_bias = bias((G, Q), ("heads", "norm"))
        if attention.out_bias:
            self.out_bias = bias((D,), ("norm",))
        if attention.qk_norm != "none":
            heads = (H, G) if attention.qk_norm == "all_heads" else (1, 1)
            self.query_norm, self.key_norm = (make_norm(config, count * Q) for count in heads)
        if attention.sinks:
            self.sinks = bias((H,), ("heads",))
        self.config = attention
        self.precision, self.scale = config.precision, softmax_scale(attention)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context,
        sliding: Array | bool | None = None,
        core: Callable | None = None,
    ) -> Float[Array, "B L D"]:
        """Attend within each segment, by `over_row` or another core; `sliding`: whether this layer has a window."""
        x = all_gather(x, "tensor", 1)
        query, key, value = self.queries_keys_values(x, context.queries, sliding)
        out = (core or type(self).over_row)(self, context, query, key, value, self.scoring(sliding))
        return self.project_out(out)

    def over_row(self, context: Context, query, key, value, scoring: Scoring) -> Float[Array, "B T H Q"]:
        """The core of training: the heads' values for queries, which see their segments."""
        queries, keys = context.queries, context.keys
        key, value = all_gather(key, "context", 1), all_gather(value, "context", 1)
        marks = queries.segment_ids, keys.segment_ids, queries.order, keys.order
        return causal_attention(query, key, value, *marks, *scoring)

    def scoring(self, sliding: Array | bool | None) -> Scoring:
        """Return the scoring of a sliding or global layer."""
        sinks = self.sinks[...] if self.config.sinks else None
        return Scoring(self.scale, self.window(sliding), sinks, self.config.logit_softcap)

    def queries_keys_values(
        self, x: Float[Array, "B T D"], positions: Positions, sliding: Array | None
    ) -> tuple[Float[Array, "B T H Q"], Float[Array, "B T G Q"], Float[Array, "B T G Q"]]:
        """Queries and keys, normalized and rotated, and values."""
        query, key, value = (
            checkpoint_name(project(x, kernel[...], precision=self.precision), name)
            for kernel, name in ((self.query, "query"), (self.key, "key_value"), (self.value, "key_value"))
        )
        if self.config.qkv_bias:
            biases = self.query_bias, self.key_bias, self.value_bias
            query, key, value = (y + b[...].astype(y.dtype) for y, b in zip((query, key, value), biases, strict=True))
        if self.config.qk_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        elif self.config.qk_norm == "all_heads":
            wide = lambda y: y.reshape(*y.shape[:2], -1)  # noqa: E731
            query = self.query_norm(wide(query)).reshape(query.shape)
            key = self.key_norm(wide(key)).reshape(key.shape)
        angles = positions.cosine, positions.sine
        if positions.sliding is not None:
            angles = tuple(jnp.where(sliding, own, all_) for own, all_ in zip(positions.sliding, angles, strict=True))
        interleaved = self.config.rope.interleaved
        return rotate(query, *angles, interleaved), rotate(key, *angles, interleaved), value

    def window(self, sliding: Array | bool | None) -> Array | int | None:
        """Tokens that a query sees, itself included; None for all."""
        if not self.config.sliding_layers:
            return None
        if isinstance(sliding, bool):
            return self.config.window if sliding else None
        return jnp.where(sliding, self.config.window, jnp.iinfo(jnp.int32).max)

    def project_out(self, out: Float[Array, "B T H Q"]) -> Float[Array, "B L D"]:
        """The heads' values put together."""
        out = psum_scatter(project(out, self.out[...], inputs=2, precision=self.precision), "tensor", 1)
        return out + self.out_bias[...].astype(out.dtype) if self.config.out_bias else out
