"""The paged cache: what attention keeps of each position, in pages that requests hold and give back.

Each layer has a pool of pages; a request's page table names its pages in order, the same ones in every layer. Page 0 is
nobody's: what has no place is written there. A layer of Mamba-2 keeps the same for a text of any length: it has a place
for each slot, and a last one for what has no slot. Layers that are scanned (`weights.Run`) have their pools one after
the other in one array, which is never sliced: layer i's page p is page i P + p there.

P pages, G key/value heads, Q size of their heads, C latent, R rotated key; S slots, H, P, N a state's heads, size and
numbers.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.rules import ROW_AXES
from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.parallel.axes import row_shards

if TYPE_CHECKING:
    from opendeep_jax.generation.weights import EngineLayout

LayerCache = dict[str, jax.Array]
"""A layer's pages: `key` [P, G, Q, page] and `value` [P, G, page, Q], each as a product with a few rows reads it
fastest, or `latent` [P, page, C + R] of latent attention; or the slots'
`convolution` [S + 1, K - 1, channels] and `state` [S + 1, H, P, N] of Mamba-2; empty for a layer without memory."""

TPU_LANES = 128


def page_shapes(config: ModelConfig, page_size: int, platform: str = "cpu") -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's arrays in one page, by name.

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
    """Return the dtype of stored pages. A CPU's XLA makes a float32 copy of a whole bfloat16 pool to write a row of it;
    the same bits as integers it writes in place.
    """
    return "uint16" if platform == "cpu" and config.dtype == "bfloat16" else config.dtype


def as_stored(x: jax.Array, dtype) -> jax.Array:
    """Numbers as pages of this dtype keep them."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), dtype) if dtype == jnp.uint16 else x.astype(dtype)


def as_numbers(x: jax.Array) -> jax.Array:
    """The numbers that pages keep."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


PAGE_AXIS = {"key": 3, "value": 2, "latent": 1}
"""Axis of a pool that counts a page's positions."""


def slot_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a Mamba-2 layer's state of one text, by name."""
    mamba = config.mamba
    return {
        "convolution": (mamba.conv_kernel - 1, mamba.conv_size),
        "state": (mamba.num_heads, mamba.head_dim, mamba.state_size),
    }


def slot_dtype(config: ModelConfig, name: str) -> str:
    """The dtype of what a layer of Mamba-2 keeps under this name."""
    return "float32" if name == "state" else config.dtype


def layer_kinds(config: ModelConfig, mtp: bool = False) -> str:
    """Return each layer's kind: * attention, M Mamba-2; layers of other letters cache nothing."""
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
    """Return the partition of a layer's pages: each group of rows has its own; heads follow their weights."""
    heads = name in ("key", "value")
    return PartitionSpec(ROW_AXES, "tensor") if heads else PartitionSpec(ROW_AXES)


def cache_specs(layout: "EngineLayout", mtp: bool) -> tuple[dict[str, PartitionSpec], ...]:
    """Return how the whole cache lies: a dictionary for each run of layers, and for the MTP modules one each."""
    kinds = layer_kinds(layout.config, mtp)
    places = [run.layers[0] for run in layout.runs] + [*range(layout.config.num_layers, len(kinds))]
    return tuple({name: cache_spec(name) for name in cache_names(layout.config, kinds[place])} for place in places)


def layers_of_parts(layout: "EngineLayout", mtp: bool) -> list[int]:
    """Return how many layers each part of `cache_specs` is for."""
    return [len(run.layers) for run in layout.runs] + [1] * (layout.config.mtp.depth if mtp else 0)


def make_cache(
    layout: "EngineLayout", pages: int, page_size: int, slots: int, mtp: bool = False
) -> tuple[LayerCache, ...]:
    """Return empty pools, with `pages` and one more than `slots` for a layer in each of the mesh's groups of rows.

    Args:
        mtp: with those of the MTP modules' layers.
    """
    config, mesh = layout.config, layout.mesh
    platform = platform_of(mesh)
    of_page, of_slot = page_shapes(config, page_size, platform), slot_shapes(config)

    def zeros(name: str, layers: int, spec: PartitionSpec) -> jax.Array:
        paged = name in of_page
        shape = (row_shards(mesh) * layers * (pages if paged else slots + 1), *(of_page | of_slot)[name])
        dtype = stored_dtype(config, platform) if paged else slot_dtype(config, name)
        return jnp.zeros(shape, dtype, device=NamedSharding(mesh, spec))

    specs = cache_specs(layout, mtp)
    counts = layers_of_parts(layout, mtp)
    return tuple(
        {name: zeros(name, count, spec) for name, spec in own.items()} for count, own in zip(counts, specs, strict=True)
    )


def copy_pages(
    layers: Sequence[int],
    cache: tuple[LayerCache, ...],
    pages: tuple[Int[Array, "B"], Int[Array, "B"]],
    slots: tuple[Int[Array, "B"], Int[Array, "B"]],
) -> tuple[LayerCache, ...]:
    """Return the cache with some pages and slots copied to others, in all layers.

    Args:
        layers: how many each part of the cache is for.
        pages, slots: (from, to); 0 to 0, and the last to the last, where there is nothing to copy.
    """

    def copied(pool: Array, count: int, moves: tuple[Array, Array]) -> Array:
        begins = jnp.arange(count)[:, None] * (len(pool) // count)
        source, target = (jnp.ravel(begins + numbers) for numbers in moves)
        return pool.at[target].set(pool[source])

    return tuple(
        {name: copied(pool, count, pages if name in PAGE_AXIS else slots) for name, pool in layer.items()}
        for count, layer in zip(layers, cache, strict=True)
    )


def platform_of(mesh: Mesh) -> str:
    """`cpu`, `gpu` or `tpu`: of a mesh's devices."""
    platform = mesh.devices.flat[0].platform
    return "gpu" if platform in ("cuda", "rocm") else platform


class Pages:
    """Free-list allocator of a pool's pages, which several requests may hold together. Page 0 is never given away."""

    def __init__(self, count: int):
        self.count = count - 1
        self._free = list(range(count - 1, 0, -1))
        self._holders = [0] * count

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Allocate pages; the caller has checked that enough are free."""
        return self.share([self._free.pop() for _ in range(count)])

    def share(self, pages: Sequence[int]) -> list[int]:
        """Add a reference to each of these pages, and return them."""
        for page in pages:
            self._holders[page] += 1
        return list(pages)

    def give_back(self, pages: Sequence[int]) -> None:
        """Take pages back; those that nobody else holds are free."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
