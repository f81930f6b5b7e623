"""Single steps of a recipe: languages, evaluation overlap, personal data, and what they do with huge documents."""

import json
import time
from collections import Counter

import pytest
from curation_corpus import NOUNS, prose, write_language_model
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datatrove")

from datatrove.data import Document  # noqa: E402

from opendeep_jax.config.checks import ConfigError  # noqa: E402
from opendeep_jax.config.schema import CurationConfig  # noqa: E402
from opendeep_jax.data.curation import recipe  # noqa: E402
from opendeep_jax.data.curation.evaluation import write_index  # noqa: E402
from opendeep_jax.data.curation.recipe import filter_steps, final_steps, mask_emails  # noqa: E402

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
        ("请联系john@b.com谢谢", "请联系email@example.com谢谢"),
        ("用户@例子.广告 müller@example.de", "email@example.com email@example.com"),
        ("'john@x.org', x@[1.2.3.4]", "'email@example.com', email@example.com"),
        ('"john doe"@x.org;a.@b.org', "email@example.com;email@example.com"),
        ("q" * 90 + "@b.org", "email@example.com"),
        ("x@y.org@z.org", "email@example.com"),
    ],
)
def test_addresses_are_masked(text, expected):
    assert masked(text)[0] == expected


NAMES = st.from_regex(r"[a-zA-Z0-9](?:[a-z0-9._+'%-]{0,80}[a-z0-9_])?", fullmatch=True)
DOMAINS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,20}[a-z])?){1,3}", fullmatch=True)


@given(
    st.lists(st.tuples(NAMES, DOMAINS), min_size=1, max_size=30),
    st.sampled_from([",", ";", ", ", " ", "\n", ">,<", '","', "|", "\t", ":"]),
)
def test_no_address_of_a_list_is_left_and_all_are_counted(people, separator):
    text = separator.join(f"{name}@{domain}" for name, domain in people)
    found, counts = masked(f"To: {text}")
    assert found == "To: " + separator.join(["email@example.com"] * len(people))
    assert counts["email"] == len(people)


def test_masking_takes_time_in_proportion_to_the_text():
    for text in ("a.@" * 100_000, "@a-" * 100_000, "@a." * 100_000, '"' * 100_000 + "@x.org", "-" * 300_000 + "@b-c"):
        mask_emails(text)  # hours, were any part of it looked at for each of the others


YEARS = ", ".join(map(str, range(1998, 2013)))


def test_numbers_in_a_row_overlap_with_no_evaluation_set(tmp_path):
    step = overlap_step(tmp_path, "items.txt", f"f([{', '.join(map(str, range(1, 15)))}]) is 91 but g gives {YEARS}")
    for text in (YEARS, "\n".join(str(1000 + 37 * i) for i in range(20)), " ".join(map(str, range(1, 15)))):
        assert step(Document(f"The cup was held in {text}.", "id")) is None
    assert step(Document(f"11, 12, 13, 14]) is 91 but g gives {YEARS[:40]}", "id")) == "evaluation overlap"


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
