"""Sources of documents: their files, the parts that are read on their own, the documents in them, and their hashes.

Everything that is decided about a document (held out? in the tokenizer's sample?) is a hash of its id alone, so all
machines agree, whatever they read and in which order.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.conditions import Condition, parse_condition
from opendeep_jax.config.schema import SourceConfig
from opendeep_jax.data.reading.files import LISTING_THREADS
from opendeep_jax.data.reading.formats import (
    MISSING,
    Fields,
    Malformed,
    Part,
    SourceFile,
    cut,
    format_of,
    place,
    read_records,
    read_texts,
    separator_of,
)
from opendeep_jax.data.reading.linked import ENCODING, LINK, fetch_texts
from opendeep_jax.data.reading.listing import list_files as list_files
from opendeep_jax.data.reading.listing import valid_text
from opendeep_jax.data.shuffle import scramble

NO_INFLUENCE = ("weight", "epochs", "citation")
"""Fields of a SourceConfig that change no document."""


LATER_FIELDS = {"separator": "", "encoding": "", "held_out_end": 0.0}
"""Fields that came later, with the values that count as their absence: hashes are what they were before."""

CUT_NEAR = 1000
"""Characters before the place where a document is divided in which white space is looked for."""


class Document(NamedTuple):
    """One document, for example `Document("json/decoder.py", "import re\\n...", license="PSF-2.0")`."""

    id: str
    text: str
    url: str = ""
    license: str = ""


def list_parts(source: SourceConfig, files: list[SourceFile]) -> list[Part]:
    """Return the parts of the files, in order of file and position.

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


def read_in_order(source: SourceConfig, files: list[SourceFile]) -> Iterator[Document]:
    """Yield the documents of the files, one after the other; a file is not looked into before its turn."""
    for file in files:
        for part in cut(file, _fields(source)):
            yield from read_part(source, part, lambda reason, id: None)


def read_part(source: SourceConfig, part: Part, skip: Callable[[str, str], None]) -> Iterator[Document]:
    """Yield the documents of a part, in order, streamed; `skip(reason, id)` is called for each record that is not one.

    An id is the value of source.id_field, or else `file#number` with the line or row in the file, from 1; a text
    file's is its name. Raises ConfigError for damage, fields that are missing or hold no text, and for texts that are
    null, empty or not UTF-8 unless source.bad_documents is `leave_out` (a text file that is not UTF-8 always is).
    """
    read = _read_text if format_of(part.file) == "text" else _read_records
    documents = read(source, part, skip)
    if source.held_out_end:
        documents = (piece for document in documents for piece in _with_end_apart(document, source.held_out_end))
    yield from documents


def _read_text(source: SourceConfig, part: Part, skip: Callable[[str, str], None]) -> Iterator[Document]:
    for id, content in read_texts(part.file, separator_of(source.separator), source.encoding):
        text, problem = _decoded(content)
        if text is not None:
            yield Document(id, text, license=source.license)
        else:
            skip(problem.replace("UTF-8", source.encoding.upper() or "UTF-8"), id)


def _with_end_apart(document: Document, share: float) -> Iterator[Document]:
    """The document without its last `share`, under an id that is trained on, and that, under one that is held out.

    The cut is at white space where there is some near.
    """
    text = document.text
    cut = max(len(text) - max(1, round(len(text) * share)), 1)
    near = max(text.rfind(sign, max(0, cut - CUT_NEAR), cut) for sign in " \n\t")
    cut = near + 1 if near > 0 else cut
    names = itertools.chain([document.id], (f"{document.id}#begin-{n}" for n in itertools.count(1)))
    head = next(name for name in names if fraction_of(hash_id(name), "held_out") >= 0.5)
    yield document._replace(id=head, text=text[:cut])
    if cut < len(text):
        names = (f"{document.id}#end-{n}" for n in itertools.count(1))
        tail = next(name for name in names if fraction_of(hash_id(name), "held_out") < 0.001)
        yield document._replace(id=tail, text=text[cut:])


def _read_records(source: SourceConfig, part: Part, skip: Callable[[str, str], None]) -> Iterator[Document]:
    records = _kept_records(source, part, skip)
    if source.text_url:
        records = fetch_texts(source.text_url, source.text_field, records)
    for where, id, record in records:
        text, problem = _text_of(source, record, where)
        if text is not None:
            license = _as_text(record.get(source.license_field)) or source.license
            yield Document(id, text, _as_text(record.get(source.url_field)), license)
        elif source.bad_documents == "leave_out":
            skip(problem, id)
        else:
            raise ConfigError(
                f"{where} (id {id!r}) has no usable text: {problem}. Correct or remove it, or leave out all like it, "
                "counted, with --data.sources.N.bad_documents=leave_out."
            )


def _fields(source: SourceConfig) -> Fields:
    text = (*LINK.findall(source.text_url), ENCODING) if source.text_url else (source.text_field,)
    kept = (condition.field for condition in _conditions(source))
    names = filter(None, (*text, source.id_field, source.url_field, source.license_field, *kept))
    text_field = "" if source.text_url else source.text_field
    return Fields(tuple(dict.fromkeys(names)), text_field, (ENCODING,), source.encoding)


def _conditions(source: SourceConfig) -> list[Condition]:
    conditions = [parse_condition(text) for text in source.keep]
    if None in conditions:
        raise ConfigError(
            f"Source {source.name!r}: keep={source.keep[conditions.index(None)]!r} must be written as field=value, "
            "field!=value, or with a number as in score>=3."
        )
    return conditions


def _kept_records(
    source: SourceConfig, part: Part, skip: Callable[[str, str], None]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place in words, id, values by field) of each record that source.keep lets through."""
    fields, conditions = _fields(source), _conditions(source)
    for number, record in read_records(part, fields):
        where = place(part, number)
        if isinstance(record, Malformed):
            if source.bad_documents == "leave_out":
                skip("malformed", f"{part.file.name}#{number}")
                continue
            raise ConfigError(
                f"{where} {record}. Each must be a record with the text in a field; correct or remove it, or leave out "
                "all like it, counted, with --data.sources.N.bad_documents=leave_out."
            )
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
        for condition in conditions:
            value = record.get(condition.field)
            if reason := condition.fails(value, _as_text(value)):
                skip(reason, id)
                break
        else:
            yield where, id, record


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
    """Return a field's value as text that UTF-8 can write; nothing for null, a list joined with AND."""
    if value is None or value is MISSING:
        return ""
    if isinstance(value, list):
        return " AND ".join(filter(None, map(_as_text, value)))
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return valid_text(str(value))


def fingerprint(source: SourceConfig, files: list[SourceFile]) -> str:
    """SHA-256 over all that decides the documents: names, places, sizes and stamps of files, and how they are read."""
    fields = {name: value for name, value in dataclasses.asdict(source).items() if name not in NO_INFLUENCE}
    fields = {name: value for name, value in fields.items() if value != LATER_FIELDS.get(name)}
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
    """Return which documents are kept from training, as booleans, by their ids' hashes alone."""
    return fraction_of(id_hashes, "held_out") < held_out_fraction
