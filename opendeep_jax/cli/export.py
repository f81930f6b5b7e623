"""`opendeep export hf|gguf --workdir=CHECKPOINTS|--model=SOURCE --out=…`"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opendeep_jax.cli.flags import make_flags, parse, run_action
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import write_atomically

if TYPE_CHECKING:
    from opendeep_jax.text.tokenizer import Tokenizer

HELP = """\
Writes a model for others: as a Hugging Face directory (transformers, vLLM, SGLang), or as a GGUF file (llama.cpp).

usage: opendeep export hf   --workdir=RUN|--model=SOURCE --out=CHECKPOINTS [--dtype=bfloat16|float32] [--license=…]
       opendeep export gguf --workdir=RUN|--model=SOURCE --out=FILE.gguf [--type=bf16|f32|q8_0] [--pre=NAME]

`opendeep export FORMAT --help` shows all settings.
"""
SOURCE = {
    "workdir": ("", "A run's work directory."),
    "model": ("", "Instead: a Hugging Face directory, or a .gguf file."),
    "step": (-1, "Step of the run's checkpoint; -1 takes the newest."),
}


def main(argv: Sequence[str]) -> int:
    """Export a model. Raises ConfigError for invalid input, OSError where writing fails."""
    return run_action({"hf": _hf, "gguf": _gguf}, ["export", *argv], HELP)


def _hf(argv: Sequence[str]) -> None:
    flags = make_flags(
        **SOURCE,
        out=("", "Directory to write; refused if it holds a model."),
        dtype=("bfloat16", "Of the weights: bfloat16 or float32."),
        license=("", "License of the model, for its card, such as apache-2.0; an imported model's own if not given."),
        name=("", "Title of its card; the run's name if not given."),
    )
    values = _parse(argv, flags, "hf", "Writes config.json, safetensors, tokenizer and a model card.")
    model, tokenizer = _open(values, values.dtype)

    from opendeep_jax.interop import save_hf
    from opendeep_jax.pretrained.card_facts import provenance

    with tempfile.TemporaryDirectory() as directory:
        source = values.workdir or values.model
        facts = provenance(source, _step(values), values.license, values.name)
        save_hf(model, values.out, tokenizer=_texts(source, tokenizer, Path(directory)), provenance=facts)
    print(f"exported: {values.out}")
    if not facts.license:
        print("Its card states no license. Say it with --license=..., or in README.md, before you pass the model on.")


def _texts(source: str, tokenizer: "Tokenizer", directory: Path) -> Path:
    """The directory of what shall surround the weights: the source's own, or `directory`, where it is written."""
    from opendeep_jax.interop.hf_text import text_paths
    from opendeep_jax.pretrained.sources import source_kind
    from opendeep_jax.text.files import begins_as_written, save_tokenizer, tokenizer_json

    kind = source_kind(source)
    if kind == "hf" and begins_as_written(tokenizer):
        return Path(source)  # its files are carried along as they are
    if kind == "hf":  # what begins a text is said elsewhere than where transformers looks for it
        for path in text_paths(Path(source)):
            shutil.copyfile(path, directory / path.name)
        write_atomically(directory / "tokenizer.json", tokenizer_json(tokenizer))
        return directory
    save_tokenizer(tokenizer, directory)
    for name, text in _licenses(source).items():
        write_atomically(directory / name, text)
    return directory


def _licenses(source: str) -> dict[str, str]:
    from opendeep_jax.interop.gguf_file import read_gguf
    from opendeep_jax.interop.hf_text import licenses, licenses_of_gguf

    return licenses(Path(source)) if Path(source).is_dir() else licenses_of_gguf(read_gguf(source).fields)


def _gguf(argv: Sequence[str]) -> None:
    flags = make_flags(
        **SOURCE,
        out=("", "File to write."),
        type=("bf16", "Of the matrices: f32, bf16 or q8_0 (8 bits)."),
        pre=("", "llama.cpp's name for how the tokenizer splits text, where it knows no equal one."),
        name=("", "The model's name in the file."),
    )
    values = _parse(argv, flags, "gguf", "Writes one file for llama.cpp.")
    from opendeep_jax.interop.gguf_file import require_gguf

    require_gguf()
    model, tokenizer = _open(values, "float32")

    from opendeep_jax.interop.gguf import save_gguf
    from opendeep_jax.interop.hf_text import GGUF_LICENSE
    from opendeep_jax.pretrained.card_facts import provenance
    from opendeep_jax.text.gguf_tokenizer import gguf_fields_of

    fields = gguf_fields_of(tokenizer, model.config.vocab_size, values.pre)
    source = values.workdir or values.model
    known = {
        GGUF_LICENSE: next(iter(_licenses(source).values()), ""),
        "general.license": provenance(source, _step(values)).license,
    }
    fields |= {key: text for key, text in known.items() if text}
    save_gguf(model, values.out, values.type, fields, values.name)
    print(f"exported: {values.out}")


def _parse(argv, flags, kind: str, purpose: str):
    usage = "--workdir=RUN|--model=SOURCE --out=PATH [--name=value ...]"
    values = parse(flags, argv, f"opendeep export {kind}", purpose, usage)
    if bool(values.workdir) == bool(values.model):
        raise ConfigError("Give --workdir of a run, or --model of another source, one of the two.")
    if not values.out:
        raise ConfigError("--out is missing: say where to write, such as --out=exported.")
    return values


def _step(values) -> int:
    """The step that is exported; 0 where the source is no run."""
    from opendeep_jax.pretrained.sources import source_kind

    source = values.workdir or values.model
    if values.step >= 0 or source_kind(source) != "run":
        return max(values.step, 0)
    from opendeep_jax.record.files import CHECKPOINTS, checkpoint_steps

    return max(checkpoint_steps(Path(source, CHECKPOINTS)), default=0)


def _open(values, dtype: str):
    """Return the model in a dtype, and its tokenizer."""
    from opendeep_jax.pretrained.sources import open_model

    model, tokenizer, _ = open_model(values.workdir or values.model, dtype, None if values.step < 0 else values.step)
    return model, tokenizer
