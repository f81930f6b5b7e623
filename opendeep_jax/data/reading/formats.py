"""Formats of files with documents: how a file is cut into parts that are read on their own, and the records of a part.

A record is what a line of JSON, a row of Parquet or of a `datasets` dataset, or an ArrayRecord holds. Readers stream:
they keep a record, or a small batch of them, in memory, never a file.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.data.reading.remote import is_remote, open_binary

PART_BYTES = 8 * 2**20
"""Size that the parts of a large file have, about."""

OUTPUT_BYTES = 2**20
"""What a decompressor gives at one time, about, however dense the file is."""

COMPRESSED_RATIO = 4
"""Bytes of text that a byte of a compressed file is taken for in progress bars."""

MISSING = type("Missing", (), {"__repr__": lambda self: "MISSING"})()
"""Stands for a field that a record does not have; null is None."""

DATASETS = "datasets:"
"""How the path of a Hugging Face dataset begins."""

SUFFIXES = {
    "parquet": r"\.parquet",
    "jsonl": r"\.jsonl",
    "compressed_jsonl": r"\.jsonl?\.(gz|zst|zstd)",
    "array_record": r"\.array_record",
    "text": r"\.(txt|md|py)",
}
SUFFIXES_IN_WORDS = ".parquet, .jsonl (or .jsonl.gz, .jsonl.zst), .array_record, .txt, .md, .py"


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
    """A key of SUFFIXES, `datasets`, or nothing for a file that holds no documents."""
    if file.path.startswith(DATASETS):
        return "datasets"
    return next((kind for kind, ending in SUFFIXES.items() if re.search(ending + "$", file.name, re.IGNORECASE)), "")


def cut(file: SourceFile, fields: Fields) -> list[Part]:
    """The parts of a file, in order; none for an empty one.

    Raises ConfigError for a file that is damaged, and one whose columns do not fit `fields`.
    """
    kind = format_of(file)
    if kind in ("parquet", "datasets"):
        from opendeep_jax.data.reading import columns

        return columns.cut(file, fields)
    if kind == "array_record":
        return _cut_array_record(file)
    if kind == "jsonl" and file.size > PART_BYTES and not is_remote(file.path):
        return _cut_lines(file)
    scale = COMPRESSED_RATIO if kind == "compressed_jsonl" else 1
    return [Part(file, 0, file.size, file.size * scale)] if file.size else []


def read_records(part: Part, fields: Fields) -> Iterator[tuple[int, dict[str, Any] | bytes]]:
    """(number in the file, from 1; values by field) of each record in a part; text may be bytes that nobody decoded.

    A record that is not UTF-8, so that no field can be told, and one that is only text, are given as bytes. Raises
    ConfigError for a damaged file, naming it.
    """
    kind = format_of(part.file)
    if kind in ("parquet", "datasets"):
        from opendeep_jax.data.reading import columns

        return columns.read_records(part, fields)
    return _read_array_record(part, fields) if kind == "array_record" else _read_lines(part, fields)


def place(part: Part, number: int) -> str:
    """Where a record is, in words: `Line 3 of /data/a.jsonl`."""
    kind = format_of(part.file)
    noun = {"parquet": "Row", "datasets": "Row", "array_record": "Record"}.get(kind, "Line")
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


def _read_lines(part: Part, fields: Fields) -> Iterator[tuple[int, dict | bytes]]:
    for number, line in _lines(part):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # some editors begin a file with a mark
        except UnicodeDecodeError:
            yield number, line
            continue
        if text.strip():
            yield number, _parse(text, fields, part, number)


def _parse(text: str, fields: Fields, part: Part, number: int) -> dict[str, Any]:
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError(f"it is a JSON {type(record).__name__}")
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{place(part, number)} is not a JSON object: {error}. Each must be one, with the text in a field; "
            "correct or remove it."
        ) from error
    return {name: field_of(record, name) for name in fields.names}


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """Lines that begin inside a part, with their numbers."""
    path = part.file.path
    with open_binary(path) as content:
        if format_of(part.file) == "compressed_jsonl":
            try:
                yield from enumerate(_decompressed(content, path), start=1)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise _damaged(path, error) from error
            return
        number, position = part.lines_before + 1, part.begin
        if part.begin:  # the line that begins before this part is the previous part's
            content.seek(part.begin - 1)
            rest = content.readline()
            number, position = number + (rest != b"\n"), part.begin - 1 + len(rest)
        while position < part.end and (line := content.readline()):
            yield number, line
            number, position = number + 1, position + len(line)


def _decompressed(content: BinaryIO, path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=content), 2**20)
    return io.BufferedReader(_ZstandardReader(content, path), 2**20)


class _ZstandardReader(io.RawIOBase):
    """Decompressed bytes of a .zst file. zstandard's own reader takes a file that is cut short for a whole one."""

    def __init__(self, content: BinaryIO, path: str):
        import zstandard

        self.content, self.path, self.pending, self.error = content, path, memoryview(b""), zstandard.ZstdError
        # Frames with long windows (--long) are read too.
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self.frame, self.rest, self.step = self.decompressor.decompressobj(), b"", 2**12

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.pending:
            data = self.rest[: self.step] or self.content.read(self.step)
            self.rest = self.rest[self.step :]
            if not data:
                if self.frame is not None:
                    raise _damaged(self.path, "it ends inside a frame")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            try:
                self.pending = memoryview(self.frame.decompress(data))
            except self.error as error:
                raise _damaged(self.path, error) from error
            dense = len(self.pending) > OUTPUT_BYTES // 2
            self.step = max(1, self.step // 2) if dense else min(2**16, self.step * 2)
            if self.frame.eof:
                self.frame, self.rest = None, self.frame.unused_data + self.rest
        size = min(len(buffer), len(self.pending))
        buffer[:size], self.pending = self.pending[:size], self.pending[size:]
        return size


def _damaged(path: str, error: object) -> ConfigError:
    return ConfigError(
        f"{path} is damaged or cut short: {error}. Fetch or write the file again, or leave it out of data.sources."
    )


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
        raise _damaged(file.path, "it is not an ArrayRecord file, or holds no record")
    return reader


def _cut_array_record(file: SourceFile) -> list[Part]:
    records = _array_record_reader(file).num_records()
    step = max(1, PART_BYTES * records // max(1, file.size))
    bounds = [*range(0, records, step), records]
    return [
        Part(file, begin, end, file.size * (end - begin) // records)
        for begin, end in zip(bounds, bounds[1:], strict=False)
    ]


def _read_array_record(part: Part, fields: Fields) -> Iterator[tuple[int, dict | bytes]]:
    """JSON objects if the file's first record is one, else texts."""
    reader = _array_record_reader(part.file)
    batch = max(1, min(1024, (part.end - part.begin) * 2**23 // max(1, part.size)))
    try:
        objects = _is_object(reader.read(0, 1)[0])
        for begin in range(part.begin, part.end, batch):
            records = reader.read(begin, min(begin + batch, part.end))
            for number, record in enumerate(records, start=begin + 1):
                try:
                    text = record.decode("utf-8") if objects else None
                except UnicodeDecodeError:
                    text = None
                yield number, record if text is None else _parse(text, fields, part, number)
    except (RuntimeError, IndexError) as error:
        raise _damaged(part.file.path, error) from error


def _is_object(record: bytes) -> bool:
    try:
        return isinstance(json.loads(record), dict)
    except (ValueError, RecursionError):
        return False
