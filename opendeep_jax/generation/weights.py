"""A model's weights as the generator holds them: each layer's by themselves, in the compute dtype.

Training stacks layers and scans them, which keeps compiling cheap; a slice of a stack would be copied out at each of a
generator's steps, though, and reading weights is most of what such a step does.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.models.decoder import Block, Decoder, MixerBlock, make_block
from opendeep_jax.models.layers import gathered
from opendeep_jax.models.parameters import Arrays, Skeleton, named_variables, split
from opendeep_jax.parallel.axes import partition_spec


class Weights(NamedTuple):
    """All arrays of a model. A pytree."""

    layers: tuple[Arrays, ...]
    """Each layer's, by name inside the block."""
    shared: Arrays
    """The others, MTP modules' too, by name in the model."""


class Bones(NamedTuple):
    """What turns arrays into modules. Hashable by identity; made once for an engine."""

    config: ModelConfig
    blocks: tuple[Skeleton, ...]
    """Each layer's."""
    shared: Skeleton
    """The model without its layers."""

    def block(self, layer: int, weights: Weights) -> Block | MixerBlock:
        """A layer, its divided weights put together as the device computes with them."""
        return self._whole(self.blocks[layer], weights.layers[layer])

    def outside(self, weights: Weights) -> Decoder:
        """The model without its layers: embedding, final norm, head, MTP modules."""
        return self.shared.model(weights.shared, {})

    def mtp(self, weights: Weights, module: int):
        """A MTP module, its weights put together."""
        graph, state = nnx.split(self.outside(weights).mtp[module])
        return nnx.merge(graph, gathered(state, self.config.dtype))

    def _whole(self, skeleton: Skeleton, arrays: Arrays):
        graph, state = nnx.split(skeleton.model(arrays, {}))
        return nnx.merge(graph, gathered(state, self.config.dtype))


def make_bones(config: ModelConfig) -> Bones:
    """The modules of a model's layers and of what is around them; no array is made."""

    blocks: dict[int, Skeleton] = {}
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    for stack, layers in config.layer_stacks.items():
        module = nnx.eval_shape(lambda stack=stack: make_block(config, stack, nnx.Rngs(0)))
        blocks |= dict.fromkeys(layers, Skeleton(*named_variables(module, config)))
        setattr(model, stack, nnx.data(None))
    shared = Skeleton(*named_variables(model, config))
    return Bones(config, tuple(blocks[layer] for layer in range(config.num_layers)), shared)


def take_apart(model: Decoder, mesh=None, consume: bool = False) -> tuple[Bones, Weights]:
    """A model's layers by themselves, in the compute dtype.

    Args:
        mesh: devices to divide them over; None leaves them where they are.
        consume: give each of the model's arrays up once its layers are there, so that there is never more than one of
            them twice. The model is of no use afterwards.
    """
    skeleton, params, router_bias = split(model)
    config, arrays = model.config, params | router_bias
    if config.tie_embeddings and mesh is None and jax.default_backend() == "cpu":
        # A CPU multiplies a few rows faster by a head that lies as such than by the embedding's transpose.
        config = replace(config, tie_embeddings=False)
        arrays["head.kernel"] = jnp.array(params["embedding.embedding"].astype(config.dtype).T)
    bones = make_bones(config)

    def cast(name: str, x: jax.Array) -> jax.Array:
        return skeleton.in_compute_dtype({name: x}, model.config.dtype)[name] if name in params else x

    layers: list[Arrays] = [{} for _ in range(model.config.num_layers)]
    for stack, numbers in model.config.layer_stacks.items():
        for name in [name for name in arrays if name.startswith(stack + ".")]:
            whole = arrays.pop(name)
            inside = name.removeprefix(stack + ".")
            for row, layer in enumerate(numbers):
                sharding = None
                if mesh is not None:
                    variable = bones.blocks[layer].variables[inside]
                    axes = variable.get_metadata("logical_axes")
                    sharding = NamedSharding(mesh, partition_spec(axes, whole.shape[1:], mesh))
                layers[layer][inside] = cast(name, _indexing(sharding)(whole, row))
            if consume:
                jax.block_until_ready([layer[inside] for layer in layers if inside in layer])
                whole.delete()
    arrays = {name: cast(name, x) for name, x in arrays.items()}
    if mesh is not None:
        axes = bones.shared.axes()
        arrays = {
            name: jax.device_put(x, NamedSharding(mesh, partition_spec(axes[name], x.shape, mesh)))
            for name, x in arrays.items()
        }
    return bones, Weights(tuple(layers), arrays)


@functools.cache
def _indexing(sharding):
    """A compiled `x[i]` whose result lies so."""
    return jax.jit(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), out_shardings=sharding)


def weight_specs(bones: Bones, mesh) -> Weights:
    """How each array lies on the mesh."""

    def specs(skeleton: Skeleton) -> dict[str, PartitionSpec]:
        axes = skeleton.axes()
        return {name: partition_spec(axes[name], x.shape, mesh) for name, x in skeleton.shapes().items()}

    return Weights(tuple(specs(block) for block in bones.blocks), specs(bones.shared))
