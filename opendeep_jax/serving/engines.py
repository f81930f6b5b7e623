"""Engines from sources: any model, on one device or divided over a mesh, refused before its weights are read."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.rules import MESH_AXES, ROW_AXES
from opendeep_jax.config.schema import ModelConfig, ParallelConfig
from opendeep_jax.serving.sources import open_weights, source_kind

if TYPE_CHECKING:
    from opendeep_jax.data.text_codec import TextCodec
    from opendeep_jax.generation.engine import Engine
    from opendeep_jax.generation.requests import EngineConfig

ENGINE_AXES = (*ROW_AXES, "tensor")
"""Mesh axes that generation divides its work over."""
ONE_DEVICE = ParallelConfig(fsdp=1)


@dataclass(frozen=True)
class Choice:
    """Which model, in what precision, and on which devices."""

    source: str
    """A run's work directory, a Hugging Face directory, or a .gguf file."""
    dtype: str = ""
    """float32 or bfloat16; empty for what suits the machine."""
    step: int | None = None
    """Checkpoint of a run; None takes the newest."""
    parallel: ParallelConfig = ONE_DEVICE


def open_engine(choice: Choice, codec: "TextCodec", config: "EngineConfig", default_length: int = 0) -> "Engine":
    """An engine of the model, which chooses among the tokens of its codec.

    Args:
        codec: The model's.
        config: Its `vocab_size` is filled in, and its `slots` are raised to what the mesh divides.
        default_length: Longest prompt and output where `config` has no `max_length` and the model allows more; 0
            leaves it to the engine.

    Raises:
        ConfigError: the model, the mesh and the settings do not go together (nothing has been read then), or the
            model's files are not sound.
    """
    from opendeep_jax.generation.engine import Engine
    from opendeep_jax.generation.requests import check_settings
    from opendeep_jax.parallel.mesh import make_mesh

    model_config, sizes = read_model_config(choice.source), mesh_sizes(choice.parallel)
    together = math.prod(sizes[axis] for axis in ENGINE_AXES)
    config = dataclasses.replace(
        config,
        slots=-(-config.slots // together) * together,
        max_length=config.max_length or min(default_length, model_config.max_length),
        vocab_size=min(codec.vocab_size, model_config.vocab_size),
    )
    check_settings(config, model_config, sizes)
    mesh = None
    if together > 1:
        import jax

        mesh = make_mesh(dataclasses.replace(choice.parallel, **sizes), jax.devices()[:together])
    model = open_weights(choice.source, choice.dtype, choice.step, mesh)
    return Engine(model, config, mesh, consume=True)


def read_model_config(source: str | Path) -> ModelConfig:
    """The configuration of a source's model, without its weights. Raises ConfigError where its files are not sound."""
    path = Path(source).resolve()
    match source_kind(source):
        case "gguf":
            from opendeep_jax.interop.gguf import config_of
            from opendeep_jax.interop.gguf_file import read_gguf

            return config_of(read_gguf(path))
        case "hf":
            from opendeep_jax.interop import config_from_hf

            return config_from_hf(path)
        case "run":
            from opendeep_jax.config.load import load_run_config

            return load_run_config(path).model.settled()


def mesh_sizes(parallel: ParallelConfig) -> dict[str, int]:
    """Devices along each mesh axis, with -1 filled by the devices of this machine that the others leave.

    Raises ConfigError where they cannot be laid over the devices that there are.
    """
    sizes = {axis: getattr(parallel, axis) for axis in MESH_AXES}
    asked = " ".join(f"--parallel.{axis}={size}" for axis, size in sizes.items() if size != 1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 for axis, size in sizes.items() if axis not in free):
        raise ConfigError(f"{asked}: each must be at least 1; one may be -1, for the devices that the others leave.")
    import jax

    fixed, count = math.prod(size for size in sizes.values() if size != -1), jax.device_count()
    if count % fixed:
        found = f"the {count} devices that are found here" if count != 1 else "the one device that is found here"
        raise ConfigError(f"{asked}: {fixed} does not divide {found}. Choose sizes whose product does.")
    return sizes | {axis: count // fixed for axis in free}
