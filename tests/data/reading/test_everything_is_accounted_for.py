"""Whatever is at a source's path is read, counted as left out with its reason, or refused: a corpus of odd files."""

import bz2
import csv
import gzip
import http.server
import io
import json
import lzma
import os
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import SourceConfig
from opendeep_jax.data.reading.listing import list_source
from opendeep_jax.data.sources import Document, list_parts, read_part

WORDS = ["one", "two\nlines", 'a "quoted" word, and a comma', "déjà vu", "nul \x00 sign", "last"]


def read(path, **fields) -> tuple[list[Document], dict[str, int]]:
    """All documents of a source, and how many documents and files were left out for each reason."""
    source = SourceConfig("s", str(path), license="x", **fields)
    listing = list_source(source)
    counts = {reason: len(names) for reason, names in listing.skipped.items()}

    def left_out(reason: str, id: str) -> None:
        counts[reason] = counts.get(reason, 0) + 1

    parts = list_parts(source, listing.files)
    documents = [document for part in parts for document in read_part(source, part, left_out)]
    assert len({document.id for document in documents}) == len(documents)
    return documents, counts


def texts(path, **fields) -> list[str]:
    documents, counts = read(path, **fields)
    assert not counts
    return [document.text for document in documents]


def lines(words=WORDS, end="\n") -> bytes:
    return "".join(json.dumps({"text": word}) + end for word in words).encode()


def table(delimiter=",", words=WORDS, end="\r\n") -> bytes:
    sheet = io.StringIO(newline="")
    writer = csv.writer(sheet, delimiter=delimiter, lineterminator=end)
    writer.writerows([("n", "text"), *enumerate(words)])
    return sheet.getvalue().encode()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": WORDS}), sink)
    return sink.getvalue()


def array() -> bytes:
    return json.dumps([{"text": word} for word in WORDS], indent=1).encode()


PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
FORMATS = {
    "a.jsonl": lines(),
    "b.ndjson": lines(end="\r\n"),
    "c.json": lines(),
    "d.json": array(),
    "e.JSON": b"\xef\xbb\xbf" + array().replace(b"\n", b"\r\n"),
    "f.json": "\n".join(json.dumps({"text": word}, indent=2) for word in WORDS).encode(),
    "g.csv": table(),
    "h.tsv": b"\xef\xbb\xbf" + table("\t", end="\n"),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("packer", PACKERS)
def test_every_format_is_read_by_its_name_also_compressed(tmp_path, name, packer):
    (tmp_path / f"{name}{packer}").write_bytes(PACKERS[packer](FORMATS[name]))
    assert texts(tmp_path) == WORDS
    assert texts(tmp_path / f"{name}{packer}") == WORDS


@pytest.mark.parametrize("packer", PACKERS)
def test_text_is_a_document_a_file_also_compressed(tmp_path, packer):
    (tmp_path / f"a b [1].txt{packer}").write_bytes(PACKERS[packer]("é\r\nx".encode()))
    assert read(tmp_path) == read(tmp_path / f"a b [1].txt{packer}")
    assert read(tmp_path) == ([Document(f"a b [1].txt{packer}", "é\r\nx", "", "x")], {})


ODD = {
    **{f"deep/{name}{packer}": PACKERS[packer](content) for name, content in FORMATS.items() for packer in PACKERS},
    "with space/ünï [x].jsonl": lines(),
    "p.parquet": parquet(),
    "bom.jsonl": b"\xef\xbb\xbf" + lines(),
    "blank.jsonl": b"\n\n" + lines().replace(b"\n", b"\n \n"),
    "null.jsonl": lines([None, "", "fine"]),
    "broken.jsonl": lines()[:-3] + b"\n[1]\nnot JSON\n" + b'"\xff\n',
    "header.csv": b"text\n",
    "ragged.csv": b"n,text\n1,fine\n2\n",
    "empty.jsonl": b"",
    "README.md": b"About",
    "LICENSE.txt": b"Terms",
    "dataset_info.json": b"{}",
    "page.html": b"<p>",
    "no_ending": b"x",
    "_SUCCESS": b"",
    ".hidden.jsonl": lines(),
    ".git/config.jsonl": lines(),
    "all.zip": b"PK",
    "all.tar.gz": gzip.compress(b""),
    "b.jsonl.lz4": b"x",
}


def test_the_sum_of_documents_and_files_is_always_accounted_for(tmp_path):
    for name, content in ODD.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a_link.jsonl").symlink_to(tmp_path / "bom.jsonl")
    (tmp_path / "again").symlink_to(tmp_path / "deep")
    os.link(tmp_path / "bom.jsonl", tmp_path / "hard.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    documents, counts = read(tmp_path, bad_documents="leave_out")
    whole = 40 + 1 + 1 + 1 + 1  # deep, with space, p.parquet, bom.jsonl, blank.jsonl
    assert len(documents) == whole * len(WORDS) + 1 + (len(WORDS) - 1) + 1
    assert counts == {
        "null text": 1,
        "empty text": 1,
        "malformed": 1 + 1 + 1 + 1,  # cut off, array, no JSON, and a row without its field
        "not UTF-8": 1,
        "empty file": 1,
        "text about the records": 2,
        "settings of a data set": 1,
        "file ending in .html, which is not read": 1,
        "file without an ending, which is not read": 2,
        "hidden": 2,
        "archive (.zip), which must be unpacked": 1,
        "archive (.tar.gz), which must be unpacked": 1,
        "file ending in .lz4, which is not read": 1,
        "file that is read under another name": 2,
        "link to a directory that is read": 1,
        "no regular file": 1,
    }


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A directory, and its address over HTTP; the server tells no sizes of what has `unsized` in its name."""
    root = tmp_path_factory.mktemp("served")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(root))

        def send_header(self, name, value):
            if not (name == "Content-Length" and "unsized" in self.path):
                super().send_header(name, value)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield root, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_files_over_http_are_read_whether_or_not_the_server_tells_their_sizes(served):
    root, address = served
    (root / "in").mkdir()
    contents = {
        "a.jsonl": lines(),
        "unsized.jsonl": lines(),
        "b.jsonl.gz": gzip.compress(lines()),
        "c.parquet": parquet(),
        "in/d e.json": array(),
        "in/f.csv": table(),
        "links.jsonl": lines([f'<a href="{i}.jsonl">' for i in range(6)]),
    }
    for name, content in contents.items():
        (root / name).write_bytes(content)
    (root / "page.pdf").write_bytes(b"x")
    (root / "empty.jsonl").write_bytes(b"")
    documents, counts = read(f"{address}/")
    assert len(documents) == len(contents) * len(WORDS)
    assert counts == {"file ending in .pdf, which is not read": 1, "empty file": 1}
    for name in contents:
        assert len(texts(f"{address}/{name.replace(' ', '%20')}")) == len(WORDS)
    assert len(texts(f"{address}/a.jsonl?download=true")) == len(WORDS)
    assert len(texts(f"{address}/[a-b]*.jsonl*")) == 2 * len(WORDS)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl.gz", gzip.compress(lines())[:-9], "damaged or cut short"),
        ("a.jsonl.bz2", bz2.compress(lines())[:-9], "damaged or cut short"),
        ("a.jsonl.xz", lzma.compress(lines())[:-9], "damaged or cut short"),
        ("a.txt.bz2", b"this is no bzip2", "damaged or cut short"),
        ("a.txt.xz", b"this is no xz", "damaged or cut short"),
        ("a.json", array()[:-9], "is not JSON"),
        ("a.json", array() + b" x", "is not JSON"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "comma is missing after element 1"),
        ("a.csv", b'text\n"never closed\n', "is malformed: unexpected end of data"),
        ("a.csv", b"body\nx\n", "no column 'text'.* columns are body"),
        ("a.csv", b"text,text\nx,y\n", "2 columns named 'text'"),
        ("a.zip", b"PK", "'s' is empty: .*archive .*unpacked"),
        ("a.html", b"<p>", "'s' is empty: .*ending in .html"),
        ("empty.parquet", b"", "not a whole Parquet file"),
    ],
)
def test_what_is_damaged_or_cannot_be_read_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, bad_documents="leave_out")


@pytest.mark.parametrize(
    "name, fields",
    [
        ("a.txt", {"text_field": "body"}),
        ("a.txt", {"keep": ("a=b",)}),
        ("a.txt", {"id_field": "id"}),
        ("a.jsonl", {"separator": "\\n"}),
        ("a.parquet", {"encoding": "latin-1"}),
    ],
)
def test_a_field_without_effect_is_refused(tmp_path, name, fields):
    (tmp_path / name).write_bytes(parquet() if name.endswith("parquet") else lines())
    with pytest.raises(ConfigError, match=f"{next(iter(fields))}=.* would have no effect"):
        read(tmp_path / name, **fields)


def test_a_directory_that_a_glob_does_not_enter_is_counted(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.jsonl", "in/b.jsonl"):
        (tmp_path / name).write_bytes(lines())
    assert read(tmp_path / "*")[1] == {"directory (** in a glob goes into it)": 1}
    assert len(texts(tmp_path / "**")) == 2 * len(WORDS)
    assert len(texts(tmp_path / "**/**/*.jsonl")) == 2 * len(WORDS)


def test_names_do_not_depend_on_the_order_of_the_disk_nor_on_links(tmp_path):
    for root, order in (("x", ("v1", "latest")), ("y", ("latest", "v1"))):
        (tmp_path / root).mkdir()
        for name in order:
            if name == "v1":
                (tmp_path / root / "v1").mkdir()
                (tmp_path / root / "v1/a.jsonl").write_bytes(lines())
            else:
                (tmp_path / root / "latest").symlink_to("v1")
    assert [d.id for d in read(tmp_path / "x")[0]] == [d.id for d in read(tmp_path / "y")[0]]
    assert read(tmp_path / "x")[0][0].id == "v1/a.jsonl#1"


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_separator_parts_the_documents_of_a_text_file(tmp_path, monkeypatch, block, end):
    monkeypatch.setattr("opendeep_jax.data.reading.formats.TEXT_BLOCK", block)
    content = end.join(["one", "", "", "two é", "more", ""]).encode() + b"\xff bad" + end.encode()
    (tmp_path / "a.txt").write_bytes(content)
    assert [d.text for d in read(tmp_path, separator="\\n")[0]] == ["one", "two é", "more"]
    found, counts = read(tmp_path, separator="\\n\\n")
    assert ([d.text for d in found], counts) == (["one"], {"not UTF-8": 1})
    assert [d.id for d in read(tmp_path, separator="\n")[0]] == ["a.txt#1", "a.txt#4", "a.txt#5"]
    (tmp_path / "a.txt").write_bytes(b"one<END>two<END>")
    assert texts(tmp_path, separator="<END>") == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_other_encodings_are_read_where_they_are_named(tmp_path, name, encoding):
    record = '{"text": "naïve"}'
    content = {"a.txt": "naïve", "a.jsonl": f"{record}\n", "a.json": f"[{record}]", "a.csv": "text\nnaïve"}
    (tmp_path / name).write_bytes(content[name].encode(encoding))
    assert texts(tmp_path, encoding=encoding) == ["naïve"]


def test_a_condition_may_compare_numbers(tmp_path):
    scores = [3, 2.5, "4", None, True, "x", float("nan"), 10**400]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"t{i}", "score": score}) + "\n" for i, score in enumerate(scores))
    )
    for condition, kept in {
        "score>=3": ["t0", "t2"],
        "score < 3": ["t1"],
        "score>2.5": ["t0", "t2"],
        "score<=2.5": ["t1"],
        "score!=3": ["t1", "t2", "t3", "t4", "t5", "t6", "t7"],
        "score=3": ["t0"],
        "score==4": ["t2"],
    }.items():
        documents, counts = read(tmp_path, keep=(condition,))
        assert [document.text for document in documents] == kept
        assert sum(counts.values()) == len(scores) - len(kept)


def varint(n: int) -> bytes:
    return bytes([n & 127 | (128 if n > 127 else 0)]) + (varint(n >> 7) if n > 127 else b"")


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def example(**features: bytes) -> bytes:
    """A serialized tf.train.Example: its features are entries of a map from names to lists of values."""
    return field(1, b"".join(field(1, field(1, name.encode()) + field(2, value)) for name, value in features.items()))


@pytest.mark.parametrize("length", [1, 30, 300])
def test_tensorflow_examples_are_read_by_their_features(tmp_path, length):
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for i in range(5):
        text, number = field(1, field(1, f"{i}é ".encode() * length)), field(3, field(1, varint(i) + varint(300)))
        writer.write(example(text=text, id=field(3, b"\x08" + varint(i)), n=number, none=b""))
    writer.write(b"no example")
    writer.close()
    documents, counts = read(tmp_path, id_field="id", keep=("n!=x",), bad_documents="leave_out")
    assert [(d.id, d.text) for d in documents] == [(str(i), f"{i}é " * length) for i in range(5)]
    assert counts == {"malformed": 1}
    with pytest.raises(ConfigError, match="no text, in its field 'n'"):
        read(tmp_path, text_field="n")


@pytest.mark.parametrize("content", ["A single book. " * 200, "x" * 50, "ab"])
def test_the_end_of_a_single_text_can_be_held_out(tmp_path, content):
    from opendeep_jax.data.sources import hash_id, held_out

    (tmp_path / "book.txt").write_text(content)
    head, tail = read(tmp_path, held_out_end=0.1)[0]
    assert head.text + tail.text == content
    for fraction in (0.001, 0.05, 0.5):
        assert not held_out(hash_id(head.id), fraction) and held_out(hash_id(tail.id), fraction)
