"""Formats of files with documents: how a file is cut into parts that are read on their own, and what is in a part.

A record is what a line of JSON, a row of Parquet or of a `datasets` dataset, or an ArrayRecord holds. Readers stream:
they keep a record, or a small batch of them, in memory, never a file.
"""

import contextlib
import csv
import difflib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.data.reading.examples import parse_example
from opendeep_jax.data.reading.files import COMPRESSED, damaged, is_remote, open_binary, open_content
from opendeep_jax.data.reading.json_values import is_lines, read_values

PART_BYTES = 8 * 2**20
"""Size that the parts of a large file have, about."""

COMPRESSED_RATIO = 4
"""Bytes of text that a byte of a compressed file is taken for in progress bars."""

MISSING = type("Missing", (), {"__repr__": lambda self: "MISSING"})()
"""Stands for a field that a record does not have; null is None."""

DATASETS = "datasets:"
"""Beginning of the path of a Hugging Face dataset."""

SUFFIXES = {
    "parquet": r"\.parquet",
    "jsonl": r"\.(jsonl|ndjson)(\.(gz|bz2|xz|zstd?))?",
    "json": r"\.json(\.(gz|bz2|xz|zstd?))?",
    "csv": r"\.[ct]sv(\.(gz|bz2|xz|zstd?))?",
    "array_record": r"\.array_record",
    "text": r"\.(txt|md|py)(\.(gz|bz2|xz|zstd?))?",
}
SUFFIXES_IN_WORDS = (
    ".parquet, .array_record, or .jsonl, .ndjson, .json, .csv, .tsv, .txt, .md, .py (also with .gz, .bz2, .xz, .zst)"
)


TEXT_LIKE = ("text", "content", "body", "raw_content", "document", "markdown", "code")
"""Usual names of the column with the text, for a better error message."""


class Malformed(str):
    """Record that cannot be parsed, and the reason."""


class SourceFile(NamedTuple):
    """A file of a source, as `SourceFile("en/000.parquet", "/data/en/000.parquet", 2_100_000, "1719")`."""

    name: str
    """Its place below the source's root, parted by `/`."""
    path: str
    """Absolute path, URL, or `datasets:...`."""
    size: int
    """Bytes."""
    stamp: str
    """Changes when the content does: time of change in nanoseconds, or a hash that a remote host keeps."""


class Fields(NamedTuple):
    """Fields that are read of each record."""

    names: tuple[str, ...]
    """All of them, each once."""
    text: str
    """The one with the text; nothing where records only point at it."""
    optional: tuple[str, ...] = ()
    """Those that a file may lack; elsewhere in `names` a file with columns must have them."""
    encoding: str = ""
    """Encoding of lines and rows of text; nothing where it is UTF-8."""


class Part(NamedTuple):
    """A piece of a file that is read on its own: [begin, end) in row groups, records or bytes, by the format."""

    file: SourceFile
    begin: int
    end: int
    size: int
    """Bytes of text in it, estimated."""
    lines_before: int = 0
    """Line ends before `begin`, so that the lines of a .jsonl file are numbered from its start."""


def format_of(file: SourceFile) -> str:
    """Return a key of SUFFIXES, `datasets`, or nothing for a file that holds no documents."""
    if file.path.startswith(DATASETS):
        return "datasets"
    return next((kind for kind, ending in SUFFIXES.items() if re.search(ending + "$", file.name, re.IGNORECASE)), "")


def cut(file: SourceFile, fields: Fields) -> list[Part]:
    """Return the parts of a file, in order; none for an empty one.

    Raises ConfigError for a file that is damaged, and one whose columns do not fit `fields`.
    """
    kind = format_of(file)
    if kind in ("parquet", "datasets"):
        from opendeep_jax.data.reading import columns

        return columns.cut(file, fields)
    if kind == "array_record":
        return _cut_array_record(file)
    if kind == "csv" and file.size:
        _check_header(file, fields)
    compressed = COMPRESSED.search(file.name)
    if kind == "jsonl" and file.size > PART_BYTES and not (compressed or fields.encoding or is_remote(file.path)):
        return _cut_lines(file)
    scale = COMPRESSED_RATIO if compressed else 1
    return [Part(file, 0, file.size, file.size * scale)] if file.size else []


