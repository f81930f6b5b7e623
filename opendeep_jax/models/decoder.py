"""The decoder: embedding, leading dense blocks, MoE blocks, final norm, head, and MTP modules beside them.

B batch, L length, D model width, E experts, V vocabulary, n layers of one kind (stacked and scanned, so that compile
time does not grow with depth). Written for one device: inside a per-device program B and L are its own rows and its
part of their length, and a layer's weights are gathered when it begins (`layers.gathered`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.target import platform
from opendeep_jax.config.model import HYBRID_STACKS
from opendeep_jax.config.schema import AttentionConfig, ModelConfig, RopeConfig
from opendeep_jax.models.attention import make_attention
from opendeep_jax.models.layers import (
    Context,
    Embedding,
    FeedForward,
    Head,
    Positions,
    gathered,
    make_norm,
    stacked,
    weight,
)
from opendeep_jax.models.mamba2 import Mamba2
from opendeep_jax.models.moe import MoE
from opendeep_jax.ops.linear import matmul, project
from opendeep_jax.ops.rope import rotations
from opendeep_jax.parallel.axes import gather_weight
from opendeep_jax.parallel.collectives import all_gather
from opendeep_jax.parallel.shares import Shares, combine


class Block(nnx.Module):
    """Attention and feed-forward, dense or mixture of experts, with norms before, after or around them."""

    def __init__(self, config: ModelConfig, is_moe: bool, *, rngs: nnx.Rngs):
        D, placement = config.hidden_size, config.norm_placement
        if placement != "post":
            self.attention_norm, self.mlp_norm = make_norm(config, D), make_norm(config, D)
        if placement != "pre":
            self.attention_post_norm, self.mlp_post_norm = make_norm(config, D), make_norm(config, D)
        self.attention = make_attention(config, rngs)
        if is_moe:
            self.moe = MoE(config, rngs=rngs)
        else:
            self.mlp = FeedForward(config, config.mlp_size, rngs=rngs)
        self.is_moe, self.placement, self.batch_parts = is_moe, placement, config.execution.batch_parts

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context,
        sliding: Array | bool | None = None,
        core: Callable | None = None,
    ) -> tuple[Float[Array, "B L D"], Shares]:
        """The residual stream after this block, and its report: its own shares of metrics, and its router's.

        Args:
            sliding: whether this block's attention has a window; None where no block's has.
            core: takes the place of attention's own, as a cache does.
        """
        x = checkpoint_name(x, "block_input")
        if not self.is_moe:
            return self.feed_forward(self.add_attention(x, context, sliding, core), context)
        # Parts of the rows follow each other, so that one's attention can hide what another's experts send.
        parts = min(self.batch_parts, x.shape[0])
        contexts = [_rows(context, part, parts) for part in range(parts)]
        attended = [self.add_attention(_rows(x, part, parts), contexts[part], sliding, core) for part in range(parts)]
        outs, reports = zip(*(self.feed_forward(a, c) for a, c in zip(attended, contexts, strict=True)), strict=True)
        if parts == 1:
            return outs[0], reports[0]
        return jnp.concatenate(outs), functools.reduce(combine, reports)

    def add_attention(
        self, x: Float[Array, "B L D"], context: Context, sliding: Array | bool | None, core: Callable | None
    ) -> Float[Array, "B L D"]:
        """The residual stream between the block's two halves."""
        out = self.attention(self.attention_norm(x) if self.placement != "post" else x, context, sliding, core)
        out = self.attention_post_norm(out) if self.placement != "pre" else out
        return checkpoint_name(x + out, "residual")

    def feed_forward(self, x: Float[Array, "B L D"], context: Context) -> tuple[Float[Array, "B L D"], Shares]:
        """The residual stream with the block's second half, and the block's report."""
        inner = self.mlp_norm(x) if self.placement != "post" else x
        out, report = self.moe(inner, context) if self.is_moe else (self.mlp(inner), {})
        return x + (self.mlp_post_norm(out) if self.placement != "pre" else out), report


