"""The data card says what the accounting and the stores say, and text from data stays text."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from opendeep_jax.config.schema import DataConfig, RunConfig, SourceConfig
from opendeep_jax.data.card import build_card, write_card
from opendeep_jax.data.card.tables import (
    clusters_table,
    dropped_table,
    flow_table,
    human_bytes,
    human_count,
    lost_table,
)
from opendeep_jax.data.sources import list_files, list_parts
from opendeep_jax.data.storing.prepare import prepare_store
from opendeep_jax.plan.describe import describe as describe_plan
from opendeep_jax.plan.describe import description_table
from opendeep_jax.pretrained.card_facts import _license
from opendeep_jax.text.files import byte_tokenizer

EVIL = "<script>alert('&amp;')</script> ```` | *x* \x07"


class Checker(HTMLParser):
    """Collects tags, and fails on any that is not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def config(tmp_path) -> RunConfig:
    """Two sources: 40 documents of licences of their own, and 3 that would break a page."""
    records = [
        {"id": f"a{i}", "text": "x" * 2**i, "url": f"http://a/{i}", "by": "MIT" if i % 3 else "CC0-1.0"}
        for i in range(11)
    ]
    (tmp_path / "first.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "second.jsonl").write_text("\n".join(json.dumps({"text": EVIL + str(i)}) for i in range(3)))
    sources = (
        SourceConfig("first", str(tmp_path / "first.jsonl"), 3.0, "mixed", "First et al.", license_field="by",
                     url_field="url", id_field="id"),
        SourceConfig("<second>", str(tmp_path / "second.jsonl"), 1.0, "<i>", "*Second*"),
    )  # fmt: skip
    return RunConfig(name="a <b>run</b>", data=DataConfig(sources=sources, directory=str(tmp_path / "data")))


@pytest.fixture
def stores(config, tmp_path) -> list:
    tokenizer = byte_tokenizer()
    return [
        prepare_store(
            tmp_path / str(i),
            source,
            list_parts(source, list_files(source)),
            tokenizer,
            {"curation": None},
            1,
            lambda size: None,
        )  # fmt: skip
        for i, source in enumerate(config.data.sources)
    ]


@pytest.fixture
def curation() -> dict:
    """An accounting as `curation.write_accounting` writes it."""
    first = {
        "documents_in": 20, "bytes_in": 9000, "documents_out": 11, "bytes_out": 2047, "bytes_trimmed": -3,
        "dropped": {
            "near duplicate": {"documents": 5, "bytes": 6000},
            "gopher_quality: gopher_short_doc": {"documents": 3, "bytes": 956},
            "evaluation overlap": {"documents": 1, "bytes": 0},
        },
        "masked": {"email": 7}, "licenses": {"MIT": {"documents": 11, "bytes": 2047}}, "languages": {"en": 8, "de": 3},
    }  # fmt: skip
    second = first | {"documents_in": 3, "documents_out": 3, "dropped": {}, "masked": {}, "languages": {"en": 3}}
    return {
        "version": 1,
        "recipe": {"quality": ["gopher_quality"], "minhash_deduplication": True},
        "engines": {"datatrove": "0.10.1"},
        "sources": {"first": first, "<second>": second},
        "evaluation_sets": {"items.jsonl": {"items": 4, "ngrams": 90, "too_short": 1, "documents_removed": 1}},
        "duplicate_clusters": {"2": 3, "7": 1, "12": 2},
        "seconds": {"hash": 2.0},
    }


def test_the_counts_are_those_of_the_stores(config, stores):
    card = build_card(config, None, stores)
    assert [card["totals"][name] for name in ("documents", "bytes")] == [14, sum(s["bytes"] for s in card["sources"])]
    assert card["totals"]["tokens"] == sum(store.tokens for store in stores)
    assert card["licenses"]["CC0-1.0"]["documents"] == 4
    assert card["licenses"]["MIT"]["documents"] == 7
    assert [source["share"] for source in card["sources"]] == [0.75, 0.25]
    assert card["sources"][1]["content_hash"] == stores[1].content_hash
    assert card["tokenizer"] == {"name": "bytes", "content_hash": byte_tokenizer().content_hash}


def test_lengths_are_counted_by_powers_of_two(config, stores):
    lengths = build_card(config, None, stores)["sources"][0]["lengths"]
    tokens = np.array([2**i + 2 for i in range(11)])  # with the marks at both ends
    expected = np.bincount(np.floor(np.log2(tokens)).astype(int))
    assert lengths["documents"] == expected.tolist()
    assert sum(lengths["tokens"]) == tokens.sum()


def test_samples_come_from_the_store_spread_evenly_or_from_the_text(config, stores):
    for tokenizer, given in ((byte_tokenizer(), stores), (None, stores), (None, None)):
        card = build_card(config, None, given, samples_per_source=2, tokenizer=tokenizer)
        samples = card["sources"][0]["samples"]
        assert len(samples) == 2
        for sample in samples:
            number = int(sample["id"][1:])
            assert sample["text"].rstrip(" …") == "x" * min(2**number, 800)
            assert (sample["url"], sample["license"]) == (f"http://a/{number}", "MIT" if number % 3 else "CC0-1.0")
    assert build_card(config, None, stores, samples_per_source=0)["sources"][0]["samples"] == []


@pytest.mark.parametrize("with_curation, with_stores", [(True, True), (False, True), (False, False)])
def test_all_three_files_are_written_whatever_is_known(config, stores, curation, tmp_path, with_curation, with_stores):
    card = build_card(config, curation if with_curation else None, stores if with_stores else None)
    page = write_card(tmp_path / "card", card)
    assert page == tmp_path / "card" / "card.html"
    assert json.loads((tmp_path / "card" / "card.json").read_text()) == card
    assert (tmp_path / "card" / "card.md").read_text().startswith("# Data card: a \\<b\\>run")
    checker = Checker()
    checker.feed(page.read_text())
    assert checker.open == []


def test_text_from_data_is_text_on_the_page(config, stores, curation, tmp_path):
    page = write_card(tmp_path, build_card(config, curation, stores)).read_text()
    checker = Checker()
    checker.feed(page)
    assert not {"script", "b>run", "i>"} & checker.seen
    assert "<script" not in page and "<second" not in page
    assert "&lt;script&gt;alert(&#x27;&amp;amp;&#x27;)" in page
    assert not re.search(r'(src|href)="?(http|//)', page)


def test_a_sample_cannot_end_its_own_fence_in_markdown(config, stores, tmp_path):
    write_card(tmp_path, build_card(config, None, stores))
    lines = (tmp_path / "card.md").read_text().splitlines()
    fences = [line for line in lines if line and not line.strip("`")]
    assert "`" * 7 in fences and len(fences) % 2 == 0
    assert "| \\<second\\> |" in "\n".join(lines)


def test_the_tables_add_up(config, stores, curation):
    card = build_card(config, curation, stores)
    assert dropped_table(card).rows == [
        ("near duplicate", "5", "", "5"),
        ("gopher_quality: gopher_short_doc", "3", "", "3"),
        ("evaluation overlap", "1", "", "1"),
    ]
    assert clusters_table(card).rows == [("2", "3", "3"), ("5 to 9", "1", "6"), ("10 to 99", "2", "22")]
    assert flow_table(card).rows[0] == ("first", "20", "9 KB", "6.96 KB", "-3 B", "2.05 KB")
    assert card["languages"] == {"en": 11, "de": 3}
    assert card["masked"] == {"email": 7}


def test_what_was_left_out_while_tokenizing_is_counted_too(tmp_path):
    (tmp_path / "holes.jsonl").write_text('{"text": "whole"}\n{"text": ""}\n{"text": null}\n')
    source = SourceConfig("holes", str(tmp_path / "holes.jsonl"), bad_documents="leave_out")
    store = prepare_store(tmp_path / "store", source, list_parts(source, list_files(source)), byte_tokenizer(),
                          {"curation": None}, 1, lambda size: None)  # fmt: skip
    card = build_card(RunConfig(data=DataConfig(sources=(source,))), None, [store])
    assert {reason: counts["documents"] for reason, counts in card["sources"][0]["dropped"].items()} == {
        "empty text": 1,
        "null text": 1,
    }


def test_text_that_the_tokenizer_cannot_write_is_on_the_card(config, stores, tmp_path):
    stores[0].manifest["lost_bytes"] = 7
    card = build_card(config, None, stores)
    share = f"{7 / stores[0].manifest['bytes']:.2%}"
    assert lost_table(card).rows == [("first", "7", share)]
    page = write_card(tmp_path / "card", card)
    assert share in page.read_text() and f"| first | 7 | {share} |" in page.with_name("card.md").read_text()


@pytest.mark.parametrize(
    "given, found, told, on_model",
    [
        ({}, None, "unknown", "unknown"),
        ({"license": "MIT"}, {"MIT": {}}, "MIT", "MIT"),
        ({"license_field": "by"}, {"CC0-1.0": {}, "": {}}, "by document", "CC0-1.0, unknown"),
        ({"license_field": "by"}, None, "by document", "by document"),
    ],
)
def test_a_license_goes_by_one_word_everywhere(given, found, told, on_model):
    source = SourceConfig("mine", "mine.jsonl", **given)
    config = RunConfig(data=DataConfig(sources=(source,)))
    assert f"license: {told})" in description_table(describe_plan(config))
    assert _license(source, {"licenses": found}) == on_model
    assert source.known_license == told


def test_a_curation_that_is_not_tokenized_yet_has_a_card(tmp_path):
    pytest.importorskip("datatrove")
    import dataclasses

    from opendeep_jax.config.schema import CurationConfig
    from opendeep_jax.data.curation import curate, read_accounting

    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("one", "two", "one")))
    source = SourceConfig("texts", str(tmp_path / "texts.jsonl"), license="MIT")
    data = DataConfig((source,), directory=str(tmp_path), curation=CurationConfig(exact_deduplication=True))
    card = build_card(RunConfig(data=data), read_accounting(curate(data, progress=False)), None)
    assert card["totals"] == {"documents": 2, "bytes": 6}
    assert sorted(sample["text"] for sample in card["sources"][0]["samples"]) == ["one", "two"]
    assert card["licenses"] == {"MIT": {"documents": 2, "bytes": 6}}
    assert "exact duplicate" in write_card(tmp_path / "card", card).read_text()
    assert dataclasses.asdict(data.curation)["minhash_engine"] == card["curation"]["recipe"]["minhash_engine"]


@pytest.mark.parametrize(
    "number, count, size",
    [(0, "0", "0 B"), (999, "999", "999 B"), (999_900, "1M", "1 MB"), (1.5e12, "1.5T", "1.5 TB"), (2e9, "2B", "2 GB")],
)
def test_numbers_are_told_as_people_say_them(number, count, size):
    assert (human_count(number), human_bytes(number)) == (count, size)
