"""Formats: parts cover a file exactly, damage is named, and memory stays bounded."""

import gzip
import json
import os
import struct
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st
from small_shards import TEXTS, write_jsonl, write_parquet

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import SourceConfig
from opendeep_jax.data.reading import columns, formats
from opendeep_jax.data.sources import Document, list_files, list_parts, read_part


def source_of(path, **fields) -> SourceConfig:
    return SourceConfig("s", str(path), license="CC0-1.0", **fields)


def parts_of(path, **fields) -> list[formats.Part]:
    source = source_of(path, **fields)
    return list_parts(source, list_files(source))


def read(path, **fields) -> list[Document]:
    left_out = []
    documents = [
        document
        for part in parts_of(path, **fields)
        for document in read_part(source_of(path, **fields), part, lambda *reason: left_out.append(reason))
    ]
    assert not left_out
    return documents


def texts(path, **fields) -> list[str]:
    return [document.text for document in read(path, **fields)]


def write_array_record(path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:3")
    for record in records:
        writer.write(record)
    writer.close()


def write(path, records: list[dict]) -> None:
    if path.suffix == ".parquet":
        write_parquet(path, {name: (None, [record[name] for record in records]) for name in records[0]})
    elif path.suffix == ".array_record":
        write_array_record(path, [json.dumps(record).encode() for record in records])
    else:
        write_jsonl(path, records)


ALL_FORMATS = ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.array_record"]


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_all_formats_give_the_same_documents(tmp_path, name):
    write(tmp_path / name, [{"text": text, "other": i} for i, text in enumerate(TEXTS)])
    expected = [Document(f"{name}#{i}", text, "", "CC0-1.0") for i, text in enumerate(TEXTS, start=1)]
    assert read(tmp_path / name) == expected


@given(
    lines=st.lists(st.one_of(st.just(b""), st.text("aé\u2028", max_size=30).map(lambda text: encoded(text)))),
    last_ends=st.booleans(),
    part_bytes=st.integers(1, 60),
)
def test_parts_of_json_lines_give_each_line_once_with_its_number(tmp_path_factory, lines, last_ends, part_bytes):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * last_ends)
    expected = [(number, json.loads(line)["text"]) for number, line in enumerate(lines, start=1) if line]
    if not path.stat().st_size:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "PART_BYTES", part_bytes)
        parts = parts_of(path)
        assert [part.begin for part in parts[1:]] == [part.end for part in parts[:-1]]
        assert all(part.end - part.begin <= part_bytes for part in parts)
        assert [(int(d.id.split("#")[1]), d.text) for d in read(path)] == expected


def encoded(text: str) -> bytes:
    return json.dumps({"text": text + "."}, ensure_ascii=False).encode()


@given(rows=st.integers(1, 40), per_group=st.integers(1, 7), part_bytes=st.integers(1, 2000))
def test_parts_of_parquet_give_each_row_once_with_its_number(tmp_path_factory, rows, per_group, part_bytes):
    path = tmp_path_factory.mktemp("rows") / "a.parquet"
    write_parquet(path, {"text": (pa.string(), [f"row {i}" for i in range(rows)])}, per_group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "PART_BYTES", part_bytes)
        patch.setattr(columns, "BATCH_BYTES", part_bytes)
        parts = parts_of(path)
        assert [part.begin for part in parts] == [0, *(part.end for part in parts[:-1])]
        assert [(d.id, d.text) for d in read(path)] == [(f"a.parquet#{i + 1}", f"row {i}") for i in range(rows)]


def test_parts_of_array_record_give_each_record_once(tmp_path, monkeypatch):
    write_array_record(tmp_path / "a.array_record", [b"text %d" % i for i in range(20)])
    size = (tmp_path / "a.array_record").stat().st_size
    monkeypatch.setattr(formats, "PART_BYTES", size // 3)
    assert len(parts_of(tmp_path)) == 4
    assert [(d.id, d.text) for d in read(tmp_path)] == [(f"a.array_record#{i + 1}", f"text {i}") for i in range(20)]


def test_linked_records_have_a_part_for_each_row_group(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"key": (pa.string(), list("abcdef"))}, rows_per_group=2)
    assert len(parts_of(tmp_path, text_url="memory://{key}")) == 3


def test_array_record_of_texts_has_no_fields_to_ask_for(tmp_path):
    write_array_record(tmp_path / "a.array_record", [b"plain text", b'{"text": 1}', b"\xff"])
    with pytest.raises(ConfigError, match="Record 1 .* is a text without fields, but its source asks for text, id"):
        read(tmp_path, id_field="id")
    with pytest.raises(ConfigError, match="Record 3 .*not UTF-8"):
        read(tmp_path)


COLUMN_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("type", COLUMN_TYPES, ids=str)
def test_text_column_may_have_any_type_of_text(tmp_path, type):
    values = [text.encode() for text in TEXTS] if type == pa.binary() else list(TEXTS)
    pq.write_table(pa.table({"text": pa.array(values).cast(type)}), tmp_path / "a.parquet")
    assert texts(tmp_path) == list(TEXTS)


def test_null_struct_gives_null_text(tmp_path):
    columns = {"meta": (pa.struct([("text", pa.string())]), [{"text": "one"}, None])}
    write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(ConfigError, match="Row 2 of .*null text"):
        read(tmp_path, text_field="meta.text")


