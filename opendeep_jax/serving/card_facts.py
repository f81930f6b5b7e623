"""What the card of an exported model says of where it comes from, read from the files of its run or of its source."""

import re
from pathlib import Path
from typing import Any

import opendeep_jax
from opendeep_jax.config.load import load_run_config
from opendeep_jax.config.schedule import tokens_before
from opendeep_jax.config.schema import RunConfig, SourceConfig
from opendeep_jax.interop.hf_card import Provenance
from opendeep_jax.serving.sources import source_kind
from opendeep_jax.train.imported_from import facts_of_gguf, facts_of_hf, read_imported_from
from opendeep_jax.train.run_files import is_number, read_data, read_run

DATASETS = (
    re.compile(r"datasets:([\w.-]+/[\w.-]+)"),
    re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)"),
    re.compile(r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)"),
)
"""Paths of sources that the Hub has, with its name for them."""
LICENSES_SHOWN = 6


def provenance(source: str | Path, step: int, license: str = "", name: str = "") -> Provenance:
    """Return what a model's card says of where it comes from.

    Args:
        source: a run's work directory, a Hugging Face directory or a .gguf file.
        step: of the run's checkpoint.
        license, name: as the user says them; empty takes what is known.

    Raises:
        ConfigError: there is no model at `source`.
    """
    path = Path(source).resolve()
    match source_kind(source):
        case "run":
            return _of_run(path, step, license, name)
        case "hf":
            facts = facts_of_hf(path)
        case _:
            from opendeep_jax.interop.gguf_file import read_gguf

            facts = facts_of_gguf(path, read_gguf(path).fields)
    base = facts["base_model"]
    lineage = (f"Made from {base}.",) if base else ()
    return Provenance(
        name=name or facts["source"],
        license=license or facts["license"],
        base_model=base,
        lineage=(*lineage, f"{facts['source']}, written again by OpenDeep {opendeep_jax.__version__}."),
        languages=tuple(facts["languages"]),
    )


def _of_run(workdir: Path, step: int, license: str, name: str) -> Provenance:
    config, run, imported = load_run_config(workdir), read_run(workdir), read_imported_from(workdir)
    tokens, base, lineage = tokens_before(config, step), str(imported.get("source", "")), []
    if imported.get("base_model"):
        lineage.append(f"{base} was made from {imported['base_model']}.")
    if base:
        lineage.append(f"The weights of {base} were imported.")
    if step:
        lineage.append(f"Trained for {step:,} steps on {tokens:,} tokens, as the run {config.name}.")
    return Provenance(
        name=name or config.name,
        license=license or str(imported.get("license", "")),
        base_model=base,
        lineage=tuple(lineage),
        sources=_sources(config, workdir) if step else (),
        languages=tuple(config.data.curation.languages) or tuple(imported.get("languages", ())),
        training=_training(config, run.evaluations, step, tokens) if step else {},
    )


def _training(config: RunConfig, evaluations: list[dict], step: int, tokens: int) -> dict[str, Any]:
    measured = [line for line in evaluations if line.get("step") == step]
    bits = next((bits for line in measured if is_number(bits := line.get("held_out_bits_per_byte"))), None)
    optimizer = config.optimizer
    facts = {
        "tokens trained on": f"{tokens:,}",
        "steps": f"{step:,}",
        "row length": f"{config.data.sequence_length:,} tokens",
        "optimizer": f"{optimizer.kind}, peak rate {optimizer.learning_rate:g} ({optimizer.schedule})",
        "seed": config.seed,
        "tokenizer": Path(config.data.tokenizer).name,
        "written by": f"OpenDeep {opendeep_jax.__version__}",
    }
    return facts | ({"held-out bits per byte": f"{bits:.4f}"} if bits is not None else {})


def _sources(config: RunConfig, workdir: Path) -> tuple[dict[str, str], ...]:
    """The text by source: what was found in it where the run has recorded that, else what the configuration says."""
    entries = read_data(workdir).get("sources", ())
    recorded = {entry.get("name"): entry for entry in entries if isinstance(entry, dict)}
    weights = sum(source.weight for source in config.data.sources)
    return tuple(
        {
            "name": source.name,
            "share": f"{source.weight / weights:.1%}" if weights else "",
            "license": _license(source, recorded.get(source.name, {})),
            "dataset": next((match[1] for pattern in DATASETS if (match := pattern.match(source.path))), ""),
        }
        for source in config.data.sources
    )


def _license(source: SourceConfig, recorded: dict[str, Any]) -> str:
    found = recorded.get("licenses")
    names = [str(name) for name in found if name] if isinstance(found, dict) else []
    more = f" and {len(names) - LICENSES_SHOWN} more" if len(names) > LICENSES_SHOWN else ""
    return ", ".join(names[:LICENSES_SHOWN]) + more or source.license or "not stated"
