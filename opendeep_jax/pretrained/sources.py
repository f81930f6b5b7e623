"""Sources of a model to generate with: a run, a Hugging Face directory, or a GGUF file.

JAX is loaded with the weights only, so that a source that is none is refused at once.
"""

import contextlib
import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from opendeep_jax.models.decoder import Decoder
    from opendeep_jax.text.tokenizer import Tokenizer

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Sampling settings of a generation_config.json, under the names that `SamplingParams` has too."""
DTYPES = ("float32", "bfloat16")
CURE = (
    "Give a run's work directory, a directory with a Hugging Face model (config.json and *.safetensors), or a .gguf "
    "file, such as --model=runs/quickstart."
)


def source_kind(source: str | Path) -> Literal["run", "hf", "gguf"]:
    """Return the kind of a source. Raises ConfigError where it is none."""
    path = Path(source)
    if not str(source):
        raise ConfigError(f"--model is missing. {CURE}")
    if not path.exists():
        raise ConfigError(f"--model={source}: is not there. {CURE}")
    if path.is_file():
        if path.suffix == ".gguf":
            return "gguf"
        raise ConfigError(f"--model={source}: is a file of another kind than .gguf. {CURE}")
    weights = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "*.pt", "*.pth")
    if any(next(path.glob(pattern), None) for pattern in weights):
        return "hf"
    if (path / "config.json").is_file():
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if "model_type" in json.loads((path / "config.json").read_text("utf-8")):
                return "hf"  # its weights are missing, and whoever reads it says so
        load_run_config(path)
        return "run"
    files = sorted(file.name for file in path.glob("*.gguf"))
    if files:
        found = ", ".join(files[:5])
        raise ConfigError(f"--model={source}: holds {found}. Name one of them: --model={path / files[0]}.")
    raise ConfigError(f"--model={source}: holds no model. {CURE}")


def open_tokenizer(source: str | Path) -> tuple["Tokenizer", str]:
    """Return a source's tokenizer and the name of its model. Raises ConfigError for damaged files."""
    path = Path(source).resolve()
    match source_kind(source):
        case "gguf":
            from opendeep_jax.interop.gguf_file import read_gguf
            from opendeep_jax.text.gguf_tokenizer import tokenizer_from_gguf_fields

            return tokenizer_from_gguf_fields(read_gguf(path).fields), path.stem
        case "hf":
            from opendeep_jax.text.files import tokenizer_from_hf

            return tokenizer_from_hf(path), path.name
        case "run":
            from opendeep_jax.data.recorded import model_tokenizer

            return model_tokenizer(path), load_run_config(path).name or path.name


def sampling_defaults(tokenizer: "Tokenizer") -> dict[str, float]:
    """Return how a model's own generation_config.json samples, as far as it says, wherever the model came from."""
    found = {name: tokenizer.generation.get(name) for name in SAMPLING}
    given = {name: value for name, value in found.items() if isinstance(value, int | float) and type(value) is not bool}
    return {name: value for name, value in given.items() if _is_honored(name, value)}


def _is_honored(name: str, value: float) -> bool:
    """Return whether a sampling setting of a file can be honored; warn about the others, which are ignored."""
    from opendeep_jax.generation.requests import SamplingParams

    try:
        SamplingParams(**{name: value})
    except ConfigError as error:
        logging.getLogger(__name__).warning("generation_config.json: %s It is left out.", error)
        return False
    return True


def open_weights(source: str | Path, dtype: str = "", step: int | None = None, mesh: "Mesh | None" = None) -> "Decoder":
    """Return the model of a source.

    Args:
        source: A run's work directory, a Hugging Face directory, or a .gguf file.
        dtype: Of the weights and the computation, float32 or bfloat16; by default float32 on CPUs, else bfloat16.
        step: Checkpoint of a run; the newest by default.
        mesh: Devices that each array is divided over as it is read; by default all go to the first device.

    Raises:
        ConfigError: there is no such model, or its files are not sound.
    """
    kind = source_kind(source)
    path = Path(source).resolve()
    check_choice(kind, source, dtype, step)
    import jax

    keep_programs()
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    match kind:
        case "gguf":
            from opendeep_jax.interop.gguf import load_gguf

            return load_gguf(path, dtype=dtype, mesh=mesh)
        case "hf":
            from opendeep_jax.interop import load_hf

            return load_hf(path, dtype=dtype, mesh=mesh)
        case "run":
            return _run_weights(path, dtype, step, mesh)


def keep_programs() -> None:
    """Keep compiled programs in the user's cache directory, so that a second start compiles nothing; where JAX was
    told another place already, there."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "opendeep", "xla")
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def open_model(source: str | Path, dtype: str = "", step: int | None = None) -> tuple["Decoder", "Tokenizer", str]:
    """`open_weights` and `open_tokenizer`: the model, its tokenizer, its name. Raises ConfigError as they do."""
    check_choice(source_kind(source), source, dtype, step)
    tokenizer, name = open_tokenizer(source)
    return open_weights(source, dtype, step), tokenizer, name


def check_choice(kind: str, source: str | Path, dtype: str, step: int | None) -> None:
    """Raise ConfigError for an unknown dtype, and for a step of a source without steps."""
    if dtype not in ("", *DTYPES):
        raise ConfigError(f"--dtype={dtype}: must be float32 or bfloat16. Leave it out to have what suits the machine.")
    if step is not None and kind != "run":
        raise ConfigError(f"--step={step}: only a run has steps, and {source} is none. Leave --step out.")


def _run_weights(workdir: Path, dtype: str, step: int | None, mesh: "Mesh | None") -> "Decoder":
    from opendeep_jax.checkpoint.checkpoints import load_model
    from opendeep_jax.models.parameters import model_definition, split

    model, _ = load_model(workdir, step, mesh)
    config = dataclasses.replace(model.config, dtype=dtype)
    _, params, router_bias = split(model)
    del model
    for name in list(params):  # one after the other, so that the masters go as their copies come
        params[name] = params[name].astype(dtype)
    return model_definition(config).model(params, router_bias)
