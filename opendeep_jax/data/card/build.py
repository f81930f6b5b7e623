"""The data card: what a run is trained on, where it came from, what was left out of it and why.

card = build_card(config, read_accounting(sources), stores, tokenizer=tokenizer)
write_card(Path("data_card"), card)         # card.html, card.md and card.json, which has all of it
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opendeep_jax.config.schema import RunConfig, SourceConfig
from opendeep_jax.config.storage import write_file
from opendeep_jax.data.card.markdown import markdown
from opendeep_jax.data.card.page import html_page
from opendeep_jax.data.reading.listing import is_store, list_files, list_source
from opendeep_jax.data.sources import fraction_of, hash_id, list_parts, read_part
from opendeep_jax.data.store import Store
from opendeep_jax.text.tokenizer import Tokenizer

COUNTS = ("documents", "bytes", "tokens")
SAMPLE_CHARACTERS = 800
SAMPLE_TOKENS = 800
# Documents of a part that samples are chosen from, where they are not taken from a store.
LOOKED_AT = 100
DOCUMENTS_AT_A_TIME = 1 << 20
LENGTH_BINS = 40
"""The last bin of the histogram of lengths holds all documents of 2^39 tokens and more."""


def build_card(
    config: RunConfig,
    curation: dict | None,
    stores: Sequence[Store] | None,
    samples_per_source: int = 3,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """All that a data card says, ready for JSON; what is not known is left out or empty.

    Args:
        config: its name, and the sources with their weights, licences and citations.
        curation: what `curation.read_accounting` gives, or None if nothing was curated.
        stores: the sources' token stores, in their order, or None if nothing is tokenized yet.
        samples_per_source: texts of each source to show.
        tokenizer: what the stores were made with; with it samples come from the stores, else from the text.

    Raises:
        ConfigError: for a store or a source that cannot be read.
    """
    sources = [
        _source(config, source, curation, stores[i] if stores else None, samples_per_source, tokenizer)
        for i, source in enumerate(config.data.sources)
    ]
    names = [name for name in COUNTS if all(name in source for source in sources)]
    licenses: dict[str, Counter] = {}
    for source in sources:
        for license, counts in source["licenses"].items():
            licenses.setdefault(license, Counter()).update(counts)
    curation = curation or {}
    manifest = stores[0].manifest if stores else {}
    return {
        "name": config.name,
        "totals": {name: sum(source[name] for source in sources) for name in names},
        "sources": sources,
        "licenses": {license: dict(counts) for license, counts in _largest_first(licenses)},
        "languages": _added(source["languages"] for source in sources),
        "masked": _added(source["masked"] for source in sources),
        "duplicate_clusters": curation.get("duplicate_clusters", {}),
        "evaluation_sets": curation.get("evaluation_sets", {}),
        "tokenizer": {"name": manifest["tokenizer"], "content_hash": manifest["tokenizer_hash"]} if manifest else {},
        "curation": {name: curation[name] for name in ("recipe", "engines", "seconds") if name in curation},
    }


def _source(
    config: RunConfig,
    source: SourceConfig,
    curation: dict | None,
    store: Store | None,
    samples: int,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    account = curation["sources"][source.name] if curation else {}
    weights = sum(each.weight for each in config.data.sources)
    card = {
        "name": source.name,
        "path": source.path,
        "license": source.known_license,
        "citation": source.citation,
        "share": source.weight / weights if weights else 0.0,
        "licenses": {},
        **{name: account[name] for name in ("documents_in", "bytes_in", "bytes_trimmed") if account},
        **{name: account.get(name, {}) for name in ("dropped", "masked", "languages")},
    }
    if account:
        card |= {"documents": account["documents_out"], "bytes": account["bytes_out"]}
        card["licenses"] = account["licenses"]
    if store:
        manifest = store.manifest
        card |= {name: manifest[name] for name in COUNTS} | {"licenses": manifest["licenses"]}
        card |= {"content_hash": manifest["content_hash"], "lengths": _lengths(store)}
        card["lost_bytes"] = manifest.get("lost_bytes", 0)
        for reason, number in manifest["left_out"].items():
            card["dropped"] = card["dropped"] | {reason: {"documents": number, "bytes": 0}}
    if not is_store(source):
        for reason, names in list_source(source).left_out.items():
            card["dropped"] = card["dropped"] | {reason: {"documents": len(names), "bytes": 0}}
    text = _text_source(config, source, curation, store)
    card["samples"] = _stored_samples(store, tokenizer, samples) if store and tokenizer else _samples(text, samples)
    return card


def _text_source(config: RunConfig, source: SourceConfig, curation: dict | None, store: Store | None) -> SourceConfig:
    """The source that the card's documents can be read from."""
    if store:
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in store.manifest["source"].items()}
        return SourceConfig(**fields)
    if not curation:
        return source
    from opendeep_jax.data.curation import curate

    place = list(config.data.sources).index(source)
    return curate(config.data, progress=False)[place]  # It is done, so this only says where.