def read_records(part: Part, fields: Fields) -> Iterator[tuple[int, dict[str, Any] | bytes | Malformed]]:
    """(number in the file, from 1; values by field) of each record in a part; text may be undecoded bytes.

    A record that is not UTF-8, so that no field can be told, and one that is only text, are given as bytes; one that
    cannot be parsed as Malformed. Raises ConfigError for a damaged file, naming it.
    """
    kind = format_of(part.file)
    if kind in ("parquet", "datasets"):
        from opendeep_jax.data.reading import columns

        return columns.read_records(part, fields)
    readers = {"array_record": _read_array_record, "json": _read_json, "csv": _read_csv}
    return readers.get(kind, _read_lines)(part, fields)


def place(part: Part, number: int) -> str:
    """Return where a record is, in words: `Line 3 of /data/a.jsonl`."""
    kind = format_of(part.file)
    rows = dict.fromkeys(("parquet", "datasets", "csv"), "Row")
    noun = (rows | dict.fromkeys(("array_record", "json"), "Record")).get(kind, "Line")
    return f"{noun} {number} of {part.file.path}"


def field_of(record: dict, name: str) -> Any:
    """The value of a field, MISSING if there is none. Dots reach into nested objects, after a name that has them."""
    if name in record:
        return record[name]
    for head, inner in divisions(name):
        if isinstance(record.get(head), dict) and (value := field_of(record[head], inner)) is not MISSING:
            return value
    return MISSING


def divisions(name: str) -> Iterator[tuple[str, str]]:
    """Each way to part a name at one of its dots: `a.b.c` gives (a, b.c) and (a.b, c)."""
    return ((name[:i], name[i + 1 :]) for i, sign in enumerate(name) if sign == ".")


def _cut_lines(file: SourceFile) -> list[Part]:
    parts, lines = [], 0
    with open_binary(file.path) as content:
        for begin in range(0, file.size, PART_BYTES):
            end = min(begin + PART_BYTES, file.size)
            parts.append(Part(file, begin, end, end - begin, lines))
            lines += content.read(PART_BYTES).count(b"\n")
    return parts


def _read_lines(part: Part, fields: Fields) -> Iterator[tuple[int, dict | bytes | Malformed]]:
    for number, line in _lines(part, fields):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # some editors begin a file with a mark
        except UnicodeDecodeError:
            yield number, line
            continue
        if text.strip():
            yield number, _parse(text, fields)


def _parse(text: str, fields: Fields) -> dict[str, Any] | Malformed:
    try:
        return _record(json.loads(text), fields)
    except (ValueError, RecursionError) as error:
        return Malformed(f"is not a JSON object: {error}")


def _record(value: Any, fields: Fields) -> dict[str, Any] | Malformed:
    if not isinstance(value, dict):
        return Malformed(f"is not a JSON object: it is a JSON {type(value).__name__}")
    return {name: field_of(value, name) for name in fields.names}


def _lines(part: Part, fields: Fields) -> Iterator[tuple[int, bytes]]:
    """Lines that begin inside a part, with their numbers, as UTF-8 where fields.encoding says what they are."""
    with open_content(part.file.path, part.file.name) as content:
        if fields.encoding:
            lines = _as_text(content, part.file, fields.encoding)
            yield from ((number, line.encode("utf-8", "surrogateescape")) for number, line in enumerate(lines, start=1))
            return
        if COMPRESSED.search(part.file.name):
            yield from enumerate(content, start=1)
            return
        number, position = part.lines_before + 1, part.begin
        if part.begin:  # the line that begins before this part is the previous part's
            content.seek(part.begin - 1)
            rest = content.readline()
            number, position = number + (rest != b"\n"), part.begin - 1 + len(rest)
        while position < part.end and (line := content.readline()):
            yield number, line
            number, position = number + 1, position + len(line)


def _as_text(content: BinaryIO, file: SourceFile, encoding: str) -> Iterator[str]:
    """Lines, decoded; bytes outside the encoding become surrogates, which are found later."""
    try:
        with io.TextIOWrapper(content, encoding or "utf-8-sig", "surrogateescape", newline="\n") as lines:
            yield from lines
    except UnicodeError as error:  # an encoding of several bytes a sign has no way on
        raise damaged(file.path, f"it is not {encoding}: {error}") from error


