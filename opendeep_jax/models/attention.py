"""Multi-head latent attention (DeepSeek-V2 report, section 2.1; V3, 2.1.1) and grouped-query attention.

Departs from the reports in nothing. B batch, L length, D model width, H heads, G key/value heads, N/R sizes of a
head's unrotated and rotated part, Q = N + R, V value head size.
"""

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.models.layers import Context, RMSNorm, weight
from opendeep_jax.ops.attention import causal_attention
from opendeep_jax.ops.linear import project
from opendeep_jax.ops.rope import rotate, softmax_scale
from opendeep_jax.parallel.axes import constrain


def make_attention(config: ModelConfig, rngs: nnx.Rngs) -> "MultiHeadLatentAttention | GroupedQueryAttention":
    """The attention that the configuration names."""
    kinds = {"mla": MultiHeadLatentAttention, "gqa": GroupedQueryAttention}
    return kinds[config.attention.kind](config, rngs=rngs)


class Attention(nnx.Module):
    """Projections in, causal attention, projection out; subclasses say how queries, keys and values are made."""

    def __call__(self, x: Float[Array, "B L D"], context: Context) -> Float[Array, "B L D"]:
        """Attends within each segment."""
        query, key, value = self.queries_keys_values(x, context)
        out = causal_attention(query, key, value, context.segment_ids, self.scale)
        return project(constrain(out, "batch", "length", "heads", None), self.out[...], inputs=2)


class MultiHeadLatentAttention(Attention):
    """Keys and values of all heads come from one latent; a small key part, shared by the heads, carries positions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        attention, D, std = config.attention, config.hidden_size, config.init_std
        H, N, R, V = attention.num_heads, attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim
        q_rank, kv_rank = attention.q_lora_rank, attention.kv_lora_rank
        if q_rank:
            self.q_down = weight(rngs, (D, q_rank), ("embed", None), std)
            self.q_norm = RMSNorm(q_rank, config.norm_epsilon)
            self.q_up = weight(rngs, (q_rank, H, N + R), ("rank", "heads", "head_dim"), std)
        else:
            self.q_proj = weight(rngs, (D, H, N + R), ("embed", "heads", "head_dim"), std)
        self.kv_down = weight(rngs, (D, kv_rank + R), ("embed", None), std)
        self.kv_norm = RMSNorm(kv_rank, config.norm_epsilon)
        self.kv_up = weight(rngs, (kv_rank, H, N + V), ("rank", "heads", "head_dim"), std)
        self.out = weight(rngs, (H, V, D), ("heads", "head_dim", "embed"), std)
        self.config = attention
        self.scale = softmax_scale(attention.rope, N + R)

    def queries_keys_values(self, x: Float[Array, "B L D"], context: Context) -> tuple[Array, Array, Array]:
        """Queries and keys [B, L, H, N + R], values [B, L, H, V]."""
        query = checkpoint_name(self.queries(x), "query")
        N = self.config.qk_nope_head_dim
        turn = lambda part: rotate(part, context.cosine, context.sine, self.config.rope.interleaved)  # noqa: E731
        query = jnp.concatenate([query[..., :N], turn(query[..., N:])], axis=-1)
        latent, key_rope = self.latents(x)
        key_value = checkpoint_name(project(latent, self.kv_up[...]), "key_value")
        key_rope = jnp.broadcast_to(turn(key_rope[:, :, None]), (*key_value.shape[:3], key_rope.shape[-1]))
        key = jnp.concatenate([key_value[..., :N], key_rope], axis=-1)
        return query, key, key_value[..., N:]

    def queries(self, x: Float[Array, "B L D"]) -> Float[Array, "B L H Q"]:
        """Queries before rotation, through the compression where there is one."""
        if not self.config.q_lora_rank:
            return project(x, self.q_proj[...])
        latent = checkpoint_name(project(x, self.q_down[...]), "q_latent")
        return project(self.q_norm(latent), self.q_up[...])

    def latents(self, x: Float[Array, "B L D"]) -> tuple[Float[Array, "B L kv_rank"], Float[Array, "B L R"]]:
        """What a cache holds of each position: the normalised latent, and the key part before its rotation."""
        compressed = checkpoint_name(project(x, self.kv_down[...]), "kv_latent")
        rank = self.config.kv_lora_rank
        return self.kv_norm(compressed[..., :rank]), compressed[..., rank:]


class GroupedQueryAttention(Attention):
    """Each key/value head serves several query heads (Ainslie et al. 2023); the whole head is rotated."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        attention, D, std = config.attention, config.hidden_size, config.init_std
        H, G, Q = attention.num_heads, attention.num_kv_heads, attention.head_dim
        self.query = weight(rngs, (D, H, Q), ("embed", "heads", "head_dim"), std)
        self.key = weight(rngs, (D, G, Q), ("embed", "heads", "head_dim"), std)
        self.value = weight(rngs, (D, G, Q), ("embed", "heads", "head_dim"), std)
        self.out = weight(rngs, (H, Q, D), ("heads", "head_dim", "embed"), std)
        self.config = attention
        self.scale = softmax_scale(attention.rope, Q)

    def queries_keys_values(self, x: Float[Array, "B L D"], context: Context) -> tuple[Array, Array, Array]:
        """Queries [B, L, H, Q], keys and values [B, L, G, Q]."""
        query, key, value = (
            checkpoint_name(project(x, kernel[...]), name)
            for kernel, name in ((self.query, "query"), (self.key, "key_value"), (self.value, "key_value"))
        )
        interleaved = self.config.rope.interleaved
        query = rotate(query, context.cosine, context.sine, interleaved)
        return query, rotate(key, context.cosine, context.sine, interleaved), value
