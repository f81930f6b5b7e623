"""`opendeep import hf|gguf SOURCE --out=DIRECTORY`"""

import dataclasses
import glob
import shlex
from collections.abc import Sequence
from pathlib import Path

from opendeep_jax.cli.flags import make_flags
from opendeep_jax.config.checks import ConfigError, deferred
from opendeep_jax.config.fine_tuning import OWN_TEXT
from opendeep_jax.config.load import did_you_mean, load_recipe
from opendeep_jax.config.schema import DataConfig, ModelConfig, RunConfig

HELP = """\
Makes a run of somebody else's weights: `generate`, `chat`, `serve` and `eval` work on it, and `train` goes on from it.

usage: opendeep import hf   DIRECTORY|ORGANIZATION/NAME --out=DIRECTORY [--config=RECIPE] [--dotted.name=value ...]
       opendeep import gguf FILE.gguf --out=DIRECTORY [--config=RECIPE] [--dotted.name=value ...]

  --out     Work directory of the new run.
  --config  Recipe that all but the model and the tokenizer is taken from; settings after it change it. Without one the
            text is yours: corpus/**/*.jsonl, or --data.sources.0.path=... here or at the start of training.

`opendeep train --config=OUT/recipe.py --workdir=OUT` trains it; text, steps and rates can still be changed there.

ORGANIZATION/NAME is fetched from the Hugging Face Hub.
"""
NOT_NEEDED = ("*.bin", "*.pt", "*.pth", "*.gguf", "original/*", "*.onnx", "*.h5", "*.msgpack")


def main(argv: Sequence[str]) -> None:
    """Import a model. Raises ConfigError for invalid input, OSError where writing fails."""
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP, end="")
        return
    kind, *rest = argv
    if kind not in ("hf", "gguf"):
        raise ConfigError(f"opendeep import {kind}: no such format.{did_you_mean(kind, ['hf', 'gguf'])} See --help.")
    if not rest or rest[0].startswith("--"):
        raise ConfigError(f"opendeep import {kind}: say what, as in `opendeep import {kind} SOURCE --out=runs/mine`.")
    source, *rest = rest
    flags = make_flags(out=("", ""), config=("", ""))
    flags.set_gnu_getopt(True)
    overrides = flags(["import", *rest], known_only=True)[1:]
    if not flags.out:
        raise ConfigError("--out is missing: give the work directory of the new run, such as --out=runs/mine.")
    recipe = load_recipe(flags.config) if flags.config else _own_text(source)

    from opendeep_jax.config.overrides import apply
    from opendeep_jax.interop.hf_text import licenses, licenses_of_gguf
    from opendeep_jax.pretrained.imported_from import facts_of_gguf, facts_of_hf
    from opendeep_jax.record.origin import write_imported_from
    from opendeep_jax.train.imported_run import check_importable, import_run

    check_importable(flags.out)
    if kind == "gguf":
        from opendeep_jax.interop.gguf import config_of, load_gguf, read_gguf
        from opendeep_jax.text.gguf_tokenizer import tokenizer_from_gguf_fields

        file = read_gguf(source)
        facts = facts_of_gguf(source, file.fields)
        model_config, tokenizer = config_of(file), tokenizer_from_gguf_fields(file.fields)
        beside = licenses_of_gguf(file.fields)
    else:
        from opendeep_jax.interop import config_from_hf, load_hf
        from opendeep_jax.text.files import tokenizer_from_hf

        named, source = source, _local(source)
        facts = facts_of_hf(source, named)
        model_config, tokenizer = config_from_hf(source), tokenizer_from_hf(source)
        beside = licenses(source)
    if not flags.config and model_config.context_length:  # rows are asked for by nobody: no longer than the model reads
        length = min(recipe.data.sequence_length, model_config.context_length)
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sequence_length=length))
    config = apply(_with_model(recipe, model_config), overrides)
    model = load_gguf(source) if kind == "gguf" else load_hf(source)
    # The files have the last word: announced MTP modules may not be there, and a tied model may have its own head.
    mtp = dataclasses.replace(config.model.mtp, depth=model.config.mtp.depth)
    found = {"mtp": mtp, "tie_embeddings": model.config.tie_embeddings}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **found))
    import_run(model, tokenizer, config, flags.out, beside)
    write_imported_from(flags.out, facts)
    print(f"imported: {flags.out}\n{_next(config, flags.out, flags.config)}")


def _own_text(source: str) -> RunConfig:
    """Return the run where no recipe is named: on its user's text, titled as the source is."""
    return RunConfig(name=Path(source).name.removesuffix(".gguf") or "imported", data=DataConfig(sources=(OWN_TEXT,)))


def _next(config: RunConfig, out: str, recipe: str) -> str:
    """Return instructions to train the imported run on text."""
    command = f"opendeep train --config={shlex.quote(f'{out}/recipe.py')} --workdir={shlex.quote(out)}"
    yours = f"{command} --data.sources.0.path='mine/*.jsonl'"
    embedded = [source.name for source in config.data.sources if not source.path]
    if OWN_TEXT in config.data.sources and not glob.glob(OWN_TEXT.path, recursive=True):
        return f"Train it on your own text, which goes into {OWN_TEXT.path}, or: {yours}"
    if embedded:
        return (
            f"Train it on your own text: {yours}\n"
            f"Without a path it trains on {', '.join(embedded)}, the sources of this Python, as --config={recipe} says."
        )
    return f"Train it on {', '.join(source.path for source in config.data.sources)}: {command}"


def _with_model(recipe: RunConfig, model: ModelConfig) -> RunConfig:
    """Return the recipe with a model's sizes; how it is computed stays the recipe's."""
    own = {name: getattr(recipe.model, name) for name in ("dtype", "precision", "remat", "execution")}
    with deferred():  # the overrides may bring length and vocabulary together
        data = dataclasses.replace(recipe.data, tokenizer="tokenizer.json")
        return dataclasses.replace(recipe, model=dataclasses.replace(model, **own), data=data)


def _local(source: str) -> Path:
    """Return the directory of a model; one of the Hub's is fetched first."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ConfigError(f"{source} is no directory. Give one, or a name of the Hugging Face Hub: ORGANIZATION/NAME.")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            f"{source} is no directory here, and fetching it needs huggingface_hub. Install it: "
            "pip install 'opendeep-jax[remote]'."
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(source, ignore_patterns=list(NOT_NEEDED)))
    except (
        Exception
    ) as error:  # the network, the Hub and the name can fail in a hundred ways, and all are the same here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{source} is no directory here, and could not be fetched from the Hugging Face Hub ({reason}). Check the "
            "name and the network, and `hf auth login` for models that ask for it."
        ) from error
