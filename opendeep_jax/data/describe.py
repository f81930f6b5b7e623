"""What prepared data says of itself: counts, rates, phases and hashes, for people and for data.json."""

from opendeep_jax.data.order import describe_phases
from opendeep_jax.data.prepared import Prepared
from opendeep_jax.text.tokenizer import Tokenizer

COUNTS = ("documents", "bytes", "tokens")


def describe(prepared: Prepared, tokenizer: Tokenizer) -> dict:
    """Counts in all and by source and split, packing plans with their rates of padding and truncation, phases, what
    was left out (documents, and files that hold none), and where everything is (`record`, for `prepared.reopen`)."""
    sources = []
    epochs = prepared.order.epochs()
    weights = sum(source.weight for source in prepared.config.data.sources)
    for i, source in enumerate(prepared.config.data.sources):
        whole, held_out = prepared.stores[i].manifest, prepared.held_out[i].manifest["text"]
        sources.append(
            {
                "name": source.name,
                "license": source.known_license,
                "share": source.weight / weights if weights else 0.0,
                **{f"train_{key}": whole[key] - held_out[key] for key in COUNTS},
                **{f"held_out_{key}": held_out[key] for key in COUNTS},
                "epochs": epochs[i],
                "licenses": whole["licenses"],
                "left_out": whole["left_out"] | (prepared.left_out_files[i] if prepared.left_out_files else {}),
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
            "source": prepared.config.data.sources[source].name,
            "sequence_length": kind.length,
            "packing": kind.packing,
            **{key: plan.manifest[key] for key in ("rows", "documents", "padding", "truncated", "content_hash")},
        }
        for (source, kind), plan in prepared.plans.items()
    ]
    return {
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        **totals,
        "bytes_per_token": totals["train_bytes"] / max(totals["train_tokens"], 1),
        "left_out": {
            f"{source['name']}: {reason}": n for source in sources for reason, n in source["left_out"].items()
        },
        "content_hash": prepared.content_hash,
        "sources": sources,
        "plans": plans,
        "phases": describe_phases(prepared.order),
        "record": prepared.record(),
    }


def table(described: dict) -> str:
    """`describe`'s counts and rates as aligned text."""
    lines = [f"tokenizer {described['tokenizer']}, {described['vocab_size']:,} tokens", ""]
    lines.append(f"{'source':<20} {'documents':>14} {'tokens':>18} {'held out':>14} {'epochs':>8}  licence")
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
