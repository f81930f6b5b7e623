"""Causal attention over packed documents, in plain JAX.

B batch, L length, H query heads, G key/value heads, Q query/key head size, V value head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MIN_BLOCK = 128
MAX_BLOCKS = 8


def causal_attention(
    query: Float[Array, "B L H Q"],
    key: Float[Array, "B L G Q"],
    value: Float[Array, "B L G V"],
    segment_ids: Int[Array, "B L"],
    scale: float,
) -> Float[Array, "B L H V"]:
    """Softmax attention of each position to the earlier ones (and itself) of its own segment; softmax in float32.

    Queries go in up to MAX_BLOCKS blocks, each meeting only the keys up to its own end, so that nearly half of the
    scores are never computed. H is a multiple of G; query head h reads key/value head h // (H / G).
    """
    length, num_heads, groups = query.shape[1], query.shape[2], key.shape[2]
    query = query.reshape(*query.shape[:2], groups, num_heads // groups, query.shape[-1])
    block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = jnp.einsum("blgrq,bmgq->bgrlm", query[:, start:end], key[:, :end], preferred_element_type=jnp.float32)
        causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        visible = causal & (segment_ids[:, start:end, None] == segment_ids[:, None, :end])
        probabilities = jax.nn.softmax(jnp.where(visible[:, None, None], scores * scale, -1e30), axis=-1)
        outputs.append(jnp.einsum("bgrlm,bmgv->blgrv", probabilities.astype(value.dtype), value[:, :end]))
    out = jnp.concatenate(outputs, axis=1) if len(outputs) > 1 else outputs[0]
    return out.reshape(*out.shape[:2], num_heads, out.shape[-1])
