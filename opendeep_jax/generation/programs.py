"""The generator's compiled programs: one function, compiled for each number of new tokens and pages that occurs.

B rows, T new tokens of each, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from opendeep_jax.config.rules import ROW_AXES
from opendeep_jax.generation.adjusting import Adjustments, adjusted
from opendeep_jax.generation.cache import (
    LayerCache,
    cache_names,
    cache_spec,
    layer_kinds,
    page_shapes,
    slot_dtype,
    slot_shapes,
    stored_dtype,
)
from opendeep_jax.generation.forward import Rows, forward
from opendeep_jax.generation.params import MOST_LOGPROBS
from opendeep_jax.generation.sampling import RowSampling, choose
from opendeep_jax.generation.weights import Bones, Weights, weight_specs
from opendeep_jax.parallel.axes import row_shards


class Chosen(NamedTuple):
    """What a step gives for each row, or for each of a row's places; log-probabilities where they were asked for."""

    tokens: Int[Array, "*B"]
    logprobs: Float[Array, "*B"] | None = None
    top_tokens: Int[Array, "*B 20"] | None = None
    top_logprobs: Float[Array, "*B 20"] | None = None


def platform_of(mesh) -> str:
    """`cpu`, `gpu` or `tpu`: of a mesh's devices, or of the default ones without a mesh."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def make_cache(
    bones: Bones, pages: int, page_size: int, slots: int, mesh=None, mtp: bool = False
) -> tuple[LayerCache, ...]:
    """Empty pools, one for each layer, with `pages` and one more than `slots` in each of the mesh's groups of rows."""
    platform = platform_of(mesh)
    of_page = page_shapes(bones.config, page_size, platform)
    shards = 1 if mesh is None else row_shards(mesh)
    shapes = {name: (pages * shards, *shape) for name, shape in of_page.items()}
    shapes |= {name: ((slots + 1) * shards, *shape) for name, shape in slot_shapes(bones.config).items()}

    def zeros(name):
        sharding = None if mesh is None else NamedSharding(mesh, cache_spec(name))
        dtype = stored_dtype(bones.config, platform) if name in of_page else slot_dtype(bones.config, name)
        return jnp.zeros(shapes[name], dtype, device=sharding)

    kinds = layer_kinds(bones.config, mtp)
    return tuple({name: zeros(name) for name in cache_names(bones.config, kind)} for kind in kinds)


def on_mesh(function, bones: Bones, mesh, extra: int, mtp: bool):
    """A function (weights, cache, *rows) -> (rows, cache) compiled as each device's program; the cache is donated.

    Args:
        extra: how many arguments of rows there are.
        mtp: whether the cache is for the MTP modules' layers too.
    """
    if mesh is None:
        return jax.jit(function, donate_argnums=1)
    rows = PartitionSpec(ROW_AXES)
    kinds = layer_kinds(bones.config, mtp)
    cache = tuple({name: cache_spec(name) for name in cache_names(bones.config, kind)} for kind in kinds)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(weight_specs(bones, mesh), cache, *[rows] * extra),
        out_specs=(rows, cache),
        check_vma=False,
    )
    # Said, lest XLA write the cache's sharding in other words, and each program be compiled for both.
    kept = tuple({name: NamedSharding(mesh, spec) for name, spec in layer.items()} for layer in cache)
    return jax.jit(mapped, donate_argnums=1, out_shardings=(None, kept))


def advance(
    bones: Bones, first: bool, weights: Weights, cache: tuple[LayerCache, ...], rows: Rows
) -> tuple[Float[Array, "B V"], tuple[LayerCache, ...]]:
    """Takes the rows' new tokens in; the float32 logits after each row's last one, and the cache.

    Args:
        first: as for `forward`.
    """
    hidden, cache = forward(bones, weights, cache, rows, first)
    last = jnp.maximum(rows.counts - 1, 0)[:, None, None]
    return bones.outside(weights).logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0]), cache


def pick(
    vocab_size: int,
    top: bool,
    logits: Float[Array, "B V"],
    sampling: RowSampling,
    index: Int[Array, "B"],
    changes: Adjustments | None,
) -> Chosen:
    """Chooses a token of each row.

    Args:
        vocab_size: tokens from here on are never chosen: the model's table may be longer than the tokenizer's.
        top: give log-probabilities too.
        index: each row's place in its output, which its draw depends on.
        changes: to the logits that are chosen by; log-probabilities are the model's own.
    """
    logits = limited(logits, vocab_size)
    tokens = choose(logits if changes is None else adjusted(logits, changes), sampling, index)
    return with_logprobs(tokens, logits) if top else Chosen(tokens)


def limited(logits: Float[Array, "... V"], vocab_size: int) -> Float[Array, "... V"]:
    """-inf for tokens that the tokenizer does not have."""
    if vocab_size >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def with_logprobs(tokens: Int[Array, "*B"], logits: Float[Array, "*B V"]) -> Chosen:
    """The tokens with their log-probabilities and those of the most likely ones."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top, top_tokens = jax.lax.top_k(logprobs, min(MOST_LOGPROBS, logits.shape[-1]))
    own = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    return Chosen(tokens, own, top_tokens, top)


def score(
    bones: Bones,
    weights: Weights,
    cache: tuple[LayerCache, ...],
    rows: Rows,
    targets: Int[Array, "B T"],
    top: int = 0,
) -> tuple[tuple[Array, ...], tuple[LayerCache, ...]]:
    """Log-probability of each target after its token, and whether it is the most likely one; and the cache.

    Args:
        top: Give so many most likely tokens [B, T, top] and their log-probabilities too.
    """
    hidden, cache = forward(bones, weights, cache, rows)
    logits = bones.outside(weights).logits(hidden)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    greedy = jnp.argmax(logits, axis=-1) == targets
    total = jax.nn.logsumexp(logits, axis=-1)
    found = (of_target - total, greedy)
    if top:
        # The same subtraction as for the targets: a client compares the two for equality.
        best, tokens = jax.lax.top_k(logits, min(top, logits.shape[-1]))
        found = (*found, tokens, best - total[..., None])
    return found, cache
