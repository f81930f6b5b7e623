"""The data card: what a run is trained on, where it came from, what was left out of it and why.

card = build_card(config, read_accounting(sources), data.stores, data.tokenizer)
write_card(Path("data_card"), card)         # card.html, card.md and card.json, which has all of it
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from opendeep_jax.config.schema import RunConfig, SourceConfig
from opendeep_jax.data.reading.listing import is_store, list_source
from opendeep_jax.data.store import Store
from opendeep_jax.text.tokenizer import Tokenizer

COUNTS = ("documents", "bytes", "tokens")
SAMPLE_CHARACTERS = 800
SAMPLE_TOKENS = 800
DOCUMENTS_AT_A_TIME = 1 << 20
LENGTH_BINS = 40
"""The last bin of the histogram of lengths holds all documents of 2^39 tokens and more."""


def build_card(
    config: RunConfig,
    curation: dict | None,
    stores: Sequence[Store],
    tokenizer: Tokenizer,
    samples_per_source: int = 3,
) -> dict[str, Any]:
    """All that a data card says, ready for JSON; what is not known is left out or empty.

    Args:
        config: its name, and the sources with their weights, licenses and citations.
        curation: what `curation.read_accounting` gives, or None if nothing was curated.
        stores: the sources' token stores, in their order.
        tokenizer: what the stores were made with.
        samples_per_source: texts of each source to show.

    Raises:
        ConfigError: for a store or a source that cannot be read.
    """
    weights, curation = sum(source.weight for source in config.data.sources), curation or {}
    accounts = curation.get("sources", {})
    sources = []
    for source, store in zip(config.data.sources, stores, strict=True):
        described = _source(source, source.weight / weights if weights else 0.0, accounts.get(source.name, {}), store)
        sources.append(described | {"samples": _samples(store, tokenizer, samples_per_source)})
    licenses: dict[str, Counter] = {}
    for source in sources:
        for license, counts in source["licenses"].items():
            licenses.setdefault(license, Counter()).update(counts)
    largest_first = sorted(licenses.items(), key=lambda item: (-item[1]["bytes"], item[0]))
    return {
        "name": config.name,
        "totals": {name: sum(source[name] for source in sources) for name in COUNTS},
        "sources": sources,
        "licenses": {license: dict(counts) for license, counts in largest_first},
        "languages": _added(source["languages"] for source in sources),
        "masked": _added(source["masked"] for source in sources),
        "duplicate_clusters": curation.get("duplicate_clusters", {}),
        "evaluation_sets": curation.get("evaluation_sets", {}),
        "tokenizer": {"name": tokenizer.name, "content_hash": tokenizer.content_hash},
        "curation": {name: curation[name] for name in ("recipe", "engines", "seconds") if name in curation},
    }


def _source(source: SourceConfig, share: float, account: dict, store: Store) -> dict[str, Any]:
    """Return a source's entry, by its store and its account of the curation, which may be empty."""
    manifest = store.manifest
    left_out = dict(manifest["left_out"])
    if not is_store(source):
        left_out |= {reason: len(names) for reason, names in list_source(source).skipped.items()}
    dropped = {reason: {"documents": number, "bytes": 0} for reason, number in left_out.items()}
    return {
        "name": source.name,
        "path": source.path,
        "license": source.known_license,
        "citation": source.citation,
        "share": share,
        **{name: account[name] for name in ("documents_in", "bytes_in", "bytes_trimmed") if account},
        "dropped": account.get("dropped", {}) | dropped,
        **{name: account.get(name, {}) for name in ("masked", "languages")},
        **{name: manifest[name] for name in (*COUNTS, "licenses", "content_hash")},
        "lost_bytes": manifest.get("lost_bytes", 0),
        "lengths": _lengths(store),
    }


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


def _samples(store: Store, tokenizer: Tokenizer, number: int) -> list[dict[str, str]]:
    """Documents spread evenly over a store, decoded."""
    chosen = sorted({(2 * i + 1) * store.documents // (2 * number) for i in range(number)} if store.documents else ())
    described = [store.describe(document) for document in chosen]
    spans = [(chosen[i], 0, min(each["tokens"], SAMPLE_TOKENS)) for i, each in enumerate(described)]
    texts = [tokenizer.decode(tokens) for tokens in store.read(spans)]
    return [
        _sample(each["id"], text, each["url"], each["license"]) for each, text in zip(described, texts, strict=True)
    ]


def _sample(id: str, text: str, url: str, license: str) -> dict[str, str]:
    cut = text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS] + " …"
    return {"id": id, "url": url, "license": license, "text": cut}


def _added(counters) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return dict(total.most_common())
