"""Sources of documents: their files, the parts that are read on their own, the documents in them, and their hashes.

Everything that is decided about a document (held out? in the tokenizer's sample?) is a hash of its id alone, so all
machines agree, whatever they read and in which order.
"""

import dataclasses
import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import SourceConfig
from opendeep_jax.data.reading.formats import (
    DATASETS,
    MISSING,
    SUFFIXES_IN_WORDS,
    Fields,
    Part,
    SourceFile,
    cut,
    format_of,
    place,
    read_records,
)
from opendeep_jax.data.reading.linked import ENCODING, LINK, fetch_texts
from opendeep_jax.data.reading.remote import is_remote, list_remote, open_binary, reaching
from opendeep_jax.data.shuffle import scramble

# Installed packages, tests, and the record of how this machine's interpreter was built.
LEFT_OUT_OF_STDLIB = re.compile(
    r"site-packages|dist-packages|tests?|idle_test|idlelib|__pycache__|_sysconfigdata.*|config-.*"
)
HIDDEN = re.compile(r"\..*")

LISTING_THREADS = 16
"""Files that are looked into at one time to find their parts; mostly they wait for a remote host."""

NO_INFLUENCE = ("weight", "epochs", "citation")
"""Fields of a SourceConfig that change no document."""


class Document(NamedTuple):
    """One document, for example `Document("json/decoder.py", "import re\\n...", license="PSF-2.0")`."""

    id: str
    text: str
    url: str = ""
    license: str = ""


def list_files(source: SourceConfig) -> list[SourceFile]:
    """The source's files sorted by name. Raises ConfigError if there are none, or one is out of reach."""
    if source.path.startswith(DATASETS):
        from opendeep_jax.data.reading.columns import dataset_file

        return [dataset_file(source.path)]
    if is_remote(source.path):
        files = [SourceFile(*file) for file in list_remote(source.path)]
        files = [file for file in files if not any(map(HIDDEN.fullmatch, file.name.split("/")))]
    elif source.path:
        files = _local_files(*_find(Path(source.path).expanduser()))
    elif source.name == "python_stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = _local_files(root, [path for path in _walk(root, LEFT_OUT_OF_STDLIB) if path.suffix == ".py"])
    else:
        raise ConfigError(
            f"Source {source.name!r} has no path. Only the embedded source python_stdlib can do without one; set the "
            "source's path to a file, a directory or a glob."
        )
    files = sorted(file for file in files if format_of(file))
    if not files:
        raise ConfigError(
            f"Source {source.name!r} is empty: {source.path or 'python_stdlib'} holds no file that ends in "
            f"{SUFFIXES_IN_WORDS}. Point the source's path to some text."
        )
    _check_one_kind(source, files)
    return files


def _check_one_kind(source: SourceConfig, files: list[SourceFile]) -> None:
    text = [file for file in files if format_of(file) == "text"]
    if text and len(text) < len(files):
        record = next(file for file in files if format_of(file) != "text")
        raise ConfigError(
            f"Source {source.name!r} ({source.path}) mixes files of records, as {record.name}, with files of text, as "
            f"{text[0].name}, which may be no more than a README. Say which are meant with a glob in its path, as in "
            f"**/*{Path(record.name).suffix}."
        )


def _find(path: Path) -> tuple[Path, list[Path]]:
    """Root that names are relative to, and the files of a file, directory or glob."""
    with reaching(str(path)):
        if path.is_dir():
            return path, list(_walk(path))
        if path.is_file():
            return path.parent, [path]
    if glob.has_magic(str(path)):
        parts = path.parts
        root = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
        return root, [found for found in map(Path, glob.glob(str(path), recursive=True)) if found.is_file()]
    raise ConfigError(f"No such file or directory: {path}. Correct the path of the source in data.sources.")


