"""A forward pass of new tokens over the cache: one device's program, for prompts and single tokens alike.

Rows are divided over the mesh's row axes, each group of devices with its own pages; between the blocks the tokens of
all rows lie flat, divided over `tensor`, as a training row's do.

B rows of this device, T new tokens of each, n = B T, D model width, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.attention import CORES, Places
from opendeep_jax.generation.cache import LayerCache
from opendeep_jax.generation.weights import Bones, Weights
from opendeep_jax.models.decoder import angles
from opendeep_jax.models.layers import Context, Positions
from opendeep_jax.models.mamba2 import Mamba2, Memory
from opendeep_jax.parallel.collectives import all_gather, axis_index, axis_size


class Rows(NamedTuple):
    """What is new: `counts` tokens of each row, the first at position `start`."""

    tokens: Int[Array, "B T"]
    start: Int[Array, "B"]
    counts: Int[Array, "B"]
    """0 for a row that idles."""
    pages: Int[Array, "B N"]
    """Its page table, as far as its positions reach; any pages behind them."""
    slots: Int[Array, "B"] | None = None
    """Where its states are, for a hybrid; rows that idle may share a place."""


def places(rows: Rows, first: bool = False) -> Places:
    """Where the new tokens stand."""
    steps = jnp.arange(rows.tokens.shape[1])
    lengths = jnp.where(rows.counts > 0, rows.start + rows.counts, 0)
    return Places(rows.start[:, None] + steps, steps < rows.counts[:, None], rows.pages, lengths, first)


def context_of(bones: Bones, at: Places) -> Context:
    """What all layers share about the new tokens."""
    positions, present = at.positions.reshape(1, -1), at.present.reshape(1, -1)
    turned = angles(bones.config.attention, positions)
    everyone = Positions(present.astype(jnp.int32), None, *turned)
    own = jax.tree.map(lambda x: own_tokens(x), everyone)
    return Context(own_tokens(present), own, everyone, everyone)


def own_tokens(x: Array) -> Array:
    """This device's part [1, n / tensor, ...] of what all devices of its `tensor` axis have [1, n, ...]."""
    size = axis_size("tensor")
    if size == 1:
        return x
    part = x.shape[1] // size
    return jax.lax.dynamic_slice_in_dim(x, axis_index("tensor") * part, part, axis=1)


def forward(
    bones: Bones, weights: Weights, cache: tuple[LayerCache, ...], rows: Rows, first: bool = False
) -> tuple[Float[Array, "B T D"], tuple[LayerCache, ...]]:
    """The final norm's output for each new token, and the cache with them in it.

    Args:
        rows: B T must divide over `tensor`.
        first: every row starts at 0, so that the cache need not be read.
    """
    at, layers = places(rows, first), []
    context, outside = context_of(bones, at), bones.outside(weights)
    # Embedded as rows of one token: a device's columns or rows of the table are told to others as in training.
    x = outside.embedding(own_tokens(rows.tokens.reshape(1, -1)))
    for layer, held in enumerate(cache[: bones.config.num_layers]):
        sliding = layer in bones.config.attention.sliding_layers
        x, held = through_layer(bones.block(layer, weights), x, context, held, at, rows, sliding)
        layers.append(held)
    hidden = all_gather(outside.outputs(x, context).hidden, "tensor", 1)
    return hidden.reshape(*rows.tokens.shape, -1), (*layers, *cache[len(layers) :])


def through_layer(layer, x, context: Context, cache: LayerCache, at: Places, rows: Rows, sliding: bool = False):
    """x [1, n, D] (of a MTP module, its two inputs) after a layer of the model's, and the layer's cache.

    The layer is training's own, called as training calls it; what it kept of earlier tokens comes in with its core.

    Raises:
        ConfigError: for a layer whose core has none here that takes its place.
    """
    kept = []

    def core(mixer, context, *given):
        if type(mixer).over_row is Mamba2.over_row:
            out, held = recurrent(mixer, *given, cache, at, rows)
        elif type(mixer).over_row in CORES:
            out, held = CORES[type(mixer).over_row](mixer, cache, at, *given)
        else:
            raise ConfigError(
                f"{type(mixer).__name__} has a core of its own, and generation knows none over a cache for it. Write "
                "one beside those of generation/attention.py, and list it in CORES."
            )
        kept.append(held)
        return out

    x, _ = layer(x, context, sliding, core)
    if cache and len(kept) != 1:
        raise ConfigError(
            f"{type(layer).__name__} called its core {len(kept)} times: generation keeps what it is given once. Let "
            "what mixes positions call `core` (models/attention.py)."
        )
    return x, kept[0] if kept else cache


def recurrent(mamba: Mamba2, x: Float[Array, "1 n D"], cache: LayerCache, at: Places, rows: Rows):
    """What Mamba-2 gives for x, and its cache with the rows' states after their new tokens."""
    begins = (rows.start == 0) & (rows.counts > 0)
    held = Memory(cache["convolution"][rows.slots], cache["state"][rows.slots])
    held = Memory(*(jnp.where(begins.reshape(-1, *[1] * (y.ndim - 1)), 0, y) for y in held))
    # A row's tokens are of one document.
    out, after = mamba.continued(x.reshape(*at.present.shape, -1), jnp.zeros_like(at.positions), at.present, held)
    kept = zip(cache.items(), after, strict=True)
    return out.reshape(x.shape), {name: pool.at[rows.slots].set(new.astype(pool.dtype)) for (name, pool), new in kept}
