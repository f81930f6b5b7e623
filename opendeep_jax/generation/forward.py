"""A forward pass of new tokens over the cache: one device's program, for prompts and single tokens alike.

Rows are divided over the mesh's row axes, each group of devices with its own pages; between the blocks the tokens of
all rows lie flat, divided over `tensor`, as a training row's do.

B rows of this device, T new tokens of each, n = B T, D model width, V vocabulary, K experts of a token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.attention import CORES, CachePlaces
from opendeep_jax.generation.cache import PAGE_AXIS, LayerCache
from opendeep_jax.generation.weights import EngineLayout, Weights
from opendeep_jax.models.decoder import angles
from opendeep_jax.models.layers import Context, Positions
from opendeep_jax.models.mamba2 import Mamba2, MambaState
from opendeep_jax.parallel.collectives import all_gather, axis_index, axis_size


class Rows(NamedTuple):
    """New tokens: `counts` tokens of each row, the first at position `start`."""

    tokens: Int[Array, "B T"]
    start: Int[Array, "B"]
    counts: Int[Array, "B"]
    """0 for a row that idles."""
    pages: Int[Array, "B N"]
    """Its page table, as far as its positions reach; any pages behind them."""
    slots: Int[Array, "B"] | None = None
    """Slots of a hybrid's states; idle rows may share a slot."""


class Hidden(NamedTuple):
    """Results of a forward pass for the new tokens."""

    hidden: Float[Array, "B T D"]
    """The final norm's output."""
    experts: Int[Array, "B T layers K"] | None
    """The experts that each MoE layer routed them to, where they are asked for."""


def places(rows: Rows, first: bool = False) -> CachePlaces:
    """Return where the new tokens stand."""
    steps = jnp.arange(rows.tokens.shape[1])
    lengths = jnp.where(rows.counts > 0, rows.start + rows.counts, 0)
    return CachePlaces(rows.start[:, None] + steps, steps < rows.counts[:, None], rows.pages, lengths, first)


def context_of(layout: EngineLayout, at: CachePlaces) -> Context:
    """Return the layers' shared context of the new tokens."""
    positions, present = at.positions.reshape(1, -1), at.present.reshape(1, -1)
    turned = angles(layout.config.attention, positions)
    everyone = Positions(present.astype(jnp.int32), None, *turned)
    own = jax.tree.map(local_tokens, everyone)
    return Context(local_tokens(present), own, everyone, everyone)


def local_tokens(x: Array) -> Array:
    """Return this device's part [1, n / tensor, ...] of what all devices of its `tensor` axis have [1, n, ...]."""
    size = axis_size("tensor")
    if size == 1:
        return x
    part = x.shape[1] // size
    return jax.lax.dynamic_slice_in_dim(x, axis_index("tensor") * part, part, axis=1)


def forward(
    layout: EngineLayout,
    weights: Weights,
    cache: tuple[LayerCache, ...],
    rows: Rows,
    first: bool = False,
    experts: bool = False,
) -> tuple[Hidden, tuple[LayerCache, ...]]:
    """Run the model's layers over new tokens.

    Args:
        rows: B T must divide over `tensor`.
        first: every row starts at 0, so that the cache need not be read.
        experts: give the routers' choices too.
    Returns:
        the outputs, and the cache with the new tokens in it.
    """
    at, outside = places(rows, first), layout.outside(weights)
    context = context_of(layout, at)

    def program(number: int):
        """Return a run's layer as a function of x, its weights, its cache and its number in the run; not in a jit of
        its own, which changes how a bfloat16 model rounds."""
        run = layout.runs[number]

        def layer(x, arrays, held, index):
            block, chosen = layout.block(number, arrays), []
            if experts and block.is_moe:
                observe_routing(block.moe, chosen)
            here, slots = in_run(at, rows.slots, held, index, len(run.layers))
            x, held = through_layer(block, x, context, held, here, slots, run.sliding)
            return x, held, chosen

        return layer

    # Embedded as rows of one token: a device's columns or rows of the table are told to others as in training.
    x = outside.embedding(local_tokens(rows.tokens.reshape(1, -1)))
    after, routed = [], []
    for number, (run, arrays) in enumerate(zip(layout.runs, weights.runs, strict=True)):
        layer, held = program(number), cache[number]
        if len(run.layers) == 1:
            x, held, chosen = layer(x, arrays, held, 0)
            routed += chosen
        else:

            def step(carry, one, layer=layer):
                x, held, chosen = layer(*(carry[0], one[0], carry[1], one[1]))
                return (x, held), chosen

            (x, held), chosen = jax.lax.scan(step, (x, held), (arrays, jnp.arange(len(run.layers))))
            routed += [one[i] for one in chosen for i in range(len(run.layers))]
        after.append(held)
    hidden = all_gather(outside.outputs(x, context).hidden, "tensor", 1).reshape(*rows.tokens.shape, -1)
    choices = None
    if experts:
        small = jnp.uint8 if layout.config.moe.num_experts <= 256 else jnp.uint16
        choices = all_gather(jnp.stack(routed, axis=2).astype(small), "tensor", 1)
        choices = choices.reshape(*rows.tokens.shape, *choices.shape[2:])
    return Hidden(hidden, choices), (*after, *cache[len(after) :])