def _read_json(part: Part, fields: Fields) -> Iterator[tuple[int, dict | bytes | Malformed]]:
    """A .json file's objects: lines of them, or an array, or several over many lines."""
    file = part.file
    with open_content(file.path, file.name) as content:
        lines = not fields.encoding and is_lines(content)
    if lines:
        yield from _read_lines(part, fields)
        return
    with (
        open_content(file.path, file.name) as content,
        io.TextIOWrapper(content, fields.encoding or "utf-8-sig", "surrogateescape", newline="") as stream,
    ):
        try:
            for number, value in enumerate(read_values(stream), start=1):
                yield number, _record(value, fields)
        except ValueError as error:
            raise ConfigError(
                f"{file.path} is not JSON: {error}. A .json file holds objects, in lines or in an array; correct it, "
                "or leave it out of data.sources."
            ) from error


def _check_header(file: SourceFile, fields: Fields) -> None:
    """Raise ConfigError for a column that a table's first row does not name, or names twice."""
    with contextlib.closing(_rows(file, fields)) as rows:
        names = next(rows, (0, []))[1]
    check_names(file, fields, names, names, names.__contains__)


def check_names(
    file: SourceFile, fields: Fields, names: list[str], leaves: list[str], has: Callable[[str], bool]
) -> None:
    """Raise ConfigError, with the file's columns and the nearest name, for a field without a column, or with two.

    Args:
        names: of the columns.
        leaves: of all that can be asked for, with the fields inside of columns.
        has: whether a name is among them.
    """
    for name in fields.names:
        if names.count(name) > 1:
            said = f"{names.count(name)} columns named {name!r}"
        elif name in fields.optional or has(name):
            continue
        else:
            said = f"no column {name!r}"
        close = difflib.get_close_matches(name, leaves, n=1, cutoff=0.5)
        near = close or [known for known in TEXT_LIKE if known in leaves] or leaves[:1] or ["NAME"]
        raise ConfigError(
            f"{file.path} has {said}, which its source asks for. Its columns are {', '.join(leaves)[:1000]}. Name the "
            f"right one, as in --data.sources.N.text_field={near[0]} (or id_field, url_field, license_field, keep), or "
            "leave the file out if the others of this source have it."
        )


def _read_csv(part: Part, fields: Fields) -> Iterator[tuple[int, dict | Malformed]]:
    rows = _rows(part.file, fields)
    names = next(rows, (0, []))[1]
    places = {name: names.index(name) if name in names else None for name in fields.names}
    for number, row in rows:
        if len(row) != len(names):
            yield number, Malformed(f"has {len(row)} fields in place of {len(names)}")
        else:
            yield number, {name: MISSING if at is None else row[at] for name, at in places.items()}


def _rows(file: SourceFile, fields: Fields) -> Iterator[tuple[int, list[str]]]:
    """(number, values) of each row of a table; number 0 names the columns. Blank lines are no rows."""
    csv.field_size_limit(sys.maxsize)  # the library's own is 128 KiB, less than many a document
    tab = re.search(r"\.tsv", file.name, re.IGNORECASE)
    with open_content(file.path, file.name) as content:
        lines = _as_text(content, file, fields.encoding)
        number, rows = -1, csv.reader(lines, delimiter="\t" if tab else ",", strict=True)
        try:
            for row in rows:
                if row:
                    yield (number := number + 1), row
        except csv.Error as error:
            raise ConfigError(
                f"Row {number + 1} of {file.path} (about line {rows.line_num}) is malformed: {error}. A field with a "
                "quotation mark, delimiter or line end stands in quotation marks, doubled inside. Correct the row, or "
                "write the file as JSON lines."
            ) from error


