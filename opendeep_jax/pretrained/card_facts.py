"""Provenance of an exported model for its card, read from the files of its run or of its source."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import opendeep_jax
from opendeep_jax.config.load import CONFIG_FILE, load_run_config
from opendeep_jax.config.schedule import tokens_before
from opendeep_jax.config.schema import RunConfig, SourceConfig
from opendeep_jax.interop.hf_card import Provenance
from opendeep_jax.pretrained.imported_from import facts_of_gguf, facts_of_hf
from opendeep_jax.pretrained.sources import source_kind
from opendeep_jax.record.files import DATA, EVALUATION, number, read_jsonl, read_object
from opendeep_jax.record.origin import parent_directory, read_imported_from, read_origin

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
    stretches, missing = _training_spans(workdir, step)
    config, imported, lineage = stretches[-1].config, read_imported_from(workdir), []
    tokens, base = sum(stretch.tokens for stretch in stretches), str(imported.get("source", ""))
    if imported.get("base_model"):
        lineage.append(f"{base} was made from {imported['base_model']}.")
    if base:
        lineage.append(f"The weights of {base} were imported.")
    if missing:
        lineage.append(f"Trained as a run that is not here any more ({missing}): its text is not in this card.")
        tokens += tokens_before(stretches[0].config, stretches[0].first)
    for run in stretches:
        if run.last > run.first:
            steps = f"{run.last - run.first:,} steps on {run.tokens:,} tokens"
            lineage.append(f"Trained for {steps}, as the run {run.config.name}.")
    return Provenance(
        name=name or config.name,
        license=license or str(imported.get("license", "")),
        base_model=base,
        lineage=tuple(lineage),
        sources=tuple(row for run in stretches if run.last > run.first for row in _sources(run, len(stretches) > 1)),
        languages=tuple(config.data.curation.languages) or tuple(imported.get("languages", ())),
        training=_training(config, read_jsonl(workdir / EVALUATION), step, tokens) if step else {},
    )


class TrainingSpan(NamedTuple):
    """The steps that one run has done of a model's training, after `first` and up to `last`."""

    workdir: Path
    config: RunConfig
    first: int
    last: int

    @property
    def tokens(self) -> int:
        """Tokens of these steps."""
        return tokens_before(self.config, self.last) - tokens_before(self.config, self.first)


def _training_spans(workdir: Path, step: int) -> tuple[list[TrainingSpan], str]:
    """Return a run's training up to a step, beginning with the runs it branched from, and a missing parent."""
    found: list[TrainingSpan] = []
    while True:
        origin, config = read_origin(workdir), load_run_config(workdir)
        branched = origin["kind"] == "branch"
        found.insert(0, TrainingSpan(workdir, config, origin["step"] if branched else 0, step))
        if not branched:
            return found, ""
        parent, step = parent_directory(origin), origin["step"]
        if not (parent / CONFIG_FILE).is_file() or parent in (run.workdir for run in found):
            return found, f"{origin.get('parent', 'unknown')} at step {step:,}"
        workdir = parent


def _training(config: RunConfig, evaluations: list[dict], step: int, tokens: int) -> dict[str, Any]:
    measured = [line for line in evaluations if line.get("step") == step]
    bits = next((bits for line in measured if (bits := number(line.get("held_out_bits_per_byte"))) is not None), None)
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


def _sources(run: TrainingSpan, several: bool) -> tuple[dict[str, str], ...]:
    """The text by source: what was found in it where the run has recorded that, else what the configuration says.

    Args:
        several: the model comes of other runs too, so a share says of which it is.
    """
    config, of_run = run.config, f" of {run.tokens:,} tokens" if several else ""
    entries = read_object(run.workdir / DATA).get("sources", ())
    recorded = {entry.get("name"): entry for entry in entries if isinstance(entry, dict)}
    weights = sum(source.weight for source in config.data.sources)
    return tuple(
        {
            "name": source.name,
            "share": f"{source.weight / weights:.1%}{of_run}" if weights else "",
            "license": _license(source, recorded.get(source.name, {})),
            "dataset": next((match[1] for pattern in DATASETS if (match := pattern.match(source.path))), ""),
        }
        for source in config.data.sources
    )


def _license(source: SourceConfig, recorded: dict[str, Any]) -> str:
    found = recorded.get("licenses")
    names = [str(name) or "unknown" for name in found] if isinstance(found, dict) else []
    more = f" and {len(names) - LICENSES_SHOWN} more" if len(names) > LICENSES_SHOWN else ""
    return ", ".join(names[:LICENSES_SHOWN]) + more or source.known_license
