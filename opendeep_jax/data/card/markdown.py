"""The data card as Markdown."""

import re

from opendeep_jax.data.card import tables
from opendeep_jax.data.card.tables import Table, human_bytes, human_count


def markdown(card: dict) -> str:
    """The whole card, for a README or a page of a hub."""
    totals = card["totals"]
    known = {"documents": human_count, "bytes": human_bytes, "tokens": human_count}
    words = {"documents": "documents", "bytes": "of text", "tokens": "tokens"}
    summary = ", ".join(f"{form(totals[name])} {words[name]}" for name, form in known.items() if name in totals)
    parts = [
        f"# Data card: {_text(card['name'])}\n",
        f"{summary}.\n" if summary else "",
        _section("Sources", tables.sources_table(card)),
        _section("Licences", tables.licenses_table(card)),
        _section("Citations", tables.citations_table(card)),
        _section("What curation kept", tables.flow_table(card)),
        _section("Dropped documents, by reason", tables.dropped_table(card)),
        _section("Clusters of duplicates", tables.clusters_table(card)),
        _section("Languages of what is left", tables.languages_table(card)),
        _section("Overlap with evaluation sets", tables.evaluation_table(card)),
        _section("Personal data", tables.masked_table(card)),
        _section("Text that the tokenizer has no token for", tables.lost_table(card)),
        _lengths(card),
        _samples(card),
        _section("Recipe of the curation", tables.recipe_table(card)),
        _section("Identity", tables.identity_table(card)),
    ]
    return "\n".join(filter(None, parts))


def _section(title: str, table: Table) -> str:
    if not table.rows:
        return ""
    aligned = ["---"] + ["---" if table.words else "---:"] * (len(table.heading) - 1)
    rows = [map(_text, table.heading), aligned, *(map(_text, row) for row in table.rows)]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _lengths(card: dict) -> str:
    names = [source["name"] for source in card["sources"] if "lengths" in source]
    histograms = [source["lengths"]["documents"] for source in card["sources"] if "lengths" in source]
    rows = []
    for i in range(max(map(len, histograms), default=0)):
        numbers = [histogram[i] if i < len(histogram) else 0 for histogram in histograms]
        if any(numbers):
            rows.append((f"{2**i:,} to {2 ** (i + 1) - 1:,}", *(f"{n:,}" if n else "" for n in numbers)))
    return _section("Documents by length in tokens", Table(("Tokens", *names), rows))


def _samples(card: dict) -> str:
    parts = []
    for source in card["sources"]:
        for sample in source["samples"]:
            fence = "`" * (max(map(len, re.findall("`+", sample["text"])), default=0) + 3)
            parts.append(f"**{_text(source['name'])}**, {_text(sample['id'])}\n\n{fence}\n{sample['text']}\n{fence}\n")
    return "## Samples\n\n" + "\n".join(parts) if parts else ""


def _text(value: str) -> str:
    """Text that means nothing to Markdown, on one line."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", " ".join(value.split()))
