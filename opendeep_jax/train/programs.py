"""The compiled training step, for each shape of batch that a run has."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas.cross_entropy import api as cross_entropy
from kernels_pallas.flash_mla import api as flash_mla
from kernels_pallas.grouped_matmul import api as grouped_matmul
from kernels_pallas.target import PLATFORMS, chip, choose, platform
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schedule import Stage, stage_at
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.parallel.chips import CHIPS, GB
from opendeep_jax.parallel.distributed import share, words
from opendeep_jax.parallel.mesh import batch_sharding, global_rows
from opendeep_jax.train.compiling import compiling
from opendeep_jax.train.state import TrainState, bytes_on_each_device


def use_compilation_cache(config: RunConfig) -> None:
    """Keeps compiled programs in `train.compilation_cache`, so that the next start is quick."""
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
    """Raises ConfigError for a kernel's implementation that there isn't, or that the mesh's platform lacks."""
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


def compiler_options(config: RunConfig, chip: str, platform: str, state: TrainState) -> dict[str, str | int]:
    """The options for a run's training step: the chip's, then the configuration's own for this platform.

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


def abstract_batch(config: RunConfig, stage: Stage, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a stage's batches, with the rows of padding; no array is made."""
    sharding, shape = batch_sharding(mesh), (global_rows(config, stage.batch_size, mesh), stage.length)
    whole = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    mask = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=sharding)
    return Batch(whole, whole, mask, whole, whole)


class Programs:
    """The compiled training step for each shape of the run's batches, made when it is first needed."""

    def __init__(self, config: RunConfig, step_function, template: TrainState, mesh: Mesh):
        self.config, self.step_function, self.template, self.mesh = config, step_function, template, mesh
        self.options = compiler_options(config, chip(), platform(), template)
        self.compiled: dict[tuple[int, int], jax.stages.Compiled] = {}
        self.say = None
        """Takes a line about what is compiled (`compiling.compiling`); None says nothing."""

    def has(self, step: int) -> bool:
        """Whether the program of `step` (from 0) is compiled: not at the first step of a phase or a ramp's stage."""
        return self._shape(step) in self.compiled

    def rows(self, step: int) -> int:
        """Rows in the batch of `step` (from 0), with those of padding."""
        return global_rows(self.config, self._shape(step)[0], self.mesh)

    def at(self, step: int) -> jax.stages.Compiled:
        """The program of `step` (from 0), compiled for the batch that it has."""
        shape = self._shape(step)
        if shape not in self.compiled:
            batch = abstract_batch(self.config, stage_at(self.config, step), self.mesh)
            what = f"the training step for batches of {shape[0]:,} x {shape[1]:,} tokens"
            with compiling(what, self.config.train.compilation_cache, self._key(shape), self.say):
                lowered = self.step_function.lower(self.template, batch)
                self.compiled[shape] = lowered.compile(compiler_options=self.options)
            _meet(f"compiled/{len(self.compiled)}")
        return self.compiled[shape]

    def _key(self, shape: tuple[int, int]) -> tuple:
        """What the time of compiling depends on."""
        run, train = self.config, self.config.train
        pieces = train.accumulation_steps, train.rows_per_device, train.loss_chunk, run.optimizer.kind
        return run.model, run.parallel, pieces, shape, chip(), self.mesh.size, jax.__version__

    def _shape(self, step: int) -> tuple[int, int]:
        stage = stage_at(self.config, step)
        return stage.batch_size, stage.length


def _meet(name: str) -> None:
    """Returns when all processes of the job are here. A first collective does not wait long for a peer: half a minute
    on a CPU, which on busy cores another one may take longer to compile. The watchdog ends a wait for one that is gone.
    """
    share(f"{name}/{jax.process_index()}", "")
    while len(words(name)) < jax.process_count():
        time.sleep(0.05)
