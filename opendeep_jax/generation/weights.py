"""A model's weights as the generator holds them: in the compute dtype, layers apart, or stacked where they are scanned.

Training stacks the layers of a kind and scans them, which keeps compiling cheap. A slice of a stack is copied at each
of a generator's steps, though, and reading weights is most of what such a step does. So only runs of small layers are
scanned (`SCANNED_BYTES`).
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.rules import MESH_AXES
from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.models.decoder import Block, Decoder, MixerBlock, make_block
from opendeep_jax.models.layers import gathered
from opendeep_jax.models.parameters import Arrays, ModelDefinition, named_variables
from opendeep_jax.parallel.axes import weight_specs

SCANNED_BYTES = 1 << 20
"""Layers of up to so many bytes are scanned: a copy of them costs less than their part of a longer program."""
SCANNED_LAYERS = 4
"""Shorter runs are not: their programs are small."""


class Weights(NamedTuple):
    """All arrays of a model. A pytree."""

    runs: tuple[Arrays, ...]
    """Each run's, by name inside the block; of several layers stacked."""
    shared: Arrays
    """The others, MTP modules' too, by name in the model."""


class Run(NamedTuple):
    """Consecutive layers of one kind: a single one, or several that are scanned."""

    stack: str
    layers: range
    sliding: bool


@dataclass(frozen=True, eq=False)
class EngineLayout:
    """Sharding of a model's arrays in the engine, and the definition of its modules; made by `layout_of`."""

    config: ModelConfig
    mesh: Mesh
    runs: tuple[Run, ...]
    blocks: tuple[ModelDefinition, ...]
    """Each run's layer."""
    shared: ModelDefinition
    """The model without its layers."""
    copies_head: bool
    """True if the model's head is its embedding and the engine keeps a copy of it."""

    def block(self, run: int, arrays: Arrays) -> Block | MixerBlock:
        """Return a layer of a run, its divided weights put together as the device computes with them."""
        return self._whole(self.blocks[run].model(arrays, {}))

    def outside(self, weights: Weights) -> Decoder:
        """Return the model without its layers: embedding, final norm, head, MTP modules."""
        return self.shared.model(weights.shared, {})

    def mtp(self, weights: Weights, module: int) -> nnx.Module:
        """Return an MTP module, its weights put together."""
        return self._whole(self.outside(weights).mtp[module])

    def _whole(self, module: nnx.Module) -> nnx.Module:
        graph, state = nnx.split(module)
        return nnx.merge(graph, gathered(state, self.config.dtype))

    def specs(self) -> Weights:
        """Return the partition spec of each array."""
        runs = []
        for run, block in zip(self.runs, self.blocks, strict=True):
            specs = weight_specs(block, self.mesh)
            stacked = {name: PartitionSpec(None, *spec) for name, spec in specs.items()}
            runs.append(stacked if len(run.layers) > 1 else specs)
        return Weights(tuple(runs), weight_specs(self.shared, self.mesh))


@functools.lru_cache(maxsize=64)
def layout_of(config: ModelConfig, mesh: Mesh) -> EngineLayout:
    """Return the layout of a model on a mesh; no array is made."""
    # A CPU multiplies a few rows faster by a head that lies as such than by the embedding's transpose.
    copies_head = config.tie_embeddings and mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    config = replace(config, tie_embeddings=config.tie_embeddings and not copies_head)
    blocks: dict[str, ModelDefinition] = {}
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    for stack in config.layer_stacks:
        module = nnx.eval_shape(lambda stack=stack: make_block(config, stack, nnx.Rngs(0)))
        blocks[stack] = ModelDefinition(*named_variables(module, config))
        setattr(model, stack, nnx.data(None))
    shared = ModelDefinition(*named_variables(model, config))
    runs = tuple(_runs(config, blocks))
    return EngineLayout(config, mesh, runs, tuple(blocks[run.stack] for run in runs), shared, copies_head)


def _runs(config: ModelConfig, blocks: dict[str, ModelDefinition]) -> Iterable[Run]:
    """Yield the layers in their order, those that are scanned together."""
    stacks = {layer: stack for stack, layers in config.layer_stacks.items() for layer in layers}
    kinds = [(stacks[layer], layer in config.attention.sliding_layers) for layer in range(config.num_layers)]
    first = 0
    for (stack, sliding), layers in groupby(kinds):
        end = first + len(list(layers))
        size = sum(math.prod(x.shape) for x in blocks[stack].shapes().values()) * jnp.dtype(config.dtype).itemsize
        count = end - first if size <= SCANNED_BYTES and end - first >= SCANNED_LAYERS else 1
        yield from (Run(stack, range(at, at + count), sliding) for at in range(first, end, count))
        first = end


