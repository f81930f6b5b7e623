"""The paged cache: what attention keeps of each position, in pages that requests hold and give back.

Each layer has a pool of pages; a request's page table names its pages in order, the same ones in every layer. Page 0 is
nobody's: what has no place is written there. A layer of Mamba-2 keeps the same for a text of any length: it has a place
for each slot, and a last one for what has no slot.

P pages, G key/value heads, Q size of their heads, C latent, R rotated key; S slots, H, P, N a state's heads, size and
numbers.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.rules import ROW_AXES
from opendeep_jax.config.schema import ModelConfig

LayerCache = dict[str, jax.Array]
"""A layer's pages: `key` [P, G, Q, page] and `value` [P, G, page, Q], each as a product with a few rows reads it
fastest, or `latent` [P, page, C + R] of latent attention; or the slots'
`convolution` [S + 1, K - 1, channels] and `state` [S + 1, H, P, N] of Mamba-2; empty for a layer without memory."""

TPU_LANES = 128


def page_shapes(config: ModelConfig, page_size: int, platform: str = "cpu") -> dict[str, tuple[int, ...]]:
    """What a layer keeps of a page's positions, by name.

    Latents are filled up to whole lanes on a TPU, which would copy the cache at each step otherwise (V3: 576 to 640).
    """
    attention = config.attention
    if attention.kind == "mla":
        width = attention.kv_lora_rank + attention.qk_rope_head_dim
        return {"latent": (page_size, -(-width // TPU_LANES) * TPU_LANES if platform == "tpu" else width)}
    if attention.kind != "gqa":
        raise ConfigError(
            f"model.attention.kind = {attention.kind!r}: generation knows no cache for it. Say in "
            "generation/cache.py:page_shapes what it keeps of a position."
        )
    heads, size = attention.num_kv_heads, attention.head_dim
    return {"key": (heads, size, page_size), "value": (heads, page_size, size)}


def stored_dtype(config: ModelConfig, platform: str) -> str:
    """How numbers lie in the pages. A CPU's XLA makes a float32 copy of a whole bfloat16 pool to write a row of it; the
    same bits as integers it writes in place.
    """
    return "uint16" if platform == "cpu" and config.dtype == "bfloat16" else config.dtype


def as_stored(x: jax.Array, dtype) -> jax.Array:
    """Numbers as pages of this dtype keep them."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), dtype) if dtype == jnp.uint16 else x.astype(dtype)


def as_numbers(x: jax.Array) -> jax.Array:
    """The numbers that pages keep."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


PAGE_AXIS = {"key": 3, "value": 2, "latent": 1}
"""Which axis of a pool counts a page's positions."""


def slot_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What a layer of Mamba-2 keeps of a text, by name."""
    mamba = config.mamba
    return {
        "convolution": (mamba.conv_kernel - 1, mamba.conv_size),
        "state": (mamba.num_heads, mamba.head_dim, mamba.state_size),
    }


def slot_dtype(config: ModelConfig, name: str) -> str:
    """The dtype of what a layer of Mamba-2 keeps under this name."""
    return "float32" if name == "state" else config.dtype


def layer_kinds(config: ModelConfig, mtp: bool = False) -> str:
    """What each layer of the cache belongs to: * attention, M Mamba-2, other letters what keeps nothing."""
    return (config.layer_pattern or "*" * config.num_layers) + "*" * (config.mtp.depth if mtp else 0)


def cache_names(config: ModelConfig, kind: str) -> tuple[str, ...]:
    """The names of what a layer of a kind keeps."""
    return tuple(page_shapes(config, 1) if kind == "*" else slot_shapes(config)) if kind in "*M" else ()


def bytes_per_slot(config: ModelConfig) -> int:
    """Bytes that one request takes in all layers of Mamba-2, however long it is; 0 for other models."""
    shapes = slot_shapes(config)
    sizes = [math.prod(shape) * jnp.dtype(slot_dtype(config, name)).itemsize for name, shape in shapes.items()]
    return config.layer_pattern.count("M") * sum(sizes)


def bytes_per_token(config: ModelConfig, mtp: bool = False, platform: str = "cpu") -> int:
    """Bytes that one position takes in all layers. V3 in bfloat16: 2 x (512 + 64) x 61 = 70,272.

    Args:
        mtp: count the MTP modules' layers too, which speculation needs.
    """
    layers = layer_kinds(config, mtp).count("*")
    numbers = sum(math.prod(shape) for shape in page_shapes(config, 1, platform).values())
    return layers * numbers * jnp.dtype(config.dtype).itemsize


def cache_spec(name: str) -> PartitionSpec:
    """How a layer's pages lie on a mesh: each group of rows has its own pages, heads lie where their weights do."""
    heads = name in ("key", "value")
    return PartitionSpec(ROW_AXES, "tensor") if heads else PartitionSpec(ROW_AXES)


class Pages:
    """Who holds which page of a pool. Page 0 is never given away."""

    def __init__(self, count: int):
        self.count = count - 1
        self._free = list(range(count - 1, 0, -1))

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Gives pages away; the caller has looked that there are so many."""
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Sequence[int]) -> None:
        """Takes pages back."""
        self._free.extend(reversed(pages))
