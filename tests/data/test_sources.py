import dataclasses
import json
import os
import subprocess
import sys

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_shards import TEXTS, write_jsonl, write_parquet

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import SourceConfig
from opendeep_jax.data import sources
from opendeep_jax.data.reading import files
from opendeep_jax.data.reading.formats import SourceFile
from opendeep_jax.data.reading.listing import list_source
from opendeep_jax.data.sources import (
    Document,
    fingerprint,
    fraction_of,
    hash_id,
    held_out,
    list_files,
    list_parts,
    read_part,
)


def names(source: SourceConfig) -> list[str]:
    return [file.name for file in list_files(source)]


def read(source: SourceConfig, left_out: list | None = None) -> list[Document]:
    """All documents of a source; `left_out` collects what was not one, and nothing may be if it is not given."""
    counted = [] if left_out is None else left_out
    parts = list_parts(source, list_files(source))
    documents = [d for part in parts for d in read_part(source, part, lambda *reason: counted.append(reason))]
    assert left_out is not None or not counted
    return documents


@pytest.fixture
def memory():
    """An empty fsspec file system in memory, which is remote to us."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def test_standard_library_is_listed_without_tests_installed_packages_or_build_records():
    found = names(SourceConfig())
    assert found == sorted(found) and "json/decoder.py" in found and "os.py" in found
    parts = {part for name in found for part in name.split("/")}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    assert not [part for part in parts if part.startswith("_sysconfigdata")]


def test_directory_lists_text_files_by_relative_path_and_nothing_else(tmp_path):
    for name in ("b/two.md", "a.txt", "b/one.py", "image.png", ".git/config.txt", "b/.hidden.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert names(SourceConfig("s", str(tmp_path))) == ["a.txt", "b/one.py", "b/two.md"]
    assert names(SourceConfig("s", str(tmp_path / "a.txt"))) == ["a.txt"]
    assert names(SourceConfig("s", str(tmp_path / "**/*.py"))) == ["b/one.py"]


def test_remote_files_are_listed_and_read_like_local_ones(tmp_path, memory):
    for root in (tmp_path, "memory://bucket"):
        for name, content in {"a/1.jsonl": b'{"text": "one"}\n', "a/2.jsonl": b'{"text": "two"}', "c.png": b""}.items():
            with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
                file.write(content)
    write_parquet(tmp_path / "p.parquet", {"text": (None, list(TEXTS))})
    memory.put_file(str(tmp_path / "p.parquet"), "/bucket/p.parquet")
    memory.pipe_file("/bucket/.hidden/x.jsonl", b"{}")
    for pattern in ("", "/a", "/a/1.jsonl", "/*/2.jsonl", "/*.parquet"):
        here, there = (SourceConfig("s", f"{root}{pattern}") for root in (tmp_path, "memory://bucket"))
        assert names(here) == names(there) and read(here) == read(there) != []


def test_what_is_no_place_or_has_no_text_is_refused(tmp_path, memory):
    for path, message in {
        str(tmp_path / "nowhere"): "No such file or directory: .*nowhere",
        str(tmp_path): "'s' is empty",
        str(tmp_path / "*.txt"): "'s' is empty",
        "memory://nowhere/at/all.jsonl": "Cannot read memory://nowhere/at/all.jsonl: No such file",
        "memory://nowhere/*.jsonl": "'s' is empty",
        "strange://bucket/a.jsonl": "Cannot read strange://.*Protocol not known",
        "datasets:nowhere/at/all?sprit=train": "no option 'sprit'.*name, split",
    }.items():
        with pytest.raises(ConfigError, match=message):
            list_files(SourceConfig("s", path))
    with pytest.raises(ConfigError, match="has no path"):
        list_files(SourceConfig("s"))


def test_missing_driver_and_unreachable_host_are_named_with_the_cure(memory, monkeypatch):
    def raising(error):
        def fail(*args, **kwargs):
            raise error

        return fail

    with monkeypatch.context() as patch:
        patch.setattr(fsspec.core, "url_to_fs", raising(ImportError("Install s3fs to access S3")))
        with pytest.raises(ConfigError, match=r"s3://bucket/a.*Install s3fs.*opendeep-jax\[remote\]"):
            list_files(SourceConfig("s", "s3://bucket/a"))
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "isdir", raising(TimeoutError("no route to host")))
        with pytest.raises(ConfigError, match="memory://bucket: TimeoutError: no route to host. Check the address"):
            list_files(SourceConfig("s", "memory://bucket"))
    for name in ("a.jsonl", "a.parquet", "a.jsonl.zst"):
        memory.pipe_file(f"/bucket/{name}", b'{"text": "some"}')
        with monkeypatch.context() as patch:
            patch.setattr(type(memory), "_open", raising(ConnectionError("reset by peer")))
            with pytest.raises(ConfigError, match=f"bucket/{name}: ConnectionError: reset by peer"):
                read(SourceConfig("s", f"memory://bucket/{name}"))


def test_file_that_cannot_be_reached_or_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="Cannot read .*a.txt: No such file"):
        list_files(SourceConfig("s", str(tmp_path)))
    (tmp_path / "gone").write_text("text")
    source = SourceConfig("s", str(tmp_path))
    (part,) = list_parts(source, list_files(source))
    (tmp_path / "gone").unlink()
    (tmp_path / "gone").mkdir()
    with pytest.raises(ConfigError, match="Cannot read .*a.txt: Is a directory. Make the file readable"):
        list(read_part(source, part, print))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.array_record"])
def test_file_without_permission_is_named(tmp_path, monkeypatch, name):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / name).write_text("text")
    monkeypatch.setattr(files, "open", refuse, raising=False)  # root, who may run this, is refused nothing
    with pytest.raises(ConfigError, match=f"Cannot read .*{name}: Permission denied. Make the file readable"):
        read(SourceConfig("s", str(tmp_path)))


def test_a_readme_beside_records_is_not_taken_for_a_document(tmp_path):
    write_jsonl(tmp_path / "a.jsonl.gz", [{"text": "one"}])
    (tmp_path / "README.md").write_text("About these data")
    listing = list_source(SourceConfig("s", str(tmp_path)))
    assert [file.name for file in listing.files] == ["a.jsonl.gz"]
    assert listing.skipped == {"text about the records": ["README.md"]}
    (tmp_path / "story.md").write_text("A document?")
    with pytest.raises(ConfigError, match=r"mixes files of records, as a.jsonl.gz, with files of text, as README.md"):
        list_files(SourceConfig("s", str(tmp_path)))
    assert names(SourceConfig("s", str(tmp_path / "**/*.gz"))) == ["a.jsonl.gz"]


def test_text_files_keep_their_text_byte_for_byte_and_others_are_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\x00 é".encode())
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    left_out = []
    source = SourceConfig("s", str(tmp_path), license="CC0-1.0")
    assert read(source, left_out) == [Document("a.txt", "\ufeffone\r\ntwo\x00 é", "", "CC0-1.0")]
    assert left_out == [("not UTF-8", "latin.txt")]


def test_source_of_empty_files_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    source = SourceConfig("s", str(tmp_path))
    with pytest.raises(ConfigError, match="'s' .*its files are empty"):
        list_parts(source, list_files(source))


RECORDS = [
    {"text": "one", "key": 17, "meta": {"url": "http://a", "licenses": ["MIT", None, "ISC"]}, "lang": "en", "ok": True},
    {"text": "two", "key": 18, "meta": {"url": None, "licenses": []}, "lang": "fr", "ok": True},
    {"text": "three", "key": 19, "meta": {"url": "http://c", "licenses": ["MIT"]}, "lang": "en", "ok": False},
    {"text": "four", "key": None, "meta": {"url": "http://d", "licenses": None}, "lang": "en", "ok": True},
]


def write_records(path) -> str:
    if path.suffix == ".parquet":
        write_parquet(path, {name: (None, [record[name] for record in RECORDS]) for name in RECORDS[0]})
    else:
        write_jsonl(path, RECORDS)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_fields_give_id_url_license_and_what_is_kept(tmp_path, name):
    source = SourceConfig(
        "s",
        write_records(tmp_path / name),
        license="CC0-1.0",
        id_field="key",
        url_field="meta.url",
        license_field="meta.licenses",
        keep=("lang=en", "ok=true"),
    )
    left_out = []
    assert read(source, left_out) == [
        Document("17", "one", "http://a", "MIT AND ISC"),
        Document(f"{name}#4", "four", "http://d", "CC0-1.0"),
    ]
    assert left_out == [("lang is not en", "18"), ("ok is not true", "19")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_field_name_with_a_dot_wins_over_a_nested_one(tmp_path, name):
    record = {"a.b": "whole", "a": {"b": "nested", "c.d": "inner"}}
    if name.endswith("parquet"):
        write_parquet(tmp_path / name, {key: (None, [value]) for key, value in record.items()})
    else:
        write_jsonl(tmp_path / name, [record])
    for field, text in {"a.b": "whole", "a.c.d": "inner"}.items():
        assert [d.text for d in read(SourceConfig("s", str(tmp_path / name), text_field=field))] == [text]


BAD_TEXTS = {"null text": None, "empty text": "", "not UTF-8": "\ud800"}


@pytest.mark.parametrize("reason", BAD_TEXTS)
def test_unusable_text_is_refused_with_its_place_or_left_out_and_counted(tmp_path, reason):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps({"text": BAD_TEXTS[reason], "id": 7}))
    source = SourceConfig("s", str(path))
    with pytest.raises(ConfigError, match=f"Line 2 of {path} .*{reason}.*bad_documents=leave_out"):
        read(source)
    left_out = []
    lenient = dataclasses.replace(source, bad_documents="leave_out")
    assert [d.text for d in read(lenient, left_out)] == ["fine"] and left_out == [(reason, "a.jsonl#2")]


def test_id_that_utf8_cannot_write_is_made_writable(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "some", "id": "x\\ud800y"}')
    (document,) = read(SourceConfig("s", str(path), id_field="id"))
    assert document.id == "x\\ud800y" and hash_id(document.id)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("keep", ("language",), "written as field=value"),
        ("id_field", "key", "Line 1 .* has no field 'key'"),
        ("text_field", "body", "Line 1 .* has no field 'body'"),
        ("text_field", "n", "Line 1 .* has 3, which is no text, in its field 'n'"),
        ("text_url", "memory://x/{blob}", "Line 1 .* has no field 'blob', which text_url"),
    ],
)
def test_setting_that_does_not_fit_the_records_is_refused(tmp_path, field, value, message):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "some", "n": 3}])
    with pytest.raises(ConfigError, match=message):
        read(SourceConfig("s", str(tmp_path / "a.jsonl"), **{field: value}))


def write_links(tmp_path, memory, contents: dict[str, bytes | None]) -> SourceConfig:
    for key, content in contents.items():
        if content is not None:
            memory.pipe_file(f"/texts/{key}/x", content)
    write_jsonl(tmp_path / "links.jsonl", [{"key": key, "src_encoding": "latin-1"} for key in contents])
    return SourceConfig("s", str(tmp_path / "links.jsonl"), id_field="key", text_url="memory://texts/{key}/x")


def test_linked_texts_are_fetched_in_order_and_decoded(tmp_path, memory):
    source = write_links(tmp_path, memory, {str(i): f"é {i}".encode("latin-1") for i in range(150)})
    assert read(source) == [Document(str(i), f"é {i}", "", source.license) for i in range(150)]


def test_linked_text_that_is_not_there_is_a_bad_document(tmp_path, memory):
    source = write_links(tmp_path, memory, {"a": b"one", "b": None, "c": b""})
    with pytest.raises(ConfigError, match="Line 2 .*text not found"):
        read(source)
    left_out = []
    assert len(read(dataclasses.replace(source, bad_documents="leave_out"), left_out)) == 1
    assert left_out == [("text not found", "b"), ("empty text", "c")]


def test_linked_text_that_is_damaged_is_refused(tmp_path, memory):
    with pytest.raises(ConfigError, match="memory://texts/a/x is damaged"):
        read(write_links(tmp_path, memory, {"a": b"\x1f\x8b\x08 no gzip"}))


def test_fingerprint_follows_what_decides_the_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    source = SourceConfig("s", str(tmp_path), id_field="")
    first = fingerprint(source, list_files(source))
    for change in ({"weight": 2.0}, {"epochs": 3.0}, {"citation": "x"}):
        assert fingerprint(dataclasses.replace(source, **change), list_files(source)) == first
    for change in ({"text_field": "body"}, {"id_field": "id"}, {"license": "x"}, {"keep": ("a=b",)}):
        assert fingerprint(dataclasses.replace(source, **change), list_files(source)) != first
    later = {"separator": "x", "encoding": "latin-1", "held_out_end": 0.1}
    assert set(later) == set(sources.LATER_FIELDS)
    for name, value in later.items():
        changed = dataclasses.replace(source, **{name: value})
        assert fingerprint(changed, list_files(source)) != first
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    assert fingerprint(source, list_files(source)) != first


def test_fields_that_came_later_leave_the_fingerprints_of_before():
    files = [SourceFile("a.jsonl", "/x/a.jsonl", 3, "7")]
    assert fingerprint(SourceConfig("s", "/x", license="y"), files)[:16] == "915c1078911ad242"


def test_stamp_of_a_remote_file_prefers_a_hash_of_its_content():
    assert files._stamp({"lfs": {"sha256": "abc"}, "blob_id": "x"}) == "abc"
    assert files._stamp({"ETag": '"e"', "mtime": 3}) == '"e"'
    assert files._stamp({"name": "x"}) == ""


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1), st.floats(0, 1))
def test_holding_out_depends_on_the_id_alone_and_grows_with_the_fraction(hashes, fraction):
    array = np.array(hashes, dtype=np.uint64)
    chosen = held_out(array, fraction)
    assert chosen.tolist() == [bool(held_out(value, fraction)) for value in hashes]
    assert not (chosen & ~held_out(array, min(1.0, fraction + 0.1))).any()
    assert not held_out(array, 0.0).any() and held_out(array, 1.0).all()


def test_fractions_are_the_same_on_every_machine_uniform_and_independent_between_purposes():
    hashes = np.array([hash_id(f"document-{i}") for i in range(20_000)], dtype=np.uint64)
    assert hash_id("document-0") == 1850834454840799979
    assert np.flatnonzero(held_out(hashes[:100], 0.1)).tolist() == [13, 15, 44, 48, 58, 64, 81, 96]
    one, two = fraction_of(hashes, "held_out"), fraction_of(hashes, "tokenizer")
    assert 0 <= one.min() and one.max() < 1
    counts, _ = np.histogram(one, bins=10, range=(0, 1))
    assert abs(counts - 2000).max() < 200 and abs(np.corrcoef(one, two)[0, 1]) < 0.03
    assert abs(np.corrcoef(one, hashes.astype(np.float64))[0, 1]) < 0.03


def test_sources_can_be_listed_without_heavy_imports():
    heavy = "jax", "pyarrow", "fsspec", "zstandard", "tensorstore"
    program = f"import sys, {sources.__name__}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"


def test_linked_directories_are_read_once_and_endings_may_be_in_capitals(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "A.JSONL").write_text('{"text": "one"}\n')
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "there")
    (tmp_path / "corpus" / "itself").symlink_to(tmp_path / "corpus")
    source = SourceConfig("corpus", str(tmp_path / "corpus"))
    assert [file.name for file in list_files(source)] == ["linked/A.JSONL"]