def check_names(layout: EngineLayout, arrays: Arrays) -> None:
    """Raise ConfigError for arrays of another model."""
    of_layers = zip(layout.runs, layout.blocks, strict=True)
    known = {f"{run.stack}.{name}" for run, block in of_layers for name in block.variables}
    known |= layout.shared.variables.keys() - ({"head.kernel"} if layout.copies_head else set())
    if wrong := sorted(known ^ arrays.keys()):
        raise ConfigError(
            f"{wrong[0]}: {'is missing' if wrong[0] in known else 'is no weight of this model'}; these are not the "
            "weights that the engine was made for. Make an engine of their model."
        )


def convert(layout: EngineLayout, arrays: Arrays, consume: bool = False) -> Weights:
    """Return a model's arrays in the generator's layout and dtype, as new arrays; compiled once for a layout.

    Args:
        arrays: parameters and router biases by name, as training has them, on any devices. Where they are divided over
            several processes, all call this together, and each gets a copy on its own devices (`to_devices`).
        consume: give each array up once it is converted, so that there is never more than one of them twice.
    """
    weights = Weights(tuple({} for _ in layout.runs), {})
    for names in [(name,) for name in arrays] if consume else [tuple(sorted(arrays))]:
        program, shardings = _conversion(layout, names)
        given = {name: to_devices(arrays[name], shardings[name]) for name in names}
        with jax.set_mesh(layout.mesh):
            new = program(given)
        for own, more in zip((*weights.runs, weights.shared), (*new.runs, new.shared), strict=True):
            own.update(more)
        if consume:
            jax.block_until_ready(new)
            arrays[names[0]].delete()
    return weights


@functools.lru_cache(maxsize=1024)
def _conversion(layout: EngineLayout, names: tuple[str, ...]):
    """Return the compiled conversion of these arrays, and how each is to lie before it."""
    specs, dtype, mesh = layout.specs(), layout.config.dtype, layout.mesh
    pieces, given = [], {}  # (name, place in the weights, name there, rows of the stack), and specs by name
    for name in names:
        if name in layout.shared.variables:
            pieces.append((name, -1, name, None))
            given[name] = specs.shared[name]
            continue
        stack, _, inside = name.partition(".")
        for place, run in enumerate(layout.runs):
            if run.stack == stack:
                first = layout.config.layer_stacks[stack].index(run.layers[0])
                rows = slice(first, first + len(run.layers)) if len(run.layers) > 1 else first
                pieces.append((name, place, inside, rows))
                given[name] = PartitionSpec(None, *weight_specs(layout.blocks[place], mesh)[inside])
    if layout.copies_head and "embedding.embedding" in names:
        pieces.append(("embedding.embedding", -1, "head.kernel", None))

    def assemble(value) -> Weights:
        parts = [{} for _ in (*layout.runs, layout.shared)]
        for name, place, inside, rows in pieces:
            parts[place][inside] = value(name, place, inside, rows)
        return Weights(tuple(parts[:-1]), parts[-1])

    def convert(arrays: Arrays) -> Weights:
        def value(name, place, inside, rows):
            if name != inside and place < 0:
                return arrays[name].astype(dtype).T
            definition = layout.shared if place < 0 else layout.blocks[place]
            part = arrays[name] if rows is None else arrays[name][rows]
            return jnp.copy(definition.in_compute_dtype({inside: part}, dtype)[inside])  # never the same memory

        return assemble(value)

    def sharding(name, place, inside, rows):
        return NamedSharding(mesh, (*specs.runs, specs.shared)[place][inside])

    program = jax.jit(convert, out_shardings=assemble(sharding))
    return program, {name: NamedSharding(mesh, spec) for name, spec in given.items()}


def to_devices(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Return an array as it lies on this process's devices.

    One that is divided over the devices of several processes is gathered first: each device has a whole copy of it for
    a moment, and all processes call this together, for the same arrays in the same order.
    """
    if not x.is_fully_addressable:
        with jax.set_mesh(x.sharding.mesh):
            x = _gather(x.sharding.mesh)(x).addressable_data(0)
    return jax.device_put(x, sharding)


@functools.cache
def _gather(mesh: Mesh):
    return jax.jit(jnp.copy, out_shardings=NamedSharding(mesh, PartitionSpec()))


def one_device_mesh() -> Mesh:
    """Return the mesh of this process's first device."""
    devices = np.array(jax.local_devices()[:1]).reshape([1] * len(MESH_AXES))
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
