"""A run's training step, put together: model, optimizer, state, objective, and the programs that they compile to.

The loop, the plan, replays and whatever trains on something else take their step from `assemble`.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas.cross_entropy import api as cross_entropy
from kernels_pallas.flash_mla import api as flash_mla
from kernels_pallas.grouped_matmul import api as grouped_matmul
from kernels_pallas.target import PLATFORMS, chip, choose, platform
from opendeep_jax.checkpoint.digests import lanes_of
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.faults.injection import gradient_faults
from opendeep_jax.models.parameters import Arrays, ModelDefinition, model_definition
from opendeep_jax.parallel.chips import CHIPS, GB
from opendeep_jax.parallel.collectives import per_device
from opendeep_jax.parallel.distributed import get_values, put_value
from opendeep_jax.parallel.mesh import batch_sharding, global_rows
from opendeep_jax.train.compiling import compiling
from opendeep_jax.train.objective import DeviceArguments, Objective, pretraining
from opendeep_jax.train.optimizer import make_optimizer
from opendeep_jax.train.state import TrainState, abstract_state, bytes_on_each_device, create_state, skip_batch
from opendeep_jax.train.step import StepOutput, device_arguments, local_gradients, make_train_step


def use_compilation_cache(config: RunConfig) -> None:
    """Enable the cache of compiled programs in `train.compilation_cache`."""
    if config.train.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.train.compilation_cache).absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


_SPARSE_CORE = "xla_tpu_enable_sparse_core_collective_offload"
COMPILER_OPTIONS = {
    # Tokens travel to their experts beside other work; newer compilers do so unasked.
    "tpu": {"xla_tpu_enable_async_ragged_all_to_all": "true"},
    # Gathers and scatters of weights run beside the matmuls only when the SparseCores take them.
    "v5p": {
        f"{_SPARSE_CORE}_all_gather": "true",
        f"{_SPARSE_CORE}_2d_all_gather": "true",
        f"{_SPARSE_CORE}_reduce_scatter": "true",
        f"{_SPARSE_CORE}_nd_reduce_scatter": "true",
    },
    # On a CPU most work is in library matmuls; more effort compiles a quarter longer and runs no faster.
    "cpu": {"xla_backend_optimization_level": 1},
}
"""The compiler's options for a training step, by platform and by chip (`kernels_pallas.target`)."""


def check_implementations(config: RunConfig) -> None:
    """Raise ConfigError for a kernel implementation that does not exist, or not on the mesh's platform."""
    tables = {
        "attention": flash_mla.IMPLEMENTATIONS,
        "grouped_matmul": grouped_matmul.IMPLEMENTATIONS,
        "cross_entropy": cross_entropy.IMPLEMENTATIONS,
    }
    for field, implementations in tables.items():
        name = getattr(config.model.execution, field)
        try:
            choose(field, implementations, name or None)
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"model.execution.{field} = {name!r}: {error}") from error


def compiler_options(config: RunConfig, chip: str, platform: str, state: TrainState) -> dict[str, Any]:
    """Compiler options of a run's training step: the chip's, then the configuration's for this platform.

    Args:
        chip, platform: as `kernels_pallas.target` names them.
        state: shapes, dtypes and shardings of the run's state.
    """
    others = tuple(f"xla_{other}_" for other in PLATFORMS if other != platform)
    own = dict(option.split("=", 1) for option in config.train.compiler_options if not option.startswith(others))
    memory = {}
    if config.train.working_memory_gb and platform == "tpu" and chip in CHIPS:
        sums = 2 if config.train.accumulation_steps > 1 else 1  # a micro-batch's gradients, and their sums
        gradients = sums * bytes_on_each_device(state.params)
        wanted = bytes_on_each_device(state) + gradients + config.train.working_memory_gb * GB
        percent = round(100 * wanted / CHIPS[chip].per_device().memory_bytes)
        memory = {"xla_tpu_scheduler_percent_shared_memory_limit": str(min(percent, 100))}
    return COMPILER_OPTIONS.get(platform, {}) | COMPILER_OPTIONS.get(chip, {}) | memory | own


