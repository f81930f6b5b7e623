"""Rotary position embedding and its stretches: YaRN (Peng et al. 2023, arXiv:2309.00071), Llama 3.1's, linear.

B batch, L length, H heads, R rotated size of a head, r = R / 2.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature `0.1 m ln(s) + 1` for a stretch `s > 1`, else 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(attention) -> float:
    """The factor on an `AttentionConfig`'s scores: `qk_head_dim ** -0.5` or its own, by YaRN's squared temperature."""
    rope = attention.rope
    scale = attention.query_scale or attention.qk_head_dim**-0.5
    return scale * yarn_mscale(rope.yarn_factor, rope.yarn_mscale_all_dim) ** 2


def frequencies(rope, size: int) -> np.ndarray:
    """Angle per position of each rotated pair, float64 [R/2]. Slow pairs are slowed further by YaRN and Llama 3.1."""
    plain = rope.theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    if rope.linear_factor > 1:
        return plain / rope.linear_factor
    if rope.llama3_factor > 1:
        turns = rope.llama3_original_length * plain / (2 * math.pi)
        low, high = rope.llama3_low_frequency, rope.llama3_high_frequency
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return plain * kept + plain / rope.llama3_factor * (1 - kept)
    if rope.yarn_factor <= 1:
        return plain

    def pair_that_turns(turns: float) -> float:
        return size * math.log(rope.yarn_original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.yarn_beta_fast), pair_that_turns(rope.yarn_beta_slow)
    if rope.yarn_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    interpolated = np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0, 1)
    return plain * (1 - interpolated) + plain / rope.yarn_factor * interpolated


def rotations(rope, positions: Int[Array, "B L"], size: int) -> tuple[Float[Array, "B L 1 r"], Float[Array, "B L 1 r"]]:
    """Cosine and sine of each position's angles, float32, to be shared by all layers and heads."""
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies(rope, size), jnp.float32)
    scale = yarn_mscale(rope.yarn_factor, rope.yarn_mscale) / yarn_mscale(rope.yarn_factor, rope.yarn_mscale_all_dim)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def halves_first(x: Float[Array, "... R"]) -> Float[Array, "... R"]:
    """Pairs (0, 1), (2, 3), … of the last axis put as two halves, so that `rotate` turns them without interleaving."""
    return jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def rotate(
    x: Float[Array, "B L H R"], cosine: Float[Array, "B L 1 r"], sine: Float[Array, "B L 1 r"], interleaved: bool
) -> Float[Array, "B L H R"]:
    """Rotate pairs of x by their angles: neighbors (0, 1), (2, 3), … or halves (0, R/2), (1, R/2 + 1), …

    Where x has more than R dimensions, those after the first R stay as they are.
    """
    size = 2 * cosine.shape[-1]
    if x.shape[-1] > size:
        turned = rotate(x[..., :size], cosine, sine, interleaved)
        return jnp.concatenate([turned, x[..., size:]], axis=-1)
    x32 = x.astype(jnp.float32)
    if interleaved:
        first, second = x32[..., 0::2], x32[..., 1::2]
    else:
        first, second = jnp.split(x32, 2, axis=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    out = jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return out.astype(x.dtype)
