"""The data card as JSON, Markdown and one HTML file with nothing outside it (card.html.j2)."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from opendeep_jax.config.storage import write_file
from opendeep_jax.data.card import tables
from opendeep_jax.data.card.tables import GROUPS, CardTable, group_of
from opendeep_jax.display.numbers import human_count
from opendeep_jax.display.page import page

TEMPLATE = Path(__file__).with_name("card.html.j2")
COLORS = dict(zip(("kept", *GROUPS), ("green", "blue", "violet", "s6", "orange", "red", "muted"), strict=True))
SHOWN_LANGUAGES = 15
SECTIONS = {
    "Sources": tables.sources_table,
    "Licenses": tables.licenses_table,
    "Citations": tables.citations_table,
    "What curation kept": tables.flow_table,
    "Dropped documents, by reason": tables.dropped_table,
    "Clusters of duplicates": tables.clusters_table,
    "Languages of what is left": tables.languages_table,
    "Overlap with evaluation sets": tables.evaluation_table,
    "Personal data": tables.masked_table,
    "Text that the tokenizer has no token for": tables.lost_table,
    "Documents by length in tokens": tables.lengths_table,
    "Samples": None,
    "Recipe of the curation": tables.recipe_table,
    "Identity": tables.identity_table,
}
"""The Markdown's sections, in order."""


def write_card(directory: Path | str, card: dict[str, Any]) -> Path:
    """Write card.json, card.md and card.html into `directory`; return the path of card.html.

    Raises ConfigError when they cannot be written.
    """
    directory = Path(directory)
    write_file(directory / "card.json", json.dumps(card, indent=1, ensure_ascii=False))
    write_file(directory / "card.md", markdown(card))
    write_file(directory / "card.html", page(f"{card['name']}: data card", html_body(card)))
    return directory / "card.html"


def markdown(card: dict) -> str:
    """Return the whole card, for a README or a page of a hub."""
    documents, text, tokens = tables.amounts(card["totals"])
    parts = [f"# Data card: {_plain(card['name'])}\n", f"{documents} documents, {text} of text, {tokens} tokens.\n"]
    for title, table in SECTIONS.items():
        body = _markdown_table(table(card)) if table else "\n".join(_markdown_samples(card))
        parts.append(f"## {title}\n\n{body}" if body else "")
    return "\n".join(filter(None, parts))


def _markdown_table(table: CardTable) -> str:
    if not table.rows:
        return ""
    aligned = ["---"] + ["---" if table.words else "---:"] * (len(table.heading) - 1)
    rows = [map(_plain, table.heading), aligned, *(map(_plain, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _markdown_samples(card: dict) -> Iterator[str]:
    for source in card["sources"]:
        for sample in source["samples"]:
            fence = "`" * (max(map(len, re.findall("`+", sample["text"])), default=0) + 3)
            yield f"**{_plain(source['name'])}**, {_plain(sample['id'])}\n\n{fence}\n{sample['text']}\n{fence}\n"


def _plain(value: str) -> str:
    """Text that means nothing to Markdown, on one line."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", " ".join(value.split()))


def html_body(card: dict) -> str:
    """Return the card as HTML, without the page around it."""
    environment = jinja2.Environment(autoescape=True, finalize=_printable)
    found = {name.removesuffix("_table"): make(card) for name, make in vars(tables).items() if name.endswith("_table")}
    clusters = found["clusters"].rows
    languages, total = list(card["languages"].items())[:SHOWN_LANGUAGES], sum(card["languages"].values())
    amounts = {
        "sources": [(source["name"], *_amount(source)) for source in card["sources"]],
        "licenses": [(name or "unknown", *_amount(counts)) for name, counts in card["licenses"].items()],
        "clusters": [(f"{size} documents", int(number.replace(",", "")), number) for size, number, _ in clusters],
        "languages": [(name, count, f"{count / total:.1%}") for name, count in languages],
        "documents": _lengths(card, "documents"),
        "tokens": _lengths(card, "tokens"),
    }
    shares = [_shares(source) for source in card["sources"]]
    used = {group["name"] for source in shares for group in source["groups"]}
    legend = [(name, color) for name, color in COLORS.items() if name in used]
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    return template.render(card=card, tables=found, amounts=amounts, tiles=_tiles(card), shares=shares, legend=legend)


def _printable(value: Any) -> Any:
    """Return a value for HTML: control characters, and what UTF-8 cannot hold, replaced."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    clean = "".join(c if c in "\n\t" or c.isprintable() or c.isspace() else "�" for c in value)
    return clean.encode("utf-8", "replace").decode("utf-8")


def _tiles(card: dict) -> list[tuple[str, str, str]]:
    """Headline numbers: label, value, remark."""
    totals, sources, number = card["totals"], card["sources"], len(card["licenses"])
    tiles = [("Sources", f"{len(sources)}", f"{number} license{'s' * (number > 1)}" if number else "")]
    per_token = f"{totals['bytes'] / totals['tokens']:.2f} bytes each" if totals["tokens"] else ""
    tiles += zip(("Documents", "Text", "Tokens"), tables.amounts(totals), ("", "", per_token), strict=True)
    if given := sum(source.get("documents_in", 0) for source in sources):
        left = sum(source["documents"] for source in sources)
        tiles.append(("Dropped", f"{1 - left / given:.1%}", f"of {human_count(given)} documents"))
    return tiles


def _amount(counts: dict) -> tuple[int, str]:
    return counts["tokens"], f"{human_count(counts['tokens'])} tokens"


def _lengths(card: dict, name: str) -> list[tuple[str, int, str]]:
    """Bars of all sources' documents or tokens by length, named by the least, as a context length is written: 4K."""
    histograms = [source["lengths"][name] for source in card["sources"]]
    bins = range(max(map(len, histograms), default=0))
    counts = [sum(histogram[i] for histogram in histograms if i < len(histogram)) for i in bins]
    first = next((i for i in bins if counts[i]), 0)
    return [(f"{2 ** (i % 10)}{('', 'K', 'M', 'G')[i // 10]}", counts[i], f"{counts[i]:,}") for i in bins[first:]]


def _shares(source: dict) -> dict[str, Any]:
    """Return where a source's documents went, in groups of reasons."""
    counts = {"kept": source["documents"]} | dict.fromkeys(GROUPS, 0)
    for reason, dropped in source["dropped"].items():
        counts[group_of(reason)] += dropped["documents"]
    total = sum(counts.values()) or 1
    groups = [
        {
            "name": name,
            "color": COLORS[name],
            "count": f"{count:,}",
            "width": f"{count / total:.3%}",
            "share": f"{count / total:.1%}",
        }
        for name, count in counts.items()
        if count
    ]
    return {"name": source["name"], "kept": f"{counts['kept'] / total:.1%}", "groups": groups}