def _lengths(store: Store) -> dict[str, list[int]]:
    """Documents and tokens by length: bin i is of documents with 2^i to 2^(i + 1) - 1 tokens."""
    documents, tokens = np.zeros(LENGTH_BINS, np.int64), np.zeros(LENGTH_BINS, np.int64)
    for first in range(0, store.documents, DOCUMENTS_AT_A_TIME):
        lengths = store.lengths(first, min(first + DOCUMENTS_AT_A_TIME, store.documents))
        bins = np.minimum(np.log2(np.maximum(lengths, 1)).astype(np.int64), LENGTH_BINS - 1)
        documents += np.bincount(bins, minlength=LENGTH_BINS)
        np.add.at(tokens, bins, lengths)
    used = int(np.flatnonzero(documents)[-1]) + 1 if documents.any() else 0
    return {"documents": documents[:used].tolist(), "tokens": tokens[:used].tolist()}


def _stored_samples(store: Store, tokenizer: Tokenizer, number: int) -> list[dict[str, str]]:
    """Documents spread evenly over a store, decoded."""
    chosen = sorted({(2 * i + 1) * store.documents // (2 * number) for i in range(number)} if store.documents else ())
    described = [store.describe(document) for document in chosen]
    spans = [(chosen[i], 0, min(each["tokens"], SAMPLE_TOKENS)) for i, each in enumerate(described)]
    texts = [tokenizer.decode(tokens) for tokens in store.read(spans)]
    return [
        _sample(each["id"], text, each["url"], each["license"]) for each, text in zip(described, texts, strict=True)
    ]


def _samples(source: SourceConfig, number: int) -> list[dict[str, str]]:
    """Documents chosen by a hash of their ids among the first of some parts spread evenly over a source."""
    parts = list_parts(source, list_files(source))
    places = sorted({(2 * i + 1) * len(parts) // (2 * number) for i in range(number)})
    found = []
    for part in (parts[place] for place in places):
        documents = read_part(source, part, lambda reason, id: None)
        found += [document for document, _ in zip(documents, range(LOOKED_AT), strict=False)]
    found.sort(key=lambda document: fraction_of(hash_id(document.id), "sample"))
    return [_sample(*document) for document in found[:number]]


def _sample(id: str, text: str, url: str, license: str) -> dict[str, str]:
    cut = text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS] + " …"
    return {"id": id, "url": url, "license": license, "text": cut}


def _added(counters) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return dict(total.most_common())


def _largest_first(licenses: dict[str, Counter]) -> list[tuple[str, Counter]]:
    return sorted(licenses.items(), key=lambda item: (-item[1]["bytes"], item[0]))


def write_card(directory: Path | str, card: dict[str, Any]) -> Path:
    """Writes card.json, card.md and card.html into `directory`; returns the path of card.html.

    Raises ConfigError when they cannot be written.
    """
    directory = Path(directory)
    write_file(directory / "card.json", json.dumps(card, indent=1, ensure_ascii=False))
    write_file(directory / "card.md", markdown(card))
    write_file(directory / "card.html", html_page(card))
    return directory / "card.html"
