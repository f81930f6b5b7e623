"""The decoder: embedding, leading dense blocks, MoE blocks, final norm, head, and MTP modules beside them.

B batch, L length, D model width, E experts, V vocabulary, n layers of one kind (stacked and scanned, so that compile
time does not grow with depth).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.models.attention import make_attention
from opendeep_jax.models.layers import Context, Embedding, Head, RMSNorm, SwiGLU, stacked, weight
from opendeep_jax.models.moe import MoE, RouterStats
from opendeep_jax.ops.linear import project
from opendeep_jax.ops.rope import rotations
from opendeep_jax.parallel.axes import constrain


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, dense or mixture of experts."""

    def __init__(self, config: ModelConfig, is_moe: bool, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = make_attention(config, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        if is_moe:
            self.moe = MoE(config, rngs=rngs)
        else:
            self.mlp = SwiGLU(config, config.mlp_size, rngs=rngs)
        self.is_moe = is_moe

    def __call__(self, x: Float[Array, "B L D"], context: Context) -> tuple[Float[Array, "B L D"], RouterStats | None]:
        """The residual stream after this block, and what its router did if it has one."""
        x = constrain(x + self.attention(self.attention_norm(x), context), "batch", "length", None)
        x = checkpoint_name(x, "residual")
        if self.is_moe:
            out, stats = self.moe(self.mlp_norm(x), context)
        else:
            out, stats = self.mlp(self.mlp_norm(x)), None
        return constrain(x + out, "batch", "length", None), stats


class MTPModule(nnx.Module):
    """Predicts one token further than the module before it (V3 report, section 2.2).

    Takes the previous depth's output after its norm, as the published weights' inference code does.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.hidden_size
        self.embedding_norm = RMSNorm(D, config.norm_epsilon)
        self.hidden_norm = RMSNorm(D, config.norm_epsilon)
        self.projection = weight(rngs, (2 * D, D), ("embed", None), config.init_std)
        self.block = Block(config, is_moe=config.moe.num_experts > 0, rngs=rngs)
        self.norm = RMSNorm(D, config.norm_epsilon)

    def combine(self, hidden: Float[Array, "B L D"], embedded: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The block's input: [normalised next token's embedding; normalised hidden state], projected to D."""
        both = jnp.concatenate([self.embedding_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        return project(both, self.projection[...])


class Output(NamedTuple):
    """Everything a training step needs of a forward pass, before the head."""

    hidden: Float[Array, "B L D"]
    """Normalised output; the head makes the next token's logits of it."""
    mtp_hidden: tuple[Float[Array, "B L D"], ...]
    """The same of each MTP module, for the token 2, 3, … further on."""
    moe_layers: RouterStats | None
    """The main model's routers, [n, …]."""
    mtp: tuple[RouterStats, ...]
    """Each MTP module's router."""


class Decoder(nnx.Module):
    """A language model. `model(tokens)` gives logits; `model.forward` what training needs.

    Instance: `Decoder(ModelConfig(vocab_size=8192), rngs=nnx.Rngs(0))(jnp.ones((2, 16), jnp.int32))` is float32
    [2, 16, 8192].
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        def block(is_moe):
            return lambda rngs: Block(config, is_moe, rngs=rngs)

        self.embedding = Embedding(config, rngs=rngs)
        self.dense_layers = nnx.data(stacked(block(False), config.num_leading_dense_layers, rngs))
        self.moe_layers = nnx.data(stacked(block(True), config.num_moe_layers, rngs))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        if not config.tie_embeddings:
            self.head = Head(config, rngs=rngs)
        self.mtp = nnx.List([MTPModule(config, rngs=rngs) for _ in range(config.mtp.depth)])
        self.config = config

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L V"]:
        """Float32 logits of each next token. Without segment ids each row is one document; 0 marks padding."""
        hidden = self.forward(tokens, segment_ids, positions).hidden
        return jnp.einsum("bld,dv->blv", hidden, self.head_kernel(), preferred_element_type=jnp.float32)

    def head_kernel(self) -> Float[Array, "D V"]:
        """The head's weights in the compute dtype; the embedding's transpose where they are tied."""
        kernel = self.embedding.embedding[...].T if self.config.tie_embeddings else self.head.kernel[...]
        return kernel.astype(self.config.dtype)

    def forward(
        self,
        tokens: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        next_tokens: Int[Array, "B L"] | None = None,
    ) -> Output:
        """Runs all blocks. MTP modules run where `next_tokens` (the token after each position) is given."""
        context = self.context(tokens, segment_ids, positions)
        x = self.embedding(tokens)
        x, _ = _scan(self.dense_layers, x, context, self.config)
        x, stats = _scan(self.moe_layers, x, context, self.config)
        hidden = previous = self.final_norm(x)
        mtp_hidden, mtp_stats = [], []
        for depth, module in enumerate(self.mtp if next_tokens is not None else ()):
            embedded = self.embedding(shift_left(next_tokens, depth))
            layer, state = _layer(module.block, context, self.config, scanned=False)
            x, router = layer(module.combine(previous, embedded), state)
            previous = module.norm(x)
            mtp_hidden.append(previous)
            mtp_stats.append(router)
        return Output(hidden, tuple(mtp_hidden), stats, tuple(mtp_stats))

    def context(self, tokens: Array, segment_ids: Array | None = None, positions: Array | None = None) -> Context:
        """What all layers share: segments, validity and rotations of each position."""
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        attention = self.config.attention
        size = attention.qk_rope_head_dim if attention.kind == "mla" else attention.head_dim
        return Context(segment_ids, segment_ids > 0, *rotations(attention.rope, positions, size))


def shift_left(x: Array, count: int) -> Array:
    """x [B, L] with each row moved `count` places to the left, zeros (False) behind."""
    return jnp.pad(x, ((0, 0), (0, count)))[:, count:]


def _layer(block: nnx.Module, context: Context, config: ModelConfig, scanned: bool):
    """The block as a function (x, arrays) -> (x, router stats), which keeps what its remat policy says; its arrays."""
    graph, state = nnx.split(block)
    policy = config.remat.moe if block.is_moe else config.remat.dense

    def layer(x, state):
        return nnx.merge(graph, state)(x, context)

    if policy == "none":
        return layer, state
    names = jax.checkpoint_policies.save_only_these_names(*config.remat.names) if policy == "named" else None
    return jax.checkpoint(layer, policy=names, prevent_cse=not scanned), state


def _scan(layers: nnx.Module | None, x, context: Context, config: ModelConfig):
    """Runs stacked layers one after the other; returns x and the layers' router stats, stacked."""
    if layers is None:
        return x, None
    layer, state = _layer(layers, context, config, scanned=True)
    return jax.lax.scan(layer, x, state)