def _walk(root: Path, left_out: re.Pattern = HIDDEN) -> Iterator[Path]:
    """All files below `root`, without files and directories whose whole name matches `left_out`."""

    def refuse(error: OSError) -> None:
        with reaching(str(error.filename)):
            raise error

    seen = set()  # links are followed, also those that lead back
    for directory, subdirectories, names in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(directory)) in seen:
            subdirectories[:] = []
            continue
        seen.add(real)
        subdirectories[:] = [name for name in subdirectories if not left_out.fullmatch(name)]
        yield from (Path(directory, name) for name in names if not left_out.fullmatch(name))


def _local_files(root: Path, paths: list[Path]) -> list[SourceFile]:
    files = []
    for path in paths:
        file = SourceFile(_valid(path.relative_to(root).as_posix()), str(path.absolute()), 0, "")
        if format_of(file):
            with reaching(str(path)):
                status = path.stat()
            files.append(file._replace(size=status.st_size, stamp=str(status.st_mtime_ns)))
    return files


def list_parts(source: SourceConfig, files: list[SourceFile]) -> list[Part]:
    """The parts of the files, in order of file and position.

    Raises ConfigError if all files are empty, and for a file that is damaged or lacks a column.
    """
    fields = _fields(source)
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        found = list(pool.map(lambda file: cut(file, fields), files))
    parts = [part for of_file in found for part in of_file]
    if not parts:
        raise ConfigError(
            f"Source {source.name!r} ({source.path or 'python_stdlib'}) holds no text: its files are empty. Point its "
            "path to some text."
        )
    return parts


def read_part(source: SourceConfig, part: Part, left_out: Callable[[str, str], None]) -> Iterator[Document]:
    """The documents of a part, in order, streamed; `left_out(reason, id)` is called for each record that is not one.

    An id is the value of source.id_field, or else `file#number` with the line or row in the file, from 1; a text
    file's is its name. Raises ConfigError for damage, fields that are missing or hold no text, and for texts that are
    null, empty or not UTF-8 unless source.bad_documents is `leave_out` (a text file that is not UTF-8 always is).
    """
    if format_of(part.file) == "text":
        with open_binary(part.file.path) as content, reaching(part.file.path):
            text, problem = _decoded(content.read())
        if text:
            yield Document(part.file.name, text, license=source.license)
        elif problem != "empty text":
            left_out(problem, part.file.name)
        return
    records = _kept_records(source, part, left_out)
    if source.text_url:
        records = fetch_texts(source.text_url, source.text_field, records)
    for where, id, record in records:
        text, problem = _text_of(source, record, where)
        if text is not None:
            license = _as_text(record.get(source.license_field)) or source.license
            yield Document(id, text, _as_text(record.get(source.url_field)), license)
        elif source.bad_documents == "leave_out":
            left_out(problem, id)
        else:
            raise ConfigError(
                f"{where} (id {id!r}) has no usable text: {problem}. Correct or remove it, or leave out all like it, "
                "counted, with --data.sources.N.bad_documents=leave_out."
            )


def _fields(source: SourceConfig) -> Fields:
    text = (*LINK.findall(source.text_url), ENCODING) if source.text_url else (source.text_field,)
    kept = (name for name, _ in _conditions(source))
    names = filter(None, (*text, source.id_field, source.url_field, source.license_field, *kept))
    return Fields(tuple(dict.fromkeys(names)), "" if source.text_url else source.text_field, (ENCODING,))


def _conditions(source: SourceConfig) -> list[tuple[str, str]]:
    for condition in source.keep:
        if not condition.partition("=")[0] or "=" not in condition:
            raise ConfigError(f"Source {source.name!r}: keep={condition!r} must be written as field=value.")
    return [(name, value) for name, _, value in (condition.partition("=") for condition in source.keep)]


