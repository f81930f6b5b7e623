"""The true training step of a run, compiled for chips that are not there."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schedule import Stage
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.plan.roofline import Network
from opendeep_jax.plan.shortage import Shortage, report_if_killed, shortage_in
from opendeep_jax.plan.topology import Topology, compile_only_devices


class MemoryUse(NamedTuple):
    """Compiler's allocation of one device's memory, in bytes."""

    arguments: float
    """The state and the batch."""
    temporaries: float
    outputs: float
    """Results, donated or not."""
    donated: float
    """Results that take the place of arguments."""

    @classmethod
    def of(cls, compiled) -> "MemoryUse":
        """Return the memory use of a compiled program (`jax.stages.Compiled`)."""
        sizes = compiled.memory_analysis()
        use = cls(
            sizes.argument_size_in_bytes,
            sizes.temp_size_in_bytes,
            sizes.output_size_in_bytes,
            sizes.alias_size_in_bytes,
        )
        # The temporaries that libtpu 0.0.42 (jax 0.10) gives are more than it allots, by a third for a large model;
        # its peak is within 1% of what it allots. Newer ones give the same either way.
        excess = use.total - sizes.peak_memory_in_bytes if sizes.peak_memory_in_bytes > use.arguments else 0
        return use._replace(temporaries=use.temporaries - max(excess, 0))

    @property
    def total(self) -> float:
        """All at once."""
        return self.arguments + self.temporaries + max(self.outputs - self.donated, 0.0)


class CompiledStep(NamedTuple):
    """A compiled training step."""

    text: str
    """The optimized HLO."""
    memory: MemoryUse
    seconds: float
    """Tracing, lowering and compiling."""
    network: Network


class OutOfResource(Exception):
    """The compiler found no way to fit the program into what the chips, or this machine, have."""

    def __init__(self, shortage: Shortage, seconds: float):
        super().__init__(shortage.words)
        self.shortage, self.seconds = shortage, seconds


def prepare_process() -> None:
    """Set the environment for compiling without accelerators; call it before JAX is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # libtpu asks a server for the machine's own chips, and lets one process at a time use them: here are none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@contextmanager
def quiet_compilers() -> Iterator[None]:
    """Suppress what the compilers' C++ code writes to standard error, except when the block raises."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def compile_step(config: RunConfig, stage: Stage, topology: Topology) -> CompiledStep:
    """Compile the training step of `config`, with the batch of `stage`, for a topology.

    Raises:
        ConfigError: where the mesh can't be laid over the topology.
        OutOfResource: where the compiler says so.
    """
    import jax

    from opendeep_jax.parallel.mesh import make_mesh
    from opendeep_jax.train.setup import assemble, check_implementations, compiler_options

    with quiet_compilers():
        devices = compile_only_devices(topology)
    try:
        mesh = make_mesh(config.parallel, devices)
    except (ValueError, NotImplementedError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"--topology={topology.name}: the mesh cannot be laid over it ({first}). Use axis sizes that are products "
            "of its dimensions, and a data axis that the slices divide."
        ) from error
    begun = time.perf_counter()
    with jax.set_mesh(mesh):
        check_implementations(config)
        setup = assemble(config, mesh)
        platform = {"tpu": "tpu", "gpu": "cuda"}[topology.chip.platform]
        options = compiler_options(config, topology.chip.name, topology.chip.platform, setup.template)
        try:
            traced = setup.programs.trace(stage.batch_size, stage.length)
            lowered = traced.lower(lowering_platforms=(platform,))
            with report_if_killed(), quiet_compilers():
                compiled = lowered.compile(compiler_options=options)
        except (jax.errors.JaxRuntimeError, ValueError, MemoryError) as error:
            shortage = shortage_in("std::bad_alloc" if isinstance(error, MemoryError) else str(error))
            if not shortage.resource and not isinstance(error, jax.errors.JaxRuntimeError):
                raise  # no compiler's word
            raise OutOfResource(shortage, time.perf_counter() - begun) from error
    seconds = time.perf_counter() - begun
    return CompiledStep(compiled.as_text(), MemoryUse.of(compiled), seconds, Network.of_mesh(topology, mesh))
