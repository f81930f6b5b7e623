"""Single steps of a recipe: languages, evaluation overlap, personal data, and what they do with huge documents."""

import json
import time
from collections import Counter

import pytest
from curation_corpus import NOUNS, prose, write_language_model

pytest.importorskip("datatrove")

from datatrove.data import Document  # noqa: E402

from opendeep_jax.config.checks import ConfigError  # noqa: E402
from opendeep_jax.config.schema import CurationConfig  # noqa: E402
from opendeep_jax.data.curation import recipe  # noqa: E402
from opendeep_jax.data.curation.evaluation import write_index  # noqa: E402
from opendeep_jax.data.curation.recipe import filter_steps, final_steps  # noqa: E402

ITEM = " ".join(NOUNS[40:70])


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> str:
    """A fastText model of two made-up languages, a and b."""
    pytest.importorskip("fasttext")
    return str(write_language_model(tmp_path_factory.mktemp("language") / "model.bin"))


def text_in(language: str) -> str:
    return " ".join(language + noun for noun in NOUNS[:50])


def judged(curation: CurationConfig, text: str) -> tuple[str | None, Document]:
    document = Document(text, "id")
    return filter_steps(curation)["language"](document), document


def test_documents_in_other_languages_are_dropped_by_name(language_model):
    curation = CurationConfig(languages=("a",), language_model=language_model)
    reason, document = judged(curation, text_in("a"))
    assert (reason, document.metadata["language"]) == (None, "a")
    assert judged(curation, text_in("b"))[0] == "language: b"


def test_a_language_that_is_not_sure_enough_is_dropped_as_such(language_model):
    mixed = " ".join(f"a{noun} b{noun}" for noun in NOUNS[:50])
    curation = CurationConfig(languages=("a", "b"), language_model=language_model, language_threshold=0.95)
    assert judged(curation, mixed)[0] == "language: uncertain"


def test_a_language_model_alone_drops_nothing_and_notes_the_language(language_model):
    reason, document = judged(CurationConfig(language_model=language_model), text_in("b"))
    assert (reason, document.metadata["language"]) == (None, "b")


def overlap_step(tmp_path, name: str, content: str, ngram: int = 13):
    (tmp_path / name).write_text(content)
    curation = CurationConfig(evaluation_sets=(str(tmp_path / name),), evaluation_ngram=ngram)
    write_index(curation, tmp_path / "index")
    return final_steps(curation, tmp_path / "index", Counter())["evaluation overlap"]


@pytest.mark.parametrize("name", ["items.jsonl", "items.parquet", "items.txt"])
def test_any_one_of_an_items_ngrams_removes_a_document(tmp_path, name):
    words = ITEM.split()
    if name.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.table({"q": [" ".join(words[:20])], "more": [[{"a": " ".join(words[20:])}]]}),
                            tmp_path / "table.parquet")  # fmt: skip
        curation = CurationConfig(evaluation_sets=(str(tmp_path / "table.parquet"),))
        write_index(curation, tmp_path / "index")
        step = final_steps(curation, tmp_path / "index", Counter())["evaluation overlap"]
    else:
        record = {"q": " ".join(words[:20]), "more": [{"a": " ".join(words[20:])}, 7, None]}
        step = overlap_step(tmp_path, name, json.dumps(record) + "\n" if name.endswith("jsonl") else ITEM)
    for begin in range(len(words) - 12):
        run = "\n".join(words[begin : begin + 13]).title()  # other case and white space
        assert step(Document(f"{prose(1)} {run}, {prose(2)}", "id")) == "evaluation overlap"
        assert step(Document(f"{prose(1)} {' '.join(words[begin : begin + 12])}", "id")) is None


def test_an_overlap_across_the_cut_of_a_huge_document_is_found(tmp_path, monkeypatch):
    cut = recipe.pieces
    monkeypatch.setattr(recipe, "pieces", lambda text, overlap: cut(text, 1 << 14, overlap))
    step = overlap_step(tmp_path, "items.txt", ITEM)
    filler = ("filler words without end or sense " * 1000)[: (1 << 14) - 60]
    assert step(Document(f"{filler} {ITEM} {filler}", "id")) == "evaluation overlap"
    assert step(Document(f"{filler} {filler}", "id")) is None


@pytest.mark.parametrize("content", ["no json", '{"q": "cut o'])
def test_a_damaged_evaluation_set_is_named(tmp_path, content):
    with pytest.raises(ConfigError, match=r"evaluation set .*items\.jsonl"):
        overlap_step(tmp_path, "items.jsonl", content)


def masked(text: str) -> tuple[str, Counter]:
    counts = Counter()
    document = Document(text, "id")
    final_steps(CurationConfig(mask_personal_data=True), None, counts)["personal data"](document)
    return document.text, counts


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a@b@c.de", "a@email@example.com"),
        ("<jane.doe+spam@mail.example.org>, x", "<email@example.com>, x"),
        ("@decorator def f(): pass", "@decorator def f(): pass"),
        ("user@host", "user@host"),
        ("from 8.8.4.4.", "from 22.214.171.124."),
        ("192.168.0.1 and 127.0.0.1 stay", "192.168.0.1 and 127.0.0.1 stay"),
        ("no address here", "no address here"),
    ],
)
def test_addresses_are_masked(text, expected):
    assert masked(text)[0] == expected


def test_masked_addresses_are_counted_by_kind():
    assert masked("a@b.de c@d.de 8.8.8.8 10.0.0.1")[1] == {"email": 2, "ip": 1}


def test_masking_a_megabyte_without_spaces_takes_seconds_not_hours():
    text = "QUJD+/0x" * 40_000 + "@" + "QUJD+/0x" * 40_000 + " me@there.org"
    start = time.perf_counter()
    assert masked(text)[0].endswith(" email@example.com")
    assert time.perf_counter() - start < 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gopher_repetition", "gopher_quality", "fineweb"])
def test_a_huge_document_is_judged_by_its_beginning(name):
    text = prose(1, 80) * 2_000
    start = time.perf_counter()
    filter_steps(CurationConfig(quality=(name,)))[name](Document(text, "id"))
    assert time.perf_counter() - start < 30
