"""Training state and the sharding of its arrays."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from opendeep_jax.config.schedule import borders
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.faults.health import Health, after_skipped_batch, new_health
from opendeep_jax.models.decoder import Decoder
from opendeep_jax.models.parameters import Arrays, ModelDefinition, split
from opendeep_jax.parallel.axes import divided_further, partition_spec

BASE = "base"
"""The group of `TrainState.frozen` that belongs to the trained model itself."""


class TrainState(NamedTuple):
    """All that changes while training, and the weights that do not; a pytree."""

    step: Int[Array, ""]
    """Steps done, int32."""
    params: Arrays
    """Float32 master weights by name."""
    opt_state: optax.OptState
    """The optimizer's moments."""
    router_bias: Arrays
    """Router biases by name, [layers, experts] or [experts]."""
    health: Health
    """Statistics for the check of the next step's update."""
    frozen: dict[str, Arrays] = {}
    """Weights that do not train, by name, in groups: under BASE, weights of the model itself that `params` then lacks;
    under another name (`reference`, `teacher`), what the objective reads of another model. They have no masters and no
    moments; a checkpoint holds their digests, and they are given again when it is read."""


def init_state(
    config: RunConfig, optimizer: optax.GradientTransformation, frozen: dict[str, Arrays] | None = None
) -> TrainState:
    """The state before the first step, a function of the configuration, its seed and the frozen weights."""
    frozen = frozen or {}
    _, params, router_bias = split(Decoder(config.model, rngs=nnx.Rngs(config.seed)))
    params = {name: array for name, array in params.items() if name not in frozen.get(BASE, {})}
    return TrainState(jnp.int32(0), params, optimizer.init(params), router_bias, new_health(), frozen)


def skip_batch(
    config: RunConfig, judge_loss: bool, state: TrainState, loss: jax.Array, grad_norm: jax.Array
) -> TrainState:
    """The state after a step whose batch is skipped: the step's number, and what the next ones are compared with.

    Args:
        judge_loss: whether the objective names a scalar by which a step is a spike.
        loss, grad_norm: of the step, where it was checked before it was undone; NaN where that isn't known.
    """
    health = after_skipped_batch(config.faults, borders(config), state.step, state.health, loss, grad_norm, judge_loss)
    return state._replace(step=state.step + 1, health=health)


def state_shardings(
    state: TrainState, definition: ModelDefinition, mesh: Mesh | AbstractMesh, zero_1: bool = False
) -> TrainState:
    """Return the sharding of each array of a (possibly abstract) state: optimizer state like the weight whose name it
    carries.

    Args:
        zero_1: moments are divided over the devices that hold copies of their weight, too.
    """
    axes = definition.axes()

    def sharding(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in axes]
        if not names or len(axes[names[-1]]) != len(leaf.shape):
            return NamedSharding(mesh, PartitionSpec())
        spec = partition_spec(axes[names[-1]], leaf.shape, mesh, at_rest=True)
        if zero_1 and isinstance(path[0], jax.tree_util.GetAttrKey) and path[0].name == "opt_state":
            spec = divided_further(spec, leaf.shape, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def abstract_state(
    config: RunConfig,
    optimizer: optax.GradientTransformation,
    definition: ModelDefinition,
    mesh: Mesh,
    frozen: dict[str, Arrays] | None = None,
) -> TrainState:
    """Shapes, dtypes and shardings of a run's state; no array is made, and frozen weights are those that are given."""
    shapes = jax.eval_shape(lambda frozen: init_state(config, optimizer, frozen), frozen or {})
    placed = placed_state(shapes, definition, mesh, config.parallel.shard_optimizer_over_replicas)
    return placed._replace(frozen=frozen) if frozen else placed


def placed_state(shapes: TrainState, definition: ModelDefinition, mesh, zero_1: bool) -> TrainState:
    """A state's shapes and dtypes with the shardings of `state_shardings`; the mesh may be abstract."""

    def placed(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(placed, shapes, state_shardings(shapes, definition, mesh, zero_1))


def bytes_on_each_device(arrays) -> int:
    """Bytes that a pytree of (possibly abstract) arrays takes on the device that holds the most of each."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def create_state(config: RunConfig, optimizer: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """Build the first state in place on the mesh, no device ever holding more than its share."""
    # This program runs once: on a CPU, compiling it takes far longer than running it, so it is compiled without effort,
    # by the emitters that write LLVM code at once. The numbers are the same.
    quick = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    effort = quick if jax.default_backend() == "cpu" else None
    shardings = jax.tree.map(lambda x: x.sharding, abstract._replace(frozen={}))

    def first() -> TrainState:
        return init_state(config, optimizer, abstract.frozen)._replace(frozen={})

    return jax.jit(first, out_shardings=shardings, compiler_options=effort)()._replace(frozen=abstract.frozen)
