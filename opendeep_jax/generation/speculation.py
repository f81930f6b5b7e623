"""Speculative decoding with the multi-token-prediction module (DeepSeek-V3 report, section 2.2.3).

Departs from Leviathan et al. (2023) in how drafts are judged. The module drafts its most likely tokens; the model then
takes them in at once and chooses at each position the very token that it would choose there without drafts, by the
request's own seed. A draft stands while it is the chosen one. So the output is what plain decoding gives, token for
token, at any temperature, and a draft is as likely to stand as the model's probability of it, which for drafts without
randomness is what rejection sampling comes to as well.

One module drafts several tokens by taking its own output for the model's.

B rows, T new tokens of each (the last accepted and the drafts), K drafts, n = B T, D model width, V vocabulary.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opendeep_jax.generation.cache import LayerCache
from opendeep_jax.generation.forward import Rows, context_of, forward, local_tokens, places, through_layer
from opendeep_jax.generation.sampling import RowSampling, draw, limited
from opendeep_jax.generation.weights import EngineLayout, Weights
from opendeep_jax.parallel.collectives import all_gather


class Verified(NamedTuple):
    """Results of a step for each row."""

    tokens: Int[Array, "B T"]
    """Sampled after each of the new ones; those after the first refused draft mean nothing."""
    accepted: Int[Array, "B"]
    """Drafts that stand: so many and one more of `tokens` are the text's."""
    drafts: Int[Array, "B K"]
    """Drafts for the next step."""
    logits: Float[Array, "B T V"]
    """-inf for tokens that the tokenizer does not have."""
    experts: Int[Array, "B T layers K"] | None
    """The routers' choices for the new tokens, where they are asked for."""


def prefill(
    layout: EngineLayout,
    first: bool,
    experts: bool,
    weights: Weights,
    cache: tuple[LayerCache, ...],
    rows: Rows,
    following: Int[Array, "B T"],
) -> tuple[tuple[None, Array | None], tuple[LayerCache, ...]]:
    """Prefill a prompt but its last token, in the model's cache and the module's; return the routers' choices with it.

    Args:
        first, experts: as for `forward.forward`.
        following: the token after each new one.
    """
    out, cache = forward(layout, weights, cache, rows, first, experts)
    _, held = _module(layout, weights, out.hidden, following, cache[-1], rows, first)
    return (None, out.experts), (*cache[:-1], held)


def verify(
    layout: EngineLayout,
    vocab_size: int,
    drafts: int,
    experts: bool,
    weights: Weights,
    cache: tuple[LayerCache, ...],
    rows: Rows,
    limits: Int[Array, "B"],
    sampling: RowSampling,
    index: Int[Array, "B"],
) -> tuple[Verified, tuple[LayerCache, ...]]:
    """Run the model over each row's last token and its drafts, sample after each of them, and draft anew.

    Args:
        vocab_size, index: as for `sampling.sample`.
        drafts: how many to make.
        limits: positions that each row may have.
    """
    (hidden, choices), cache = forward(layout, weights, cache, rows, experts=experts)
    outside, (batch, new) = layout.outside(weights), rows.tokens.shape
    logits = limited(outside.logits(hidden), vocab_size)
    flat = RowSampling(*(jnp.repeat(setting, new) for setting in sampling))
    index = (index[:, None] + jnp.arange(new)).reshape(-1)
    tokens = draw(logits.reshape(batch * new, -1), flat, index).reshape(batch, new)
    stands = (rows.tokens[:, 1:] == tokens[:, :-1]) & (jnp.arange(1, new) < rows.counts[:, None])
    accepted = jnp.sum(jnp.cumprod(stands, axis=1), axis=1, dtype=jnp.int32)
    kept = rows._replace(counts=jnp.where(rows.counts > 0, accepted + 1, 0))
    out, held = _module(layout, weights, hidden, tokens, cache[-1], kept)
    out = jnp.take_along_axis(out, accepted[:, None, None], axis=1)

    def likely(out):
        return jnp.argmax(limited(outside.logits(out), vocab_size), axis=-1).astype(jnp.int32)

    proposed = [likely(out)]
    for ahead in range(1, drafts):
        position = rows.start + accepted + ahead
        present = ((rows.counts > 0) & (position < limits)).astype(jnp.int32)
        out, held = _module(layout, weights, out, proposed[-1], held, Rows(proposed[-1], position, present, rows.pages))
        proposed.append(likely(out))
    return Verified(tokens, accepted, jnp.concatenate(proposed, axis=1), logits, choices), (*cache[:-1], held)


def _module(layout, weights, hidden, following, cache, rows, first=False):
    """Return the first MTP module's outputs [B, T, D], given the model's and the tokens that follow."""
    at, outside, module = places(rows, first), layout.outside(weights), layout.mtp(weights, 0)
    flat = local_tokens(hidden.reshape(1, -1, hidden.shape[-1]))
    inputs = flat, outside.embedding(local_tokens(following.reshape(1, -1)))
    x, cache = through_layer(module, inputs, context_of(layout, at), cache, at, rows.slots)
    return all_gather(x, "tensor", 1).reshape(hidden.shape), cache