def _array_record_reader(file: SourceFile) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    if is_remote(file.path):
        raise ConfigError(
            f"Cannot read {file.path}: ArrayRecord files are read on this machine only. Copy the file here, and set "
            "the source's path to the copy."
        )
    open_binary(file.path).close()  # a file that cannot be read has its own message
    reader = ArrayRecordReader(file.path)
    if not reader.ok() or not reader.num_records():  # what a file without its footer looks like
        raise damaged(file.path, "it is not an ArrayRecord file, or holds no record")
    return reader


def _cut_array_record(file: SourceFile) -> list[Part]:
    records = _array_record_reader(file).num_records()
    step = max(1, PART_BYTES * records // max(1, file.size))
    bounds = [*range(0, records, step), records]
    return [
        Part(file, begin, end, file.size * (end - begin) // records)
        for begin, end in zip(bounds, bounds[1:], strict=False)
    ]


def _read_array_record(part: Part, fields: Fields) -> Iterator[tuple[int, dict | bytes | Malformed]]:
    """JSON objects or tf.train.Examples if the file's first record is one, else texts."""
    reader = _array_record_reader(part.file)
    batch = max(1, min(1024, (part.end - part.begin) * 2**23 // max(1, part.size)))
    try:
        first = reader.read(0, 1)[0]
        parse = _parse_json if _is_object(first) else _parse_example if parse_example(first) else _raw
        for begin in range(part.begin, part.end, batch):
            records = reader.read(begin, min(begin + batch, part.end))
            yield from ((number, parse(record, fields)) for number, record in enumerate(records, start=begin + 1))
    except (RuntimeError, IndexError) as error:
        raise damaged(part.file.path, error) from error


def _parse_json(record: bytes, fields: Fields) -> dict | bytes | Malformed:
    try:
        return _parse(record.decode("utf-8"), fields)
    except UnicodeDecodeError:
        return record


def _raw(record: bytes, fields: Fields) -> bytes:
    return record


def _parse_example(record: bytes, fields: Fields) -> dict | Malformed:
    features = parse_example(record)
    if features is None:
        return Malformed("is not a tf.train.Example, as the file's first record is")
    return {name: features.get(name, MISSING) for name in fields.names}


def _is_object(record: bytes) -> bool:
    try:
        return isinstance(json.loads(record), dict)
    except (ValueError, RecursionError):
        return False


# Files of text: a document each, or several with a separator between them.

TEXT_BLOCK = 2**20
"""Characters that are read at one time where documents are divided by a separator."""


def read_texts(file: SourceFile, separator: str, encoding: str) -> Iterator[tuple[str, bytes]]:
    """(id, UTF-8 bytes, or what else is there) of each document in a file of text; blank ones between separators not.

    The id is the file's name, or `name#number` where `separator` parts documents, from 1. Raises ConfigError for a file
    that is damaged, or that is not in an encoding of several bytes a sign.
    """
    with open_content(file.path, file.name) as content:
        if not separator:
            yield file.name, _utf8(content.read(), encoding)
            return
        for number, text in enumerate(_pieces(content, file, separator, encoding), start=1):
            if text.strip():
                yield f"{file.name}#{number}", text.encode("utf-8", "surrogateescape")


def _utf8(content: bytes, encoding: str) -> bytes:
    """The content as UTF-8. What is not in `encoding` stays as it is, with a byte that no UTF-8 has before it."""
    if not encoding:
        return content
    try:
        return content.decode(encoding).encode("utf-8")
    except UnicodeError:
        return b"\xff" + content


def _pieces(content: BinaryIO, file: SourceFile, separator: str, encoding: str) -> Iterator[str]:
    lines = "\n" in separator
    rest = carry = ""
    try:
        with io.TextIOWrapper(content, encoding or "utf-8-sig", "surrogateescape", newline="") as stream:
            while block := stream.read(TEXT_BLOCK):
                block = carry + block
                carry = "\r" if lines and block.endswith("\r") else ""  # its line end may be cut in two
                block = block.removesuffix(carry)
                *whole, rest = (rest + (block.replace("\r\n", "\n") if lines else block)).split(separator)
                yield from whole
    except UnicodeError as error:
        raise damaged(file.path, f"it is not {encoding}: {error}") from error
    yield rest + carry


def separator_of(text: str) -> str:
    r"""A separator as it is written in a recipe or on a command line, where `\n` and `\t` may be two signs."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