def _rows(tree, part: int, parts: int):
    """A part of the rows of every array; parts differ by a row at most."""
    return jax.tree.map(lambda x: x[len(x) * part // parts : len(x) * (part + 1) // parts], tree)


class MixerBlock(nnx.Module):
    """A hybrid's layer: one mixer of the kind of a letter of `layer_pattern`, with a norm before it."""

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        self.norm = make_norm(config, config.hidden_size)
        if kind == "M":
            self.mamba = Mamba2(config, rngs=rngs)
        elif kind == "*":
            self.attention = make_attention(config, rngs)
        elif kind == "-":
            self.mlp = FeedForward(config, config.mlp_size, rngs=rngs)
        else:
            self.moe = MoE(config, rngs=rngs)
        self.kind, self.is_moe = kind, kind == "E"

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context,
        sliding: Array | bool | None = None,
        core: Callable | None = None,
    ) -> tuple[Float[Array, "B L D"], Shares]:
        """The residual stream after this layer, and its report. No layer of a hybrid slides.

        Args:
            core: takes the place of the mixer's own, as a cache does.
        """
        x, report = checkpoint_name(x, "block_input"), {}
        inner = self.norm(x)
        if self.kind == "M":
            out = self.mamba(inner, context, core)
        elif self.kind == "*":
            out = self.attention(inner, context, sliding, core)
        elif self.kind == "-":
            out = self.mlp(inner)
        else:
            out, report = self.moe(inner, context)
        return x + out, report


def make_block(config: ModelConfig, stack: str, rngs: nnx.Rngs) -> Block | MixerBlock:
    """A layer of one of `config.layer_stacks`."""
    if not config.layer_pattern:
        return Block(config, stack == "moe_layers", rngs=rngs)
    return MixerBlock(config, next(kind for kind, name in HYBRID_STACKS.items() if name == stack), rngs=rngs)


class MTPModule(nnx.Module):
    """Predict one token further than the module before it (V3 report, section 2.2).

    Takes the previous depth's output after its norm, as the published weights' inference code does.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.hidden_size
        self.embedding_norm = make_norm(config, D)
        self.hidden_norm = make_norm(config, D)
        self.projection = weight(rngs, (2 * D, D), ("embed", None), config.init_std, config.weight_dtype)
        self.block = Block(config, is_moe=config.moe.num_experts > 0, rngs=rngs)
        self.norm = make_norm(config, D)
        self.is_moe, self.precision = self.block.is_moe, config.precision

    def __call__(
        self,
        inputs: tuple[Array, Array],
        context: Context,
        sliding: Array | bool | None = None,
        core: Callable | None = None,
    ) -> tuple[Array, Shares]:
        """Apply to the hidden state and the next token's embedding, both [B, L, D]; return the normalized output [B, L,
        D] and the block's report. The block's input is [normalized embedding; normalized hidden state], projected to D.
        """
        x, report = self.block(self.combined(*inputs), context, sliding, core)
        return self.norm(x), report

    def combined(self, hidden: Float[Array, "B L D"], embedded: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Return the input of the module's block."""
        both = jnp.concatenate([self.embedding_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        return project(both, self.projection[...], precision=self.precision)


class Output(NamedTuple):
    """Everything a training step needs of a forward pass, before the head."""

    hidden: Float[Array, "B L D"]
    """Normalized output; the head makes the next token's logits of it."""
    mtp_hidden: tuple[Float[Array, "B L D"], ...]
    """The same of each MTP module, for the token 2, 3, … further on."""
    reports: dict[str, Shares]
    """The layers' reports by their place in the model: of stacked layers [n, …], then of MTP modules."""


class Decoder(nnx.Module):
    """A language model. `model(tokens)` gives logits; `model.forward` what training needs.

    Instance: `Decoder(ModelConfig(vocab_size=8192), rngs=nnx.Rngs(0))(jnp.ones((2, 16), jnp.int32))` is float32
    [2, 16, 8192].
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embedding = Embedding(config, rngs=rngs)
        stacks = dict.fromkeys(("dense_layers", "moe_layers"), ()) | config.layer_stacks
        for stack, layers in stacks.items():
            setattr(self, stack, nnx.data(stacked(functools.partial(make_block, config, stack), len(layers), rngs)))
        self.final_norm = make_norm(config, config.hidden_size)
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
        return self.logits(hidden)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits of normalized outputs, by the whole head."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = matmul(flat, self.head_kernel().astype(hidden.dtype), jnp.float32).reshape(*hidden.shape[:-1], -1)
        cap = self.config.logit_softcap
        return jnp.tanh(logits / cap) * cap if cap else logits

    def head_kernel(self) -> Float[Array, "D V"]:
        """The head's weights in the compute dtype, whole; the embedding's transpose where they are tied."""
        variable = self.embedding.embedding if self.config.tie_embeddings else self.head.kernel
        metadata, kernel = variable.get_metadata(), variable[...].astype(self.config.dtype)
        if metadata.get("spec"):
            kernel = gather_weight(kernel, metadata["logical_axes"], metadata["spec"], kernel.dtype)
        return kernel.T if self.config.tie_embeddings else kernel

    def forward(
        self,
        tokens: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        mtp_tokens: Sequence[Int[Array, "B L"]] = (),
        order: Int[Array, "B L"] | None = None,
    ) -> Output:
        """Run all blocks.

        Args:
            mtp_tokens: for each MTP module that shall run, the token 1, 2, … after each position.
            order: each position's index in its row, where devices have parts of it.
        """
        context = self.context(tokens, segment_ids, positions, order)
        x, dense, reports = self.embedding(tokens), self.config.num_leading_dense_layers, {}
        if self.config.layer_pattern:
            stacks = {name: getattr(self, name) for name in self.config.layer_stacks}
            x, reports = run_layers(stacks, x, context, self.config)
        else:
            x, reports["dense_layers"] = scan_layers(self.dense_layers, x, context, self.config)
            x, reports["moe_layers"] = scan_layers(self.moe_layers, x, context, self.config, first=dense)
        out = self.outputs(x, context, mtp_tokens)
        return out._replace(reports=reports | out.reports)

    def outputs(self, x: Float[Array, "B L D"], context: Context, mtp_tokens: Sequence[Array] = ()) -> Output:
        """Apply what follows the last block: its norm, and the MTP modules."""
        hidden = previous = self.final_norm(x)
        mtp_hidden, reports = [], {}
        for i, (module, following) in enumerate(zip(self.mtp, mtp_tokens, strict=False)):
            layer, state = one_layer(module, context, self.config, scanned=False)
            previous, reports[f"mtp.{i}.block"] = layer((previous, self.embedding(following)), state)
            mtp_hidden.append(previous)
        return Output(hidden, tuple(mtp_hidden), reports)

    def context(
        self,
        tokens: Array,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        order: Array | None = None,
    ) -> Context:
        """Return the context that all layers share: segments, validity and rotations of each position."""
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        attention = self.config.attention

        def of_devices(*axes):
            own = all_gather(segment_ids, axes, 1), all_gather(positions, axes, 1)
            index = None if order is None else all_gather(order, axes, 1)
            return Positions(own[0], index, *angles(attention, own[1]))

        return Context(segment_ids > 0, of_devices(), of_devices("tensor"), of_devices("context", "tensor"))


def angles(attention: AttentionConfig, positions: Int[Array, "B L"]) -> tuple[Array, Array, tuple | None]:
    """Cosine and sine of each position, and those of the sliding layers where they are others: `Positions`' ends."""
    if not attention.rotated:  # none of a head is
        none = jnp.zeros((*positions.shape, 1, 0), jnp.float32)
        return none, none, None
    size = attention.qk_rope_head_dim if attention.kind == "mla" else attention.rotary_dim or attention.head_dim
    sliding = None
    if attention.sliding_rope_theta and attention.sliding_layers:
        sliding = rotations(RopeConfig(theta=attention.sliding_rope_theta), positions, size)
    return *rotations(attention.rope, positions, size), sliding


def shift_left(x: Array, count: int) -> Array:
    """x [B, L] with each row moved `count` places to the left, zeros (False) behind."""
    return jnp.pad(x, ((0, 0), (0, count)))[:, count:]


def one_layer(block: nnx.Module, context: Context, config: ModelConfig, scanned: bool):
    """The block as a function (x, arrays[, sliding]) -> (x, report), which keeps what its remat policy says, and its
    arrays.

    Weights are gathered inside, and so again in the backward pass unless everything is kept.
    """
    graph, state = nnx.split(block)
    policy = config.remat.moe if block.is_moe else config.remat.dense

    def layer(x, state, sliding=None):
        block = nnx.merge(graph, gathered(state, config.dtype))
        return block(x, context) if sliding is None else block(x, context, sliding)

    if policy == "none":
        return layer, state
    return jax.checkpoint(layer, policy=_kept(config) if policy == "named" else None, prevent_cse=not scanned), state


def _kept(config: ModelConfig):
    """Return the policy "named": activations kept in device memory, and in host memory if the platform has it."""
    names, offload = config.remat.names, config.remat.offload
    if not offload or platform() == "cpu":
        return jax.checkpoint_policies.save_only_these_names(*names, *offload)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[name for name in names if name not in offload],
        names_which_can_be_offloaded=list(offload),
        offload_src="device",
        offload_dst="pinned_host",
    )


def scan_layers(layers: nnx.Module | None, x, context: Context, config: ModelConfig, first: int = 0):
    """Run stacked layers in order, starting with the model's layer `first`; return x and the
    layers' reports, stacked.
    """
    if layers is None:
        return x, {}
    layer, state = one_layer(layers, context, config, scanned=True)
    arrays = (state,)
    if sliding := config.attention.sliding_layers:
        count = jax.tree.leaves(state)[0].shape[0]
        arrays = state, jnp.array([number in sliding for number in range(first, first + count)])
    return jax.lax.scan(lambda x, arrays: layer(x, *arrays), x, arrays)


def run_layers(stacks: dict[str, nnx.Module], x, context: Context, config: ModelConfig):
    """Run a hybrid's layers in their order, each by itself; return x and each stack's reports, stacked."""
    layers, left, reports = {}, {}, {name: [] for name in stacks}
    for name, stack in stacks.items():
        layers[name], state = one_layer(stack, context, config, scanned=False)
        left[name] = iter(unstacked(state))
    for kind in config.layer_pattern:
        name = HYBRID_STACKS[kind]
        x, report = layers[name](x, next(left[name]))
        reports[name].append(report)
    return x, {name: jax.tree.map(lambda *each: jnp.stack(each), *stack) for name, stack in reports.items()}


def unstacked(state) -> list:
    """Each layer's arrays of stacked ones. Their gradients are put together at once, not added up one by one."""
    leaves, tree = jax.tree.flatten(state)
    count = leaves[0].shape[0]
    parts = [[part[0] for part in lax.split(leaf, [1] * count)] for leaf in leaves]
    return [jax.tree.unflatten(tree, layer) for layer in zip(*parts, strict=True)]
