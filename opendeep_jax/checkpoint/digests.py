"""Digests of arrays: 64 bits each, computed where the arrays are, and the same wherever they are.

An element's bits are hashed together with its index in every dimension, and the hashes are added modulo 2**32, in two
lanes. Addition does not mind in which order or on which device it is done, so a digest does not depend on sharding,
mesh or process count, and nothing but the sums travels between devices. Two arrays of one shape and dtype with the
same digest are, up to a chance of about 2**-64, the same to the last bit. A digest is no signature: it finds accidents.
"""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

BLOCK = 1 << 20
"""Elements that are hashed at once on the host."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path, in the tree's order: `.params['embed.weight']`."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def digests(tree: Any) -> dict[str, str]:
    """The digest of every array in a pytree, 16 hexadecimal digits by path, computed on the arrays' own devices.

    In a job of several processes all call it, at the same time: it is one program over all devices, and each process
    gets all digests.
    """
    return dict(zip(named_leaves(tree), finish_digests(start_digests(tree)), strict=True))


def start_digests(tree: Any) -> jax.Array:
    """Start computing digests, without waiting: two lanes for every leaf, uint32 [leaves, 2]."""
    leaves = jax.tree.leaves(tree)
    return _lanes_program(*_placement(leaves))(leaves)


def compile_digests(tree: Any) -> Callable[[Any], jax.Array]:
    """`start_digests`, compiled ahead for a pytree of abstract arrays; it takes others as well, and compiles then."""
    leaves = jax.tree.leaves(tree)
    compiled = _lanes_program(*_placement(leaves)).lower(leaves).compile()

    def start(tree: Any) -> jax.Array:
        try:
            return compiled(jax.tree.leaves(tree))
        except (TypeError, ValueError):  # other shapes or another layout
            return start_digests(tree)

    return start


def _placement(leaves: list) -> tuple[jax.sharding.Mesh | None, tuple[PartitionSpec, ...]]:
    """The mesh that the leaves lie on, if there is one, and how each is divided over it."""
    shardings = [getattr(leaf, "sharding", None) for leaf in leaves]
    named = [sharding if isinstance(sharding, NamedSharding) else None for sharding in shardings]
    mesh = next((sharding.mesh for sharding in named if sharding), None)
    return mesh, tuple(sharding.spec if sharding else PartitionSpec() for sharding in named) if mesh else ()


def finish_digests(lanes: jax.Array) -> list[str]:
    """Wait for what `start_digests` began: the digests, in the order of the tree's leaves."""
    return [_text(pair) for pair in np.asarray(lanes)]


def digest_numpy(array: Any) -> str:
    """The same digest of an array in this process, without a device.

    Args:
        array: anything with shape, dtype and slices that numpy takes; it is read in blocks of at most BLOCK elements.
    """
    return digest_blocks([((0,) * len(array.shape), array)])


def digest_blocks(blocks: Iterable[tuple[tuple[int, ...], Any]]) -> str:
    """The digest of an array that comes in parts, in any order: (index of the part's first element, part)."""
    total = np.zeros(2, np.uint64)
    for start, block in blocks:
        for offset, part in _blocks(block, block.shape):
            total += _numpy_lanes(part, tuple(map(sum, zip(start, offset, strict=True))))
    return _text(total & np.uint64(0xFFFFFFFF))


def _text(lanes: np.ndarray) -> str:
    return f"{int(lanes[0]):08x}{int(lanes[1]):08x}"


def _blocks(array: Any, shape: tuple[int, ...], index: tuple[int, ...] = ()) -> Iterator[tuple[tuple, np.ndarray]]:
    """Parts of at most BLOCK elements, each with the index of its first element."""
    rest = shape[len(index) :]
    if math.prod(rest) <= BLOCK or not rest:
        if math.prod(shape):
            part = np.asarray(array[tuple(slice(i, i + 1) for i in index)] if index else array)
            yield (*index, *(0 for _ in rest)), part
        return
    rows = BLOCK // math.prod(rest[1:])
    if not rows:
        for row in range(rest[0]):
            yield from _blocks(array, shape, (*index, row))
        return
    for row in range(0, rest[0], rows):
        slices = (*(slice(i, i + 1) for i in index), slice(row, row + rows))
        yield (*index, row, *(0 for _ in rest[1:])), np.asarray(array[slices])


