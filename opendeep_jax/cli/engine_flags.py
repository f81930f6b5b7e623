"""Flags that `generate`, `chat`, `serve` and `eval` share: the model, its precision and its devices.

The help of these flags stands here alone, and so do the rules of how they go together.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from absl import flags

from opendeep_jax.cli.flags import make_flags, parse
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.rules import MESH_AXES
from opendeep_jax.config.schema import ParallelConfig
from opendeep_jax.generation.requests import SamplingParams
from opendeep_jax.pretrained.engines import ENGINE_AXES, Choice
from opendeep_jax.pretrained.sources import check_choice, sampling_defaults, source_kind

if TYPE_CHECKING:
    from opendeep_jax.text.tokenizer import Tokenizer

SOURCE = {
    "model": ("", "A run's work directory, a Hugging Face directory, or a .gguf file."),
    "workdir": ("", "The same as --model, for a run."),
    "step": (-1, "Step of a run's checkpoint; -1 takes the newest."),
    "dtype": ("", "float32 or bfloat16; by default what suits the machine."),
}
DEVICES = {
    "parallel.data": (1, "Devices with a copy of the model each; answers are divided over them."),
    "parallel.fsdp": (1, "Devices that share a copy, and gather each layer as they need it; answers are divided."),
    "parallel.expert": (1, "Devices that the experts are divided over, and answers too."),
    "parallel.tensor": (1, "Devices that heads and widths are divided over. One of the four may be -1: what is left."),
}


def read_flags(
    own: Mapping[str, tuple[str | int | float, str]],
    argv: Sequence[str],
    program: str,
    purpose: str,
    usage: str,
    least: Mapping[str, float],
) -> tuple[flags.FlagValues, Choice]:
    """Return the values of a command's own flags and of the shared ones, and the choice of a model that is there.

    Prints help and raises SystemExit(0) for --help. JAX is not loaded.

    Args:
        own: The command's flags, each `name=(default, help)`.
        least: The smallest value that a flag may have, by name.

    Raises:
        ConfigError: wrong arguments, values below their least, no model or one that is none.
    """
    for axis in set(MESH_AXES) - set(ENGINE_AXES):
        if any(argument.partition("=")[0] == f"--parallel.{axis}" for argument in argv):
            raise ConfigError(
                f"--parallel.{axis}: generation divides neither a text nor the stack of layers. Divide answers over "
                "--parallel.data, --parallel.fsdp or --parallel.expert, and heads over --parallel.tensor."
            )
    values = parse(make_flags(**SOURCE, **own, **DEVICES), argv, program, purpose, usage)
    if values.model and values.workdir:
        raise ConfigError("--model and --workdir are both given, and mean the same. Leave one out.")
    for name, smallest in {"step": -1, **least}.items():
        value = values[name].value
        if not (math.isfinite(value) and value >= smallest):
            raise ConfigError(f"--{name}={value}: must be at least {smallest:g}.")
    source, step = values.model or values.workdir, None if values.step < 0 else values.step
    check_choice(source_kind(source), source, values.dtype, step)
    parallel = ParallelConfig(**{axis: values[f"parallel.{axis}"].value for axis in ENGINE_AXES})
    return values, Choice(source, values.dtype, step, parallel)


def sampling(values: flags.FlagValues, tokenizer: "Tokenizer", **given: int) -> SamplingParams:
    """Return the parameters that --temperature, --top_k, --top_p, --min_p and --seed ask for; `given` goes before.

    What is not on the command line is as the model's own generation_config.json has it, if that says something.

    Raises ConfigError for a value that makes no sense.
    """
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    try:
        asked = {name: values[name].value for name in names}
        own = sampling_defaults(tokenizer)
        own = {name: value for name, value in own.items() if name not in names or not values[name].present}
        return SamplingParams(**asked | own | given)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from error
