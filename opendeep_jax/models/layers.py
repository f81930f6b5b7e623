"""Parts that every block is made of.

B batch, L length, D model width, M hidden width, V vocabulary. Weights are float32 masters, cast to the compute dtype
where they are used; each is declared on one line with its shape, logical axes and initialiser.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.ops.linear import project
from opendeep_jax.ops.norm import rms_norm
from opendeep_jax.parallel.axes import constrain


class Context(NamedTuple):
    """What all layers share about the positions of a batch."""

    segment_ids: Int[Array, "B L"]
    valid: Bool[Array, "B L"]
    cosine: Float[Array, "B L 1 R/2"]
    sine: Float[Array, "B L 1 R/2"]


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float) -> nnx.Param:
    """A float32 normal weight of mean 0 with logical axis names."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, logical_axes=axes)


class RMSNorm(nnx.Module):
    """RMSNorm with a learned scale that starts at 1."""

    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), logical_axes=("norm",))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis."""
        return rms_norm(x, self.scale[...], self.epsilon)


class SwiGLU(nnx.Module):
    """`(silu(x G) * (x U)) D`: the dense feed-forward and the shared expert (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, hidden_size: int, *, rngs: nnx.Rngs):
        D, M, std = config.hidden_size, hidden_size, config.init_std
        self.gate = weight(rngs, (D, M), ("embed", "mlp"), std)
        self.up = weight(rngs, (D, M), ("embed", "mlp"), std)
        self.down = weight(rngs, (M, D), ("mlp", "embed"), std)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Applies the feed-forward to each position."""
        gate = checkpoint_name(project(x, self.gate[...]), "mlp_gate")
        up = checkpoint_name(project(x, self.up[...]), "mlp_up")
        hidden = constrain(jax.nn.silu(gate) * up, "batch", "length", "mlp")
        return project(hidden, self.down[...])


class Embedding(nnx.Module):
    """Token ids to vectors."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embedding = weight(rngs, (config.vocab_size, config.hidden_size), ("vocab", "embed"), config.init_std)
        self.dtype = jnp.dtype(config.dtype)

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Looks up; the cast comes after, so that gradients of one token add up in float32."""
        # Whole on each device: looked up in a divided table, every device would answer for every token.
        table = constrain(self.embedding[...], None, None)
        return constrain(table[tokens].astype(self.dtype), "batch", "length", None)


class Head(nnx.Module):
    """The output projection of an untied model."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.kernel = weight(rngs, (config.hidden_size, config.vocab_size), ("embed", "vocab"), config.init_std)


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
