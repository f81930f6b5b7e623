"""The tables of a data card, the same in Markdown and HTML: rows of texts under a row of headings."""

from typing import Any, NamedTuple

from opendeep_jax.display.numbers import human_bytes, human_count

GROUPS = ("quality", "language", "exact duplicate", "near duplicate", "evaluation overlap", "left out")
"""Kinds of reasons to drop a document, in the order of the steps; the last before all, by the reader."""
QUALITY = ("gopher_repetition", "gopher_quality", "c4", "fineweb")


class CardTable(NamedTuple):
    """A table; the first column is of names, the others of numbers unless `words`."""

    heading: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: bool = False


def group_of(reason: str) -> str:
    """Return which of GROUPS a reason belongs to."""
    name = reason.partition(":")[0]
    if name in QUALITY:
        return "quality"
    return name if name in GROUPS else "left out"


def amounts(counts: dict[str, Any]) -> list[str]:
    """Documents, text and tokens."""
    return [human_count(counts["documents"]), human_bytes(counts["bytes"]), human_count(counts["tokens"])]


def sources_table(card: dict) -> CardTable:
    """One row a source, and their sum."""
    rows = [
        (source["name"], source["license"], f"{source['share']:.1%}", *amounts(source)) for source in card["sources"]
    ]
    if len(rows) > 1:
        rows.append(("all", "", "", *amounts(card["totals"])))
    return CardTable(("Source", "License", "Weight", "Documents", "Text", "Tokens"), rows)


def licenses_table(card: dict) -> CardTable:
    """One row a license, the largest first."""
    rows = [(license or "unknown", *amounts(counts)) for license, counts in card["licenses"].items()]
    return CardTable(("License", "Documents", "Text", "Tokens"), rows)


def citations_table(card: dict) -> CardTable:
    """Return what to cite for each source, and where it was read from."""
    rows = [(source["name"], source["citation"] or "–", source["path"] or "embedded") for source in card["sources"]]
    return CardTable(("Source", "Cite", "Read from"), rows, words=True)


def flow_table(card: dict) -> CardTable:
    """Text that came in, left and stayed, one row a source that was curated."""
    rows = []
    for source in card["sources"]:
        if "bytes_in" in source:
            dropped = sum(counts["bytes"] for counts in source["dropped"].values())
            kept = source["bytes_in"] - dropped - source["bytes_trimmed"]
            sizes = source["bytes_in"], dropped, source["bytes_trimmed"], kept
            rows.append((source["name"], f"{source['documents_in']:,}", *map(human_bytes, sizes)))
    return CardTable(
        ("Source", "Documents in", "Text in", "In dropped documents", "Trimmed from others", "Text kept"), rows
    )


def dropped_table(card: dict) -> CardTable:
    """Documents dropped by reason and source, the most frequent reason first."""
    totals: dict[str, int] = {}
    for source in card["sources"]:
        for reason, counts in source["dropped"].items():
            totals[reason] = totals.get(reason, 0) + counts["documents"]
    names = [source["name"] for source in card["sources"]]
    rows = []
    for reason, total in sorted(totals.items(), key=lambda item: (-item[1], item[0])):
        numbers = [source["dropped"].get(reason, {}).get("documents", 0) for source in card["sources"]]
        rows.append((reason, *(f"{number:,}" if number else "" for number in numbers), f"{total:,}"))
    return CardTable(("Reason", *names, "all"), rows)


def lengths_table(card: dict) -> CardTable:
    """Documents by length in tokens, one column a source."""
    names = [source["name"] for source in card["sources"]]
    histograms = [source["lengths"]["documents"] for source in card["sources"]]
    rows = []
    for i in range(max(map(len, histograms), default=0)):
        numbers = [histogram[i] if i < len(histogram) else 0 for histogram in histograms]
        if any(numbers):
            rows.append((f"{2**i:,} to {2 ** (i + 1) - 1:,}", *(f"{n:,}" if n else "" for n in numbers)))
    return CardTable(("Tokens", *names), rows)


def clusters_table(card: dict) -> CardTable:
    """Clusters of duplicates by size; large sizes together."""
    bands = ((2, 2), (3, 3), (4, 4), (5, 9), (10, 99), (100, 999), (1000, 10**18))
    rows = []
    for low, high in bands:
        inside = {int(size): n for size, n in card["duplicate_clusters"].items() if low <= int(size) <= high}
        if inside:
            name = f"{low}" if low == high else f"{low:,} to {high:,}" if high < 10**18 else f"{low:,} and more"
            removed = sum((size - 1) * n for size, n in inside.items())
            rows.append((name, f"{sum(inside.values()):,}", f"{removed:,}"))
    return CardTable(("Documents in the cluster", "Clusters", "Documents dropped"), rows)


def languages_table(card: dict) -> CardTable:
    """Documents kept by language, the most frequent first."""
    total = sum(card["languages"].values())
    rows = [(name, f"{n:,}", f"{n / total:.1%}") for name, n in card["languages"].items()]
    return CardTable(("Language", "Documents", "Share"), rows)


def evaluation_table(card: dict) -> CardTable:
    """One row an evaluation set that overlaps were looked for in."""
    names = ("items", "too_short", "ngrams", "documents_removed")
    rows = [(name, *(f"{counts[key]:,}" for key in names)) for name, counts in card["evaluation_sets"].items()]
    return CardTable(("Evaluation set", "Items", "Too short to look for", "N-grams", "Documents dropped"), rows)


def masked_table(card: dict) -> CardTable:
    """Personal data replaced, by kind and source."""
    names = {"email": "e-mail addresses", "ip": "public IP addresses"}
    rows = [
        (names.get(kind, kind), *(f"{source['masked'].get(kind, 0):,}" for source in card["sources"]), f"{total:,}")
        for kind, total in card["masked"].items()
    ]
    return CardTable(("Replaced", *(source["name"] for source in card["sources"]), "all"), rows)


def lost_table(card: dict) -> CardTable:
    """Text that the tokenizer has no token for, one row a source that lost some."""
    rows = [
        (source["name"], f"{lost:,}", f"{lost / source['bytes']:.2%}")
        for source in card["sources"]
        if (lost := source["lost_bytes"])
    ]
    return CardTable(("Source", "Bytes", "Of its text"), rows)


def identity_table(card: dict) -> CardTable:
    """Name and hashes: equal ones mean equal tokens."""
    tokenizer = card["tokenizer"]
    rows = [("tokenizer", tokenizer["name"], tokenizer["content_hash"])]
    rows += [(source["name"], "store", source["content_hash"]) for source in card["sources"]]
    return CardTable(("", "", "SHA-256"), rows, words=True)


def recipe_table(card: dict) -> CardTable:
    """Return the settings of the curation, and the versions of what computed it."""
    curation = card["curation"]
    rows = [(name, str(", ".join(value) if isinstance(value, list) else value) or "–")
            for name, value in curation.get("recipe", {}).items()]  # fmt: skip
    rows += [(f"version of {name}", version) for name, version in curation.get("engines", {}).items()]
    return CardTable(("Setting", "Value"), rows, words=True)


def seconds_table(card: dict) -> CardTable:
    """Processor time of each step, and what it gives in text that came in."""
    text = sum(source.get("bytes_in", 0) for source in card["sources"])
    seconds = card["curation"].get("seconds", {})
    rows = [
        (step, f"{value:,.1f}", f"{text / value / 1e6:,.1f}" if value else "–")
        for step, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    return CardTable(("Step", "Processor seconds, all workers", "MB of all text that came in, per second"), rows)