def _kept_records(
    source: SourceConfig, part: Part, left_out: Callable[[str, str], None]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place in words, id, values by field) of each record that source.keep lets through."""
    fields, conditions = _fields(source), _conditions(source)
    for number, record in read_records(part, fields):
        where = place(part, number)
        if isinstance(record, bytes):  # a text alone, or a line that cannot even be parsed
            text, record = record, {source.text_field: record}
            if fields.names == (source.text_field,) or _decoded(text)[0] is None:
                yield where, f"{part.file.name}#{number}", record
                continue
            raise ConfigError(
                f"{where} is a text without fields, but its source asks for {', '.join(fields.names)}. Leave id_field, "
                "url_field, license_field, keep and text_url empty, or write records as JSON objects."
            )
        if source.id_field and record[source.id_field] is MISSING:
            raise ConfigError(
                f"{where} has no field {source.id_field!r}, which should identify it. Correct "
                "--data.sources.N.id_field, or leave it empty: then file and line identify a document."
            )
        id = _as_text(record.get(source.id_field)) or f"{part.file.name}#{number}"
        for name, value in conditions:
            if not _holds(record.get(name), value):
                left_out(f"{name} is not {value}", id)
                break
        else:
            yield where, id, record


def _holds(value: Any, wanted: str) -> bool:
    return _as_text(value).lower() == wanted.lower() if isinstance(value, bool) else _as_text(value) == wanted


def _text_of(source: SourceConfig, record: dict[str, Any], where: str) -> tuple[str | None, str]:
    """(text, nothing), or (None, what is wrong with it)."""
    value = record[source.text_field]
    if value is None:
        return None, "null text"
    if value is MISSING and source.text_url:
        return None, "text not found"
    if isinstance(value, bytes):
        encoding = _as_text(record.get(ENCODING)) if source.text_url else ""
        return _decoded(value, encoding or "UTF-8")
    if isinstance(value, str):
        return (None, "empty text") if not value else (value, "") if _is_unicode(value) else (None, "not UTF-8")
    kind = "has no field" if value is MISSING else f"has {value!r:.60}, which is no text, in its field"
    raise ConfigError(
        f"{where} {kind} {source.text_field!r}. All records of a source have their text in the same field: name it "
        "with --data.sources.N.text_field, or leave this file out."
    )


def _decoded(content: bytes, encoding: str = "UTF-8") -> tuple[str | None, str]:
    try:
        text = content.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return None, f"not {encoding.upper()}"
    return (text, "") if text else (None, "empty text")


def _is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell but UTF-8 cannot."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False


def _as_text(value: Any) -> str:
    """A field's value as text that UTF-8 can write; nothing for null, a list joined with AND."""
    if value is None or value is MISSING:
        return ""
    if isinstance(value, list):
        return " AND ".join(filter(None, map(_as_text, value)))
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return _valid(str(value))


def _valid(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def fingerprint(source: SourceConfig, files: list[SourceFile]) -> str:
    """SHA-256 over all that decides the documents: names, places, sizes and stamps of files, and how they are read."""
    fields = {name: value for name, value in dataclasses.asdict(source).items() if name not in NO_INFLUENCE}
    return hashlib.sha256(json.dumps([fields, files], sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def hash_id(id: str) -> int:
    """64 bits that stand for a document's id: the first 8 bytes, big-endian, of its SHA-256."""
    return int.from_bytes(hashlib.sha256(id.encode("utf-8")).digest()[:8], "big")


def fraction_of(id_hashes: np.ndarray | int, purpose: str) -> np.ndarray:
    """Numbers in [0, 1), float64, uniform over ids (uint64 hashes, or one) and independent between purposes.

    It scrambles the hash and a constant that the purpose gives.
    """
    constant = np.uint64(hash_id(purpose))
    hashes = np.asarray(id_hashes, dtype=np.uint64)
    mixed = scramble(np.atleast_1d(hashes) + constant)  # arrays wrap around, as they should here; scalars would warn
    return ((mixed >> np.uint64(11)) * 2.0**-53).reshape(hashes.shape)[()]


def held_out(id_hashes: np.ndarray | int, held_out_fraction: float) -> np.ndarray:
    """Which documents are kept from training, as booleans, by their ids' hashes alone."""
    return fraction_of(id_hashes, "held_out") < held_out_fraction
