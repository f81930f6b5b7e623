"""Parts that every block is made of.

B batch, L length, D model width, M hidden width, V vocabulary. Weights are float32 masters, cast to the compute dtype
where they are used; each is declared on one line with its shape, logical axes and initializer.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.ops.activation import activated, gated
from opendeep_jax.ops.linear import project
from opendeep_jax.ops.norm import layer_norm, rms_norm
from opendeep_jax.parallel.axes import gather_weight
from opendeep_jax.parallel.collectives import all_gather, all_to_all, psum_scatter


class Positions(NamedTuple):
    """Positions of tokens: their document, position in it and position in the row."""

    segment_ids: Int[Array, "B L"]
    """0 is padding."""
    order: Int[Array, "B L"] | None
    """Index in the row; None where the tokens are the whole row in its order."""
    cosine: Float[Array, "B L 1 r"]
    sine: Float[Array, "B L 1 r"]
    sliding: tuple[Array, Array] | None = None
    """Cosine and sine of the sliding layers, where those rotate by angles of their own."""


class Context(NamedTuple):
    """Positions and rotations of a batch, shared by all layers. L is this device's part of the length."""

    valid: Bool[Array, "B L"]
    """True where a token is not padding."""
    own: Positions
    """The tokens that this device has in the residual stream."""
    queries: Positions
    """The tokens whose queries it computes: those of all devices of its `tensor` axis."""
    keys: Positions
    """The tokens whose keys they may see: those of the whole row."""


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float, dtype="float32"
) -> nnx.Param:
    """A normal weight of mean 0 with logical axis names, drawn in float32 and stored in `dtype`."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(dtype), logical_axes=axes)


def bias(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A float32 bias that starts at 0, with logical axis names."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), logical_axes=axes)


def gathered(state: nnx.State, dtype) -> nnx.State:
    """A module's arrays as this device computes with them: in the compute dtype, their FSDP parts put together."""

    def whole(variable):
        value, spec = variable.get_value(), variable.get_metadata().get("spec")
        if spec is None:
            return variable
        axes = variable.get_metadata("logical_axes")[-value.ndim :]  # a scanned layer has lost its "layers" axis
        return variable.replace(gather_weight(value, axes, spec[-value.ndim :], dtype))

    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, whole(variable)) for path, variable in flat])


class RMSNorm(nnx.Module):
    """RMSNorm with a learned scale that starts at 1."""

    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), logical_axes=("norm",))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalize the last axis."""
        return rms_norm(x, self.scale[...], self.epsilon)


class ZeroCenteredNorm(nnx.Module):
    """RMSNorm or, with a bias, LayerNorm whose scale is 1 + weight (Gemma; Nemotron's LayerNorm1P)."""

    def __init__(self, size: int, epsilon: float, bias: bool):
        self.scale = nnx.Param(jnp.zeros((size,), jnp.float32), logical_axes=("norm",))
        if bias:
            self.bias = nnx.Param(jnp.zeros((size,), jnp.float32), logical_axes=("norm",))
        self.epsilon, self.has_bias = epsilon, bias

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalize the last axis."""
        scale = 1 + self.scale[...].astype(jnp.float32)
        if self.has_bias:
            return layer_norm(x, scale, self.bias[...], self.epsilon)
        return rms_norm(x, scale, self.epsilon)


def make_norm(config: ModelConfig, size: int) -> RMSNorm | ZeroCenteredNorm:
    """The norm that the configuration names, over `size` numbers."""
    if config.norm == "rms":
        return RMSNorm(size, config.norm_epsilon)
    return ZeroCenteredNorm(size, config.norm_epsilon, bias=config.norm == "layer_zero_centered")


class FeedForward(nnx.Module):
    """`(silu(x G) * (x U)) D`, SwiGLU (Shazeer 2020), or with another activation; without a gate `activation(x U) D`.

    The dense feed-forward and the shared expert. Each projection may have a bias.
    """

    def __init__(self, config: ModelConfig, hidden_size: int, *, rngs: nnx.Rngs):
        D, M, std, dtype = config.hidden_size, hidden_size, config.init_std, config.weight_dtype
        if config.gated_mlp:
            self.gate = weight(rngs, (D, M), ("embed", "mlp"), std, dtype)
        self.up = weight(rngs, (D, M), ("embed", "mlp"), std, dtype)
        self.down = weight(rngs, (M, D), ("mlp", "embed"), std, dtype)
        if config.mlp_bias:
            self.gate_bias = bias((M,), ("mlp",)) if config.gated_mlp else None
            self.up_bias = bias((M,), ("mlp",))
            self.down_bias = bias((D,), ("norm",))
        self.precision, self.has_gate, self.has_bias = config.precision, config.gated_mlp, config.mlp_bias
        self.activation, self.bounds = config.activation, (config.swiglu_alpha, config.swiglu_limit)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Apply the feed-forward to each position."""
        x = all_gather(x, "tensor", 1)
        if self.has_gate:
            gate = project(x, self.gate[...], precision=self.precision)
            gate = checkpoint_name(self.shifted(gate, "gate_bias"), "mlp_gate")
        up = project(x, self.up[...], precision=self.precision)
        up = checkpoint_name(self.shifted(up, "up_bias"), "mlp_up")
        if self.has_gate:
            hidden = gated(self.activation, gate, up, *self.bounds)
        else:
            hidden = activated(self.activation, up)
        out = psum_scatter(project(hidden, self.down[...], precision=self.precision), "tensor", 1)
        return self.shifted(out, "down_bias")

    def shifted(self, x: Float[Array, "B L M"], name: str) -> Float[Array, "B L M"]:
        """Add the bias of this name, if projections have biases."""
        return x + getattr(self, name)[...].astype(x.dtype) if self.has_bias else x


class Embedding(nnx.Module):
    """Token ids to vectors."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = config.vocab_size, config.hidden_size
        self.embedding = weight(rngs, shape, ("vocab", "embed"), config.init_std, config.weight_dtype)
        self.dtype, self.scale = jnp.dtype(config.dtype), config.embedding_scale

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Look up the embeddings; the cast comes after, so that gradients of one token add up in float32.

        Where devices have columns of the table, each looks up its columns of everyone's tokens, and sends them home:
        far less than the table, and its gradient never leaves its place.
        """
        vocab, embed = self.embedding.get_metadata().get("spec") or (None, None)
        table = self.embedding[...].astype(jnp.float32)
        table = all_gather(table, vocab, 0) if vocab else table
        if not embed:
            return self.scaled(table[tokens].astype(self.dtype))
        columns = table[all_gather(tokens, embed, 0)].astype(self.dtype)
        return self.scaled(all_to_all(columns, embed, split=0, concat=2))

    def scaled(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Times the factor that the configuration asks for."""
        return x if self.scale == 1 else x * jnp.asarray(self.scale, self.dtype)


class Head(nnx.Module):
    """The output projection of an untied model."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = config.hidden_size, config.vocab_size
        self.kernel = weight(rngs, shape, ("embed", "vocab"), config.init_std, config.weight_dtype)


def stacked(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module | None:
    """`count` modules as one whose arrays have a leading "layers" axis; None for 0."""
    if count == 0:
        return None

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_all(rngs):
        return make(rngs)

    layers = make_all(rngs)
    for _, variable in nnx.to_flat_state(nnx.state(layers)):
        variable.set_metadata(logical_axes=("layers", *variable.get_metadata("logical_axes")))
    return layers