def _numpy_lanes(block: np.ndarray, start: tuple[int, ...]) -> np.ndarray:
    bits = np.ascontiguousarray(block).reshape(block.shape or (1,))
    if bits.itemsize > 4:
        bits, start = bits.view(np.uint32).reshape(*bits.shape, -1), (*start, 0)
    bits = bits.view(f"uint{8 * bits.itemsize}")

    def indices(dimension: int) -> np.ndarray:
        first = start[dimension] if start else 0
        return np.arange(first, first + bits.shape[dimension], dtype=np.uint32)

    hashes = _hashes(bits.astype(np.uint32), indices, np.uint32)
    return np.array([lane.sum(dtype=np.uint64) & np.uint64(0xFFFFFFFF) for lane in hashes], np.uint64)


@jax.jit
def lanes_of(array: jax.Array, start: tuple[jax.Array, ...] | None = None) -> jax.Array:
    """Lanes of an array, or of a part whose first element has the index `start` in the whole: uint32 [2]."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}"))
    bits = bits.reshape(bits.shape or (1,)).astype(jnp.uint32)

    def indices(dimension: int) -> jax.Array:
        first = start[dimension] if start and dimension < len(start) else jnp.uint32(0)
        return first + jnp.arange(bits.shape[dimension], dtype=jnp.uint32)

    # Both lanes in one pass over the array: two reductions of their own are 15 times slower on a CPU.
    zero, hashes = jnp.uint32(0), _hashes(bits, indices, jnp.uint32)
    return jnp.stack(jax.lax.reduce(hashes, (zero, zero), _add, range(bits.ndim)))


def _add(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return one[0] + other[0], one[1] + other[1]


def _hashes(words: Any, indices: Callable[[int], Any], uint32: Callable) -> tuple[Any, Any]:
    """Two hashes of every word and its index; numpy and JAX arrays alike, all arithmetic modulo 2**32."""
    first = second = None
    for dimension in range(words.ndim):
        shape = [-1 if other == dimension else 1 for other in range(words.ndim)]
        hashed = mix(indices(dimension) + uint32(0x9E3779B9 * (dimension + 1) & 0xFFFFFFFF), uint32).reshape(shape)
        other = hashed ^ (hashed * uint32(0x85EBCA6B) >> uint32(16))
        first, second = (hashed, other) if first is None else (first + hashed, second + other)
    mixed = mix(words ^ first, uint32)
    again = mixed + second
    again = (again ^ (again >> uint32(15))) * uint32(0xC2B2AE35)
    return mixed, again ^ (again >> uint32(13))


def mix(x: Any, uint32: Callable) -> Any:
    """A bijection of 32 bits in which every bit of the input changes half of the output's."""
    x = (x ^ (x >> uint32(16))) * uint32(0x7FEB352D)
    x = (x ^ (x >> uint32(15))) * uint32(0x846CA68B)
    return x ^ (x >> uint32(16))