class StepPrograms:
    """The compiled training step for each shape of a run's batches, made when it is first needed."""

    def __init__(self, config: RunConfig, objective: Objective, step_function, template: TrainState, mesh: Mesh):
        self.config, self.objective, self.mesh = config, objective, mesh
        self.template = template
        self.compiled: dict[tuple[int, int], jax.stages.Compiled] = {}
        self.say = None
        """Takes a line about what is compiled (`compiling.compiling`); None says nothing."""

        def train_step(state: TrainState, frozen: dict, batch: Batch) -> tuple[TrainState, StepOutput]:
            after, output = step_function(state._replace(frozen=frozen), batch)
            return after._replace(frozen={}), output

        self.jitted = jax.jit(train_step, donate_argnums=0)  # frozen weights stay the caller's

    def has(self, rows: int, length: int) -> bool:
        """Return whether the program of this shape is compiled."""
        return (rows, length) in self.compiled

    def of(self, rows: int, length: int) -> Callable[[TrainState, Batch], tuple[TrainState, StepOutput]]:
        """Return the step for batches of so many rows (without those of padding) and this length, compiled."""
        shape = rows, length
        if shape not in self.compiled:
            what = f"the training step for batches of {rows:,} x {length:,} tokens"
            with compiling(what, self.config.train.compilation_cache, self._key(shape), self.say):
                options = compiler_options(self.config, chip(), platform(), self.template)
                self.compiled[shape] = self.trace(rows, length).lower().compile(compiler_options=options)
            _barrier(f"compiled/{len(self.compiled)}")
        return functools.partial(_run, self.compiled[shape])

    def trace(self, rows: int, length: int) -> jax.stages.Traced:
        """Return the step for this shape of batch, traced; no array is made."""
        state, batch = self.template._replace(frozen={}), self.abstract_batch(rows, length)
        return self.jitted.trace(state, self.template.frozen, batch)

    def abstract_batch(self, rows: int, length: int) -> Batch:
        """Return shapes, dtypes and shardings of a batch, with the rows of padding; no array is made."""
        sharding, shape = batch_sharding(self.mesh), (global_rows(self.config, rows, self.mesh), length)

        def array(dtype: str, *more: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*shape, *more), jnp.dtype(dtype), sharding=sharding)

        return Batch(
            tokens=array("int32"),
            targets=array("int32"),
            loss_mask=array("bool"),
            segment_ids=array("int32"),
            positions=array("int32"),
            weights=array("float32") if self.objective.weighted else None,
            extras={
                name: array(kind) if isinstance(kind, str) else array(*kind)
                for name, kind in self.objective.extras.items()
            },
        )

    def _key(self, shape: tuple[int, int]) -> tuple:
        """Return the key of recorded compile times."""
        run, train = self.config, self.config.train
        pieces = train.accumulation_steps, train.rows_per_device, train.loss_chunk, run.optimizer.kind
        return run.model, run.parallel, pieces, shape, chip(), self.mesh.size, jax.__version__


def _run(compiled: jax.stages.Compiled, state: TrainState, batch: Batch) -> tuple[TrainState, StepOutput]:
    frozen = state.frozen
    after, output = compiled(state._replace(frozen={}), frozen, batch)
    return after._replace(frozen=frozen), output


@dataclass(frozen=True)
class Setup:
    """Everything that a step of a run is made of."""

    config: RunConfig
    mesh: Mesh
    objective: Objective
    definition: ModelDefinition
    optimizer: optax.GradientTransformation
    template: TrainState
    """The state's shapes, dtypes and shardings, and its frozen weights."""
    programs: StepPrograms

    def first_state(self) -> TrainState:
        """Return the state before the first step, made in place on the mesh."""
        return create_state(self.config, self.optimizer, self.template)

    def skip_batch(self) -> Callable[[TrainState, float, float], TrainState]:
        """Return the program `(state, loss, gradient norm) -> state` that counts a step and trains on nothing."""
        skip = functools.partial(skip_batch, self.config, self.objective.judged is not None)

        def skipped(state: TrainState, loss: float, grad_norm: float) -> TrainState:
            return program(state._replace(frozen={}), loss, grad_norm)._replace(frozen=state.frozen)

        program = jax.jit(skip, donate_argnums=0)
        return skipped

    def local_digests(self, state: TrainState, batch: Batch) -> jax.Array:
        """Return digests of what each device of the mesh in use computes from its rows: uint32 [devices, arrays, 2]."""
        mesh, arguments = jax.sharding.get_abstract_mesh(), (self.config, self.definition, self.objective)
        given, specs = device_arguments(*arguments, state, batch)

        def device_program(given: DeviceArguments) -> jax.Array:
            grads, measured = local_gradients(*arguments, given)
            return jnp.stack([lanes_of(leaf) for leaf in jax.tree.leaves((measured, grads))])[None]

        lanes = per_device(device_program, (specs,), PartitionSpec(mesh.axis_names))(given)
        return jax.lax.with_sharding_constraint(lanes, PartitionSpec())


def assemble(
    config: RunConfig, mesh: Mesh, objective: Objective | None = None, frozen: dict[str, Arrays] | None = None
) -> Setup:
    """Put a run's step together; no array is made and nothing compiled.

    Args:
        mesh: of devices that need not be attached.
        objective: what is minimized; None takes `pretraining`.
        frozen: weights that do not train (`TrainState.frozen`), on the mesh.
    """
    definition, objective = model_definition(config.model), objective or pretraining(config)
    optimizer = make_optimizer(config, definition.axes())
    template = abstract_state(config, optimizer, definition, mesh, frozen)
    step = make_train_step(config, definition, optimizer, objective, gradient_faults(config.faults.drill))
    programs = StepPrograms(config, objective, step, template, mesh)
    return Setup(config, mesh, objective, definition, optimizer, template, programs)


def _barrier(name: str) -> None:
    """Wait until all processes of the job are here. A first collective does not wait long for a peer: half a minute
    on a CPU, which on busy cores another one may take longer to compile. The watchdog ends a wait for one that is gone.
    """
    put_value(f"{name}/{jax.process_index()}", "")
    while len(get_values(name)) < jax.process_count():
        time.sleep(0.05)
