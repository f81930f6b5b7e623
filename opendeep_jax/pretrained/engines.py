"""Engines from sources: any model, on one device or divided over a mesh, refused before its weights are read."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.rules import MESH_AXES, ROW_AXES
from opendeep_jax.config.schema import ModelConfig, ParallelConfig
from opendeep_jax.pretrained.sources import open_weights, source_kind

if TYPE_CHECKING:
    from opendeep_jax.generation.engine import Engine
    from opendeep_jax.generation.requests import EngineConfig
    from opendeep_jax.text.tokenizer import Tokenizer

ENGINE_AXES = (*ROW_AXES, "tensor")
"""Mesh axes that generation divides its work over."""
ONE_DEVICE = ParallelConfig(fsdp=1)


@dataclass(frozen=True)
class Choice:
    """Choice of a model, its precision and its devices."""

    source: str
    """A run's work directory, a Hugging Face directory, or a .gguf file."""
    dtype: str = ""
    """float32 or bfloat16; empty for what suits the machine."""
    step: int | None = None
    """Checkpoint of a run; None takes the newest."""
    parallel: ParallelConfig = ONE_DEVICE


def open_engine(choice: Choice, tokenizer: "Tokenizer", config: "EngineConfig", default_length: int = 0) -> "Engine":
    """Return an engine of the model that samples from its tokenizer's tokens.

    Args:
        tokenizer: The model's.
        config: Its `vocab_size` is filled in, and its `slots` are raised to what the mesh divides.
        default_length: Longest prompt and output where `config` has no `max_length` and the model allows more; 0
            takes what memory holds in every slot, 4,096 at least.

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
        max_length=config.max_length or (min(default_length, model_config.max_length) if default_length else 0),
        vocab_size=min(tokenizer.vocab_size, model_config.vocab_size),
    )
    check_settings(config, model_config, sizes)
    mesh = None
    if together > 1:
        import jax

        mesh = make_mesh(dataclasses.replace(choice.parallel, **sizes), jax.local_devices()[:together])
    model = open_weights(choice.source, choice.dtype, choice.step, mesh)
    if not config.max_length:
        config = dataclasses.replace(config, max_length=fitting_length(config, model.config, sizes, free_bytes()))
    return Engine(model, config, mesh, consume=True)


def fitting_length(config: "EngineConfig", model: ModelConfig, sizes: Mapping[str, int], free: int) -> int:
    """Return the model's context, or what of it the cache can hold in every slot; 4,096 tokens at least.

    Args:
        config: its `cache_tokens` go before.
        sizes: devices along each mesh axis.
        free: bytes of one device for its part of the cache.
    """
    from opendeep_jax.generation.cache import bytes_per_slot, bytes_per_token
    from opendeep_jax.generation.requests import DEFAULT_LENGTH

    shards = math.prod(sizes[axis] for axis in ROW_AXES)
    slots = config.slots // shards
    of_token = bytes_per_token(model, mtp=config.speculate > 0)
    if model.attention.kind == "gqa":  # latents lie on each of the devices that heads are divided over
        of_token //= sizes["tensor"]
    fits = max(free // slots - bytes_per_slot(model), 0) // max(of_token, 1) // 128 * 128
    if config.cache_tokens:
        fits = config.cache_tokens // shards
    return min(max(fits, DEFAULT_LENGTH), model.max_length)


def free_bytes() -> int:
    """Memory for a cache on each device: most of what an accelerator has left, a quarter of what a host has."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(0.8 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    return available_bytes() // 4


def available_bytes() -> int:
    """Memory that this machine, or the container around this process, has left; 0 if unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        most, used = ((group / name).read_text("ascii") for name in ("memory.max", "memory.current"))
        found.append(int(most) - int(used))
    return max(min(found, default=0), 0)


def read_model_config(source: str | Path) -> ModelConfig:
    """Return the configuration of a source's model, without its weights. Raises ConfigError for damaged files."""
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

    fixed, count = math.prod(size for size in sizes.values() if size != -1), jax.local_device_count()
    if count % fixed:
        found = f"the {count} devices that are found here" if count != 1 else "the one device that is found here"
        raise ConfigError(f"{asked}: {fixed} does not divide {found}. Choose sizes whose product does.")
    return sizes | {axis: count // fixed for axis in free}