@functools.lru_cache(maxsize=8)
def _lanes_program(mesh: jax.sharding.Mesh | None, specs: tuple[PartitionSpec, ...]) -> Callable:
    """A program that gives the lanes of leaves to every device: uint32 [leaves, 2]."""

    def whole(leaves: list[jax.Array]) -> jax.Array:
        return jnp.stack([lanes_of(leaf) for leaf in leaves]) if leaves else jnp.zeros((0, 2), jnp.uint32)

    def parts(leaves: list[jax.Array]) -> jax.Array:
        found = [lanes_of(leaf, _start(leaf.shape, spec)) for leaf, spec in zip(leaves, specs, strict=True)]
        ways = defaultdict(list)  # leaves that are divided over the same axes are summed at once
        for index, spec in enumerate(specs):
            ways[_axes(*spec)].append(index)
        for axes, indices in ways.items():
            sums = jnp.stack([found[index] for index in indices])
            for index, lanes in zip(indices, jax.lax.psum(sums, axes) if axes else sums, strict=True):
                found[index] = lanes
        return jnp.stack(found)

    if mesh is None:
        return jax.jit(whole)
    return jax.jit(jax.shard_map(parts, mesh=mesh, in_specs=(list(specs),), out_specs=PartitionSpec(), check_vma=False))


def _axes(*entries: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that entries of a PartitionSpec name."""
    return tuple(axis for entry in entries if entry for axis in ((entry,) if isinstance(entry, str) else entry))


def _start(shape: tuple[int, ...], spec: PartitionSpec) -> tuple[jax.Array, ...]:
    """Inside shard_map: the index in the whole array of the first element of this device's part of this shape."""
    entries = (*spec, *[None] * (len(shape) - len(spec)))
    places = (jax.lax.axis_index(axes) if (axes := _axes(entry)) else 0 for entry in entries)
    return tuple(jnp.uint32(place) * jnp.uint32(size) for place, size in zip(places, shape, strict=True))


def deviating_devices(tree: Any) -> list[tuple[str, int, int]]:
    """Devices whose copy of an array differs from the copies on others: (array's path, device id, process index).

    Copies are the shards with one index in the array. The majority of them is right; where there is none, as with two
    copies, all are named. Each device digests what lies in its own memory. All processes call it, and get one answer.
    """
    arrays = named_leaves(tree)
    meshes = defaultdict(dict)
    for name, array in arrays.items():
        if isinstance(array.sharding, NamedSharding) and copies_of(array) > 1:
            meshes[array.sharding.mesh][name] = array
    found = []
    for mesh, parts in meshes.items():
        specs = tuple(array.sharding.spec for array in parts.values())
        lanes = np.asarray(_shard_lanes(mesh, specs)(list(parts.values())))  # [devices, arrays, 2]
        for column, (name, array) in enumerate(parts.items()):
            found += _deviating(name, array, list(mesh.devices.flat), [_text(pair) for pair in lanes[:, column]])
    order = list(arrays)
    return sorted(found, key=lambda one: (order.index(one[0]), one[1]))


def copies_of(array: jax.Array) -> int:
    """Return the number of devices that hold each part of an array."""
    indices = array.sharding.devices_indices_map(array.shape)
    return len(indices) // len({str(index) for index in indices.values()})


def _deviating(name: str, array: jax.Array, devices: list, texts: list[str]) -> Iterator[tuple[str, int, int]]:
    copies = defaultdict(list)
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        copies[str(index)].append(device)
    text_of = dict(zip(devices, texts, strict=True))
    for holders in copies.values():
        (text, count), *_ = Counter(text_of[device] for device in holders).most_common()
        right = text if 2 * count > len(holders) else None
        yield from ((name, device.id, device.process_index) for device in holders if text_of[device] != right)


@functools.lru_cache(maxsize=8)
def _shard_lanes(mesh: jax.sharding.Mesh, specs: tuple[PartitionSpec, ...]) -> Callable:
    """A program that gives every process the lanes of every device's own shards: uint32 [devices, arrays, 2]."""

    def own(leaves: list[jax.Array]) -> jax.Array:
        return jnp.stack([lanes_of(leaf) for leaf in leaves])[None]

    rows = PartitionSpec(mesh.axis_names)
    each = jax.shard_map(own, mesh=mesh, in_specs=(list(specs),), out_specs=rows, check_vma=False)
    return jax.jit(each, out_shardings=NamedSharding(mesh, PartitionSpec()))
