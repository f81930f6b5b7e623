import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_corpus import write_corpus

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import SourceConfig
from opendeep_jax.data.sources import list_files, read_documents, read_split, split_of, survey


def names(source: SourceConfig) -> list[str]:
    return [file.name for file in list_files(source)]


def texts(source: SourceConfig, split: str, fraction: float) -> dict[str, str]:
    return {d.name: d.text for d in read_split(list_files(source), split, fraction)}


def test_standard_library_is_listed_without_tests_installed_packages_or_build_records():
    found = names(SourceConfig())
    assert found == sorted(found) and "json/decoder.py" in found and "os.py" in found
    parts = {part for name in found for part in name.split("/")}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    assert not [part for part in parts if part.startswith("_sysconfigdata")]


def test_directory_lists_text_files_by_relative_path_and_nothing_else(tmp_path):
    for name in ("b/two.md", "a.txt", "b/one.py", "image.png", ".git/config.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert names(SourceConfig("s", str(tmp_path))) == ["a.txt", "b/one.py", "b/two.md"]
    assert names(SourceConfig("s", str(tmp_path / "a.txt"))) == ["a.txt"]
    assert names(SourceConfig("s", str(tmp_path / "**/*.py"))) == ["b/one.py"]


def test_documents_keep_their_text_byte_for_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\x00 é".encode())
    (file,) = list_files(SourceConfig("s", str(tmp_path)))
    assert [d.text for d in read_documents(file)] == ["\ufeffone\r\ntwo\x00 é"]


def test_jsonl_gives_one_document_a_line_and_skips_what_is_not_unicode(tmp_path):
    lines = [json.dumps({"text": "first", "id": 1}).encode(), b"", b'{"text": "\xff"}', b'{"text": "\\ud800"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, b'{"text": ""}', b'{"text": "last\\u2028"}', b""]))
    (file,) = list_files(SourceConfig("s", str(tmp_path)))
    assert list(read_documents(file)) == [
        ("a.jsonl#1", "first"),
        ("a.jsonl#3", None),
        ("a.jsonl#4", None),
        ("a.jsonl#6", "last\u2028"),
    ]


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', '{"body": "x"}', '{"text": 3}'])
def test_jsonl_line_without_text_is_refused_with_its_number(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    (file,) = list_files(SourceConfig("s", str(tmp_path)))
    with pytest.raises(ConfigError, match="Line 2 of .*a.jsonl"):
        list(read_documents(file))


def test_missing_path_and_directory_without_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        list_files(SourceConfig("s", str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match="'s' is empty"):
        list_files(SourceConfig("s", str(tmp_path)))
    with pytest.raises(ConfigError, match="'s' is empty"):
        list_files(SourceConfig("s", str(tmp_path / "*.txt")))


def test_file_that_cannot_be_reached_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="Cannot read .*a.txt: No such file"):
        list_files(SourceConfig("s", str(tmp_path)))


def test_empty_and_undecodable_corpora_are_refused(tmp_path):
    source = SourceConfig("s", str(tmp_path / "text"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_bytes(b"")
    with pytest.raises(ConfigError, match="its files are empty"):
        survey(source, list_files(source), 0.1, tmp_path)
    (tmp_path / "text/a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="none of its 1 documents is UTF-8"):
        survey(source, list_files(source), 0.1, tmp_path)


def test_split_without_documents_is_refused_unless_nothing_is_to_be_held_out(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("text")
    source = SourceConfig("s", str(tmp_path / "text"))
    with pytest.raises(ConfigError, match="no documents held out.*data.held_out_fraction=0.001"):
        survey(source, list_files(source), 0.001, tmp_path)
    with pytest.raises(ConfigError, match="no documents for training"):
        survey(source, list_files(source), 0.9999, tmp_path)
    assert survey(source, list_files(source), 0.0, tmp_path).documents == {"train": 1, "held_out": 0}


@given(st.lists(st.text("ab/é"), unique=True), st.floats(0, 1))
def test_split_depends_on_the_name_alone_and_grows_with_the_fraction(names, fraction):
    held_out = {name for name in names if split_of(name, fraction) == "held_out"}
    assert held_out == {name for name in reversed(names) if split_of(name, fraction) == "held_out"}
    assert held_out <= {name for name in names if split_of(name, min(1.0, fraction + 0.1)) == "held_out"}


def test_split_is_the_same_on_every_machine_and_near_the_asked_fraction():
    held_out = [i for i in range(2000) if split_of(f"document-{i}", 0.1) == "held_out"]
    assert held_out[:8] == [18, 20, 49, 64, 78, 79, 89, 95]
    assert 0.08 < len(held_out) / 2000 < 0.12


def test_splits_divide_the_documents_and_do_not_depend_on_where_the_corpus_lies(tmp_path):
    one, two = (SourceConfig("s", str(write_corpus(tmp_path / name, 30))) for name in ("one", "two"))
    train, held_out = texts(one, "train", 0.2), texts(one, "held_out", 0.2)
    assert len(train) + len(held_out) == 30 and not set(train) & set(held_out) and held_out
    assert texts(two, "train", 0.2) == train


def test_survey_counts_hashes_and_names_what_it_skips(tmp_path, corpus):
    (corpus / "latin.txt").write_bytes("é".encode("latin-1"))
    source = SourceConfig("s", str(corpus))
    found = survey(source, list_files(source), 0.2, tmp_path / "kept")
    assert found.skipped == ["latin.txt"] and len(found.files) == 31
    train = texts(source, "train", 0.2)
    assert found.documents["train"] == len(train)
    assert found.bytes["train"] == sum(len(text.encode()) for text in train.values())


def test_survey_is_kept_until_a_file_changes(tmp_path, corpus, monkeypatch):
    source, kept = SourceConfig("s", str(corpus)), tmp_path / "kept"
    first = survey(source, list_files(source), 0.2, kept)
    with monkeypatch.context() as patch:
        patch.setattr("opendeep_jax.data.sources.read_bytes", lambda file: pytest.fail("read again"))
        assert survey(source, list_files(source), 0.2, kept) == first
    path = corpus / "part0/0-0.py"
    path.write_bytes(bytes(reversed(path.read_bytes()[:5])) + path.read_bytes()[5:])
    os.utime(path, ns=(1, 1))
    assert survey(source, list_files(source), 0.2, kept).content_hash != first.content_hash


def test_damaged_survey_is_made_again(tmp_path, corpus):
    source, kept = SourceConfig("s", str(corpus)), tmp_path / "kept"
    first = survey(source, list_files(source), 0.2, kept)
    (path,) = kept.iterdir()
    path.write_text(path.read_text()[:50])
    assert survey(source, list_files(source), 0.2, kept) == first