def test_parquet_row_that_is_not_utf8_is_named(tmp_path):
    broken = pa.array([b"fine", b"\xff\xfe", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="Row 2 of .*a.parquet .*not UTF-8"):
        read(tmp_path)


def test_parquet_without_the_text_column_lists_its_columns_and_the_nearest(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"id": (None, [1]), "content": (None, ["x"]), "m": (None, [{"n": 1}])})
    with pytest.raises(ConfigError, match=r"no column 'text'.* id, content, m.n\. .*text_field=content"):
        parts_of(tmp_path)
    write_parquet(tmp_path / "a.parquet", {"texts": (None, ["x"])})
    with pytest.raises(ConfigError, match="text_field=texts"):
        parts_of(tmp_path)


def test_mixed_schemas_are_refused_before_anything_is_read(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": (None, ["x"])})
    write_parquet(tmp_path / "b.parquet", {"body": (None, ["x"])})
    with pytest.raises(ConfigError, match="b.parquet has no column 'text'"):
        parts_of(tmp_path)
    write_parquet(tmp_path / "b.parquet", {"text": (pa.int64(), [3])})
    with pytest.raises(ConfigError, match="b.parquet .*'text' of type int64"):
        parts_of(tmp_path)


@pytest.mark.parametrize("name", ALL_FORMATS)
@pytest.mark.parametrize("left", [0.3, 0.6, 0.98])
def test_file_that_is_cut_short_is_named(tmp_path, name, left):
    path = tmp_path / name
    noise = [os.urandom(400).hex() for _ in range(300)]
    write(path, [{"text": text, "other": 1} for text in noise])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left) - 7])
    with pytest.raises(ConfigError, match=f"{path}"):
        read(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.array_record"])
def test_file_of_another_format_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is something else altogether" * 100)
    with pytest.raises(ConfigError, match=f"{name} is (not a whole Parquet file|damaged or cut short)"):
        read(tmp_path)


def test_flipped_byte_in_an_array_record_is_named(tmp_path):
    path = tmp_path / "a.array_record"
    write_array_record(path, [b"text %d" % i for i in range(20)])
    content = bytearray(path.read_bytes())
    content[70] ^= 255
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="a.array_record is damaged"):
        read(tmp_path)


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', '{"body": "x"}', '{"text": 3}', "[" * 100_000])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_line_that_is_no_object_with_a_text_is_refused_with_its_number(tmp_path, name, line):
    content = f'{{"text": "fine"}}\n\n{line}'.encode()
    (tmp_path / name).write_bytes(zstandard.compress(content) if name.endswith("zst") else content)
    with pytest.raises(ConfigError, match=f"Line 3 of .*{name}"):
        read(tmp_path)


def test_several_compressed_frames_are_read_as_one_file(tmp_path):
    lines = [encoded(text) + b"\n" for text in ("one", "two", "three")]
    skippable = struct.pack("<II", 0x184D2A50, 5) + b"notes"  # as pzstd and seekable files have them
    frames = [zstandard.compress(lines[0]), skippable, zstandard.compress(lines[1]), zstandard.compress(lines[2])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "b.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    assert texts(tmp_path) == ["one.", "two.", "three."] * 2


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.zst", "a.jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    write(tmp_path / name, [{"text": f"{i} " * 20_000, "other": i} for i in range(600)])
    if name.endswith("parquet"):  # all in one row group
        pq.write_table(pq.read_table(tmp_path / name), tmp_path / name, row_group_size=600)
    (source,) = [source_of(tmp_path)]
    parts = parts_of(tmp_path)
    base, characters = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    arrow = 0
    for part in parts:
        for document in read_part(source, part, print):
            characters += len(document.text)
            arrow = max(arrow, pa.total_allocated_bytes() - base)
    _, python = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert characters > 40e6 and python + arrow < 30e6


def test_one_document_of_100_megabytes(tmp_path):
    long = "long document " * (100 * 2**20 // 14)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "short"}, {"text": long}, {"text": "short"}])
    write_parquet(tmp_path / "b.parquet", {"text": (None, ["short", long, "short"])})
    for name in ("a.jsonl", "b.parquet"):
        assert [len(text) for text in texts(tmp_path / name)] == [5, len(long), 5]
    assert len(parts_of(tmp_path / "a.jsonl")) == 13


def test_dataset_on_disk_is_read_by_its_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": list(TEXTS) * 4, "meta": [{"url": f"http://{i}"} for i in range(12)]})
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(tmp_path / "d"))
    monkeypatch.setattr(columns, "PART_BYTES", 200)
    path = f"datasets:{tmp_path}/d"
    assert len(parts_of(path)) > 1
    documents = read(path, url_field="meta.url")
    assert [document.text for document in documents] == list(TEXTS) * 4
    assert [document.url for document in documents] == [f"http://{i}" for i in range(12)]
    assert len({document.id for document in documents}) == 12
    assert texts(f"{path}?split=test") == [TEXTS[0]]
    with pytest.raises(ConfigError, match="Cannot load .*split=validation: it has no split 'validation'"):
        parts_of(f"{path}?split=validation")
    with pytest.raises(ConfigError, match="no column 'body'"):
        parts_of(path, text_field="body")


def test_missing_datasets_library_is_named_with_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'opendeep-jax\[datasets\]'"):
        list_files(source_of("datasets:some/name-that-no-test-loads"))
