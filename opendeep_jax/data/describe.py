"""The description of prepared data: counts, rates, phases and hashes, for people and for data.json."""

from pathlib import Path
from typing import TYPE_CHECKING

from opendeep_jax.data.order import describe_phases

if TYPE_CHECKING:
    from opendeep_jax.data.pipeline import Data

COUNTS = ("documents", "bytes", "tokens")


def describe(data: "Data") -> dict:
    """Count in all and by source and split, packing plans with their rates of padding and truncation, phases, what
    was left out (documents, and files that hold none), and where everything is (`record`, for `recorded.reopen`)."""
    sources = []
    epochs = data.order.epochs()
    weights = sum(source.weight for source in data.config.data.sources)
    for i, source in enumerate(data.config.data.sources):
        whole, held_out = data.stores[i].manifest, data.held_out_plans[i].manifest["text"]
        sources.append(
            {
                "name": source.name,
                "license": source.known_license,
                "share": source.weight / weights if weights else 0.0,
                **{f"train_{key}": whole[key] - held_out[key] for key in COUNTS},
                **{f"held_out_{key}": held_out[key] for key in COUNTS},
                "epochs": epochs[i],
                "licenses": whole["licenses"],
                "left_out": whole["left_out"] | (data.left_out_files[i] if data.left_out_files else {}),
                "lost_bytes": whole.get("lost_bytes", 0),
                "content_hash": whole["content_hash"],
            }
        )
    totals = {
        f"{split}_{key}": sum(source[f"{split}_{key}"] for source in sources)
        for split in ("train", "held_out")
        for key in COUNTS
    }
    plans = [
        {
            "source": data.config.data.sources[source].name,
            "sequence_length": kind.length,
            "packing": kind.packing,
            **{key: plan.manifest[key] for key in ("rows", "documents", "padding", "truncated", "content_hash")},
        }
        for (source, kind), plan in data.plans.items()
    ]
    return {
        "tokenizer": data.tokenizer.name,
        "vocab_size": data.tokenizer.vocab_size,
        **totals,
        "bytes_per_token": totals["train_bytes"] / max(totals["train_tokens"], 1),
        "left_out": {
            f"{source['name']}: {reason}": n for source in sources for reason, n in source["left_out"].items()
        },
        "content_hash": data.content_hash,
        "sources": sources,
        "plans": plans,
        "phases": describe_phases(data.order),
        "record": _record(data),
    }


def _record(data: "Data") -> dict:
    """Return where everything is below data.directory, for `recorded.reopen`."""
    root = Path(data.config.data.directory).absolute()

    def place(directory: Path) -> str:
        directory = directory.absolute()
        return str(directory.relative_to(root) if directory.is_relative_to(root) else directory)

    return {
        "stores": [place(store.directory) for store in data.stores],
        "plans": [
            {"source": source, "kind": kind._asdict(), "directory": place(plan.directory)}
            for (source, kind), plan in data.plans.items()
        ],
        "held_out_plans": [place(plan.directory) for plan in data.held_out_plans],
        "fim": data.fim._asdict(),
        "tokenizer_hash": data.tokenizer.content_hash,
        "left_out_files": data.left_out_files,
        "exact_mixture": data.order.exact,
    }


def table(described: dict) -> str:
    """`describe`'s counts and rates as aligned text."""
    lines = [f"tokenizer {described['tokenizer']}, {described['vocab_size']:,} tokens", ""]
    lines.append(f"{'source':<20} {'documents':>14} {'tokens':>18} {'held out':>14} {'epochs':>8}  license")
    for source in described["sources"]:
        lines.append(
            f"{source['name']:<20} {source['train_documents']:>14,} {source['train_tokens']:>18,} "
            f"{source['held_out_tokens']:>14,} {source['epochs']:>8.3f}  {source['license']}"
        )
    lines += ["", f"{'rows of':<20} {'length':>14} {'rows':>18} {'padding':>14} {'cut':>8}  packing"]
    for plan in described["plans"]:
        lines.append(
            f"{plan['source']:<20} {plan['sequence_length']:>14,} {plan['rows']:>18,} {plan['padding']:>14.3%} "
            f"{plan['truncated']:>8.2%}  {plan['packing']}"
        )
    lines += ["", f"{'phase':<20} {'from step':>14} {'steps':>18} {'batch':>14} {'length':>8}  weights"]
    for phase in described["phases"]:
        weights = ", ".join(f"{weight:.1%}" for weight in phase["weights"])
        lines.append(
            f"{phase['name']:<20} {phase['first_step']:>14,} {phase['steps']:>18,} {phase['batch_size']:>14,} "
            f"{phase['sequence_length']:>8,}  {weights}"
        )
    if described["left_out"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in described["left_out"].items())
        lines += ["", f"left out: {reasons}"]
    for source in described["sources"]:
        if source["lost_bytes"]:
            lines += ["", f"{source['name']}: the tokenizer has no token for {source['lost_bytes']:,} bytes"]
    return "\n".join([*lines, "", f"content hash {described['content_hash']}"])