def in_run(at: CachePlaces, slots: Array | None, held: LayerCache, index: Array | int, layers: int):
    """Return where a layer's pages and slots are among those of all layers of its run."""
    if layers == 1:
        return at, slots
    each = {name in PAGE_AXIS: len(pool) // layers for name, pool in held.items()}
    at = at._replace(pages=at.pages + index * each.get(True, 0))
    return at, None if slots is None else slots + index * each.get(False, 0)


def observe_routing(moe, chosen: list) -> None:
    """Let a MoE module append the experts that it chooses [1, n / tensor, K] to a list while it is traced."""
    route = moe.route

    def observed(x):
        weights, indices, scores = route(x)
        chosen.append(indices)
        return weights, indices, scores

    moe.route = observed


def through_layer(
    layer, x, context: Context, cache: LayerCache, at: CachePlaces, slots: Array | None, sliding: bool = False
) -> tuple[Float[Array, "1 n D"], LayerCache]:
    """Return x [1, n, D] (of a MTP module, its two inputs) after a layer of the model's, and the layer's cache.

    The layer is training's own, called as training calls it; what it kept of earlier tokens comes in with its core.

    Raises:
        ConfigError: for a layer whose core has none here that takes its place.
    """
    kept = []

    def core(mixer, context, *given):
        if type(mixer).over_row is Mamba2.over_row:
            out, held = recurrent(mixer, *given, cache, at, slots)
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


def recurrent(mamba: Mamba2, x: Float[Array, "1 n D"], cache: LayerCache, at: CachePlaces, slots: Int[Array, "B"]):
    """Return what Mamba-2 gives for x, and its cache with the rows' states after their new tokens."""
    begins = (at.positions[:, 0] == 0) & (at.lengths > 0)
    held = MambaState(cache["convolution"][slots], cache["state"][slots])
    held = MambaState(*(jnp.where(begins.reshape(-1, *[1] * (y.ndim - 1)), 0, y) for y in held))
    # A row's tokens are of one document.
    out, after = mamba.continued(x.reshape(*at.present.shape, -1), jnp.zeros_like(at.positions), at.present, held)
    kept = zip(cache.items(), after, strict=True)
    return out.reshape(x.shape), {name: pool.at[slots].set(new.astype(pool.dtype)) for (name, pool), new in kept}


def next_logits(
    layout: EngineLayout, first: bool, experts: bool, weights: Weights, cache: tuple[LayerCache, ...], rows: Rows
) -> tuple[tuple[Float[Array, "B V"], Array | None], tuple[LayerCache, ...]]:
    """Prefill or decode: return the float32 logits after each row's last new token, with the routers' choices
    [B, T, layers, K], and the cache.

    Args:
        first, experts: as for `forward`.
    """
    out, cache = forward(layout, weights, cache, rows, first, experts)
    last = jnp.maximum(rows.counts - 1, 0)[:, None, None]
    logits = layout.outside(weights).logits(jnp.take_along_axis(out.hidden, last, axis=1)[:, 0])
    return (logits, out.experts), cache


def score(
    layout: EngineLayout,
    top: int,
    weights: Weights,
    cache: tuple[LayerCache, ...],
    rows: Rows,
    targets: Int[Array, "B T"],
) -> tuple[tuple[Array, ...], tuple[LayerCache, ...]]:
    """Return each target's log-probability after its token, whether it is the most likely one, and the cache.

    Args:
        top: give so many most likely tokens [B, T, top] and their log-probabilities too.
    """
    out, cache = forward(layout, weights, cache, rows)
    logits = layout.outside(weights).logits(out.hidden)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    greedy = jnp.argmax(logits, axis=-1) == targets
    total = jax.nn.logsumexp(logits, axis=-1)
    found = (of_target - total, greedy)
    if top:
        # The same subtraction as for the targets: a client compares the two for equality.
        best, tokens = jax.lax.top_k(logits, min(top, logits.shape[-1]))
        found = (*found, tokens, best - total[..., None])
    return found, cache
