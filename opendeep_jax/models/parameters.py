"""A model's arrays by name, apart from the model: what optimizers, checkpoints and files see.

A name is the path through the modules, `moe_layers.moe.gate`. Both dictionaries are plain pytrees.
"""

from typing import Any, NamedTuple

import jax
from flax import nnx

from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.models.decoder import Decoder
from opendeep_jax.models.moe import RouterBias
from opendeep_jax.parallel.axes import partition_spec

Arrays = dict[str, Any]
"""Arrays by name: concrete, traced or abstract; in the specs of a program, how each of them is divided."""


class ModelDefinition(NamedTuple):
    """A model without its arrays: the module graph, and each array's Variable with shape, dtype and logical axes."""

    graph: nnx.GraphDef
    variables: dict[str, nnx.Variable]

    def model(self, params: Arrays, router_bias: Arrays) -> Decoder:
        """The model made of these arrays; works inside `jax.jit`. Raises KeyError for a missing name."""
        arrays = {**params, **router_bias}
        flat = [(_path(name), placed(variable, arrays[name])) for name, variable in self.variables.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))

    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical axis names of each array."""
        return {name: variable.get_metadata("logical_axes") for name, variable in self.variables.items()}

    def in_compute_dtype(self, params: Arrays, dtype) -> Arrays:
        """Weights as a step multiplies by them. Vectors, routers, embedding and head stay as they are: the first are
        computed with in float32, and the embedding's gradient adds up in it.
        """

        def cast(name: str, array: jax.Array) -> jax.Array:
            axes = [axis for axis in self.axes()[name] if axis != "layers"]
            return array if len(axes) < 2 or {"router", "vocab"} & set(axes) else array.astype(dtype)

        return {name: cast(name, array) for name, array in params.items()}

    def shapes(self, kind: type[nnx.Variable] = nnx.Variable) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each array of a kind."""
        return {name: variable.get_value() for name, variable in self.variables.items() if isinstance(variable, kind)}


def placed(variable: nnx.Variable, array: jax.Array) -> nnx.Variable:
    """The variable with this array; inside a per-device program it also knows how its array is divided."""
    placed = variable.replace(array)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        axes, shape = variable.get_metadata("logical_axes"), variable.get_value().shape
        placed.set_metadata(spec=tuple(partition_spec(axes, shape, mesh)))
    return placed


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def split(model: Decoder) -> tuple[ModelDefinition, Arrays, Arrays]:
    """Split a model into definition, parameters and router biases."""
    graph, variables = named_variables(model, model.config)
    params = {name: v.get_value() for name, v in variables.items() if isinstance(v, nnx.Param)}
    router_bias = {name: v.get_value() for name, v in variables.items() if isinstance(v, RouterBias)}
    return ModelDefinition(graph, variables), params, router_bias


def named_variables(module: nnx.Module, config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, nnx.Variable]]:
    """A module's graph, and its Variables by name with the logical axes that the configuration gives them."""
    graph, state = nnx.split(module)
    variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    if config.execution.dense_weights_over_experts:
        for variable in variables.values():
            axes = variable.get_metadata("logical_axes")
            axes = tuple("embed_over_experts" if axis == "embed" else axis for axis in axes)
            variable.set_metadata(logical_axes=axes)
    return graph, variables


def model_definition(config: ModelConfig) -> ModelDefinition:
    """The definition of a model of any size; no array is made."""
    return split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]
