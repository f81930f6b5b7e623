"""Sources of documents: which files, which documents in them, and which of those are held out from training.

A document's name is its path below the source's root, with `#line` for a line of a .jsonl file. Everything that is
decided about a document (held out? in the tokenizer's sample?) is a hash of that name alone, so machines agree.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import SourceConfig
from opendeep_jax.data.files import file_name, write_file

Split = Literal["train", "held_out"]
SUFFIXES = (".txt", ".md", ".py", ".jsonl")
# Installed packages, tests, and the record of how this machine's interpreter was built.
LEFT_OUT_OF_STDLIB = re.compile(
    r"site-packages|dist-packages|tests?|idle_test|idlelib|__pycache__|_sysconfigdata.*|config-.*"
)
HIDDEN = re.compile(r"\..*")


class SourceFile(NamedTuple):
    """A file of a source: its name in records, where it is, its size in bytes and its time of change."""

    name: str
    path: Path
    size: int
    mtime_ns: int


class Document(NamedTuple):
    """One document, for example `Document("json/decoder.py", "import re\\n...")`; text None if it is not UTF-8."""

    name: str
    text: str | None


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a source holds, found by reading all of it once."""

    content_hash: str
    """SHA-256 over the names and contents of all files."""
    files: dict[str, str]
    """SHA-256 of each file, by name."""
    documents: dict[str, int]
    """Documents by split."""
    bytes: dict[str, int]
    """UTF-8 bytes of their text, by split."""
    skipped: list[str]
    """Documents left out because they are not UTF-8."""


def list_files(source: SourceConfig) -> list[SourceFile]:
    """The source's files sorted by name. Raises ConfigError if there are none, or one is out of reach."""
    if source.path:
        root, paths = _find(Path(source.path).expanduser())
    elif source.name == "python_stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in _walk(root, LEFT_OUT_OF_STDLIB) if path.suffix == ".py"]
    else:
        raise ConfigError(
            f"Source {source.name!r} has no path. Only the embedded source python_stdlib can do without one; set the "
            "source's path to a file, a directory or a glob."
        )
    if not paths:
        raise ConfigError(
            f"Source {source.name!r} is empty: {source.path or root} holds no file that ends in "
            f"{', '.join(SUFFIXES)}. Point the source's path to some text."
        )
    files = []
    for path in paths:
        with _reading(path):
            status = path.stat()
        files.append(SourceFile(path.relative_to(root).as_posix(), path, status.st_size, status.st_mtime_ns))
    return sorted(files)


def _find(path: Path) -> tuple[Path, list[Path]]:
    """Root that names are relative to, and the text files of a file, directory or glob."""
    if path.is_dir():
        root, paths = path, list(_walk(path))
    elif path.is_file():
        root, paths = path.parent, [path]
    elif glob.has_magic(str(path)):
        parts = path.parts
        root = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
        paths = [found for found in map(Path, glob.glob(str(path), recursive=True)) if found.is_file()]
    else:
        raise ConfigError(f"No such file or directory: {path}. Correct the path of the source in data.sources.")
    return root, [path for path in paths if path.suffix in SUFFIXES]


def _walk(root: Path, left_out: re.Pattern = HIDDEN) -> Iterator[Path]:
    """All files below `root`, without files and directories whose whole name matches `left_out`."""
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not left_out.fullmatch(name)]
        yield from (Path(directory, name) for name in names if not left_out.fullmatch(name))


def fraction_of(name: str, purpose: str) -> float:
    """A number in [0, 1) that is uniform over names, and independent between purposes."""
    digest = hashlib.sha256(f"{purpose}:{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(name: str, held_out_fraction: float) -> Split:
    """The split that a document belongs to, by its name."""
    return "held_out" if fraction_of(name, "held_out") < held_out_fraction else "train"


def read_documents(file: SourceFile, content: bytes | None = None) -> Iterator[Document]:
    """The documents of one file that are not empty. Raises ConfigError for a file that cannot be read or parsed."""
    content = read_bytes(file) if content is None else content
    if file.path.suffix != ".jsonl":
        if content:
            yield Document(file.name, _decode(content))
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        name = f"{file.name}#{number}"
        text = _decode(line)
        if text is None:
            yield Document(name, None)
        elif text.strip():
            try:
                text = json.loads(text)["text"]
                if not isinstance(text, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"Line {number} of {file.path} is not a JSON object with a string in its field `text`. Every line "
                    "of a .jsonl source must be one; correct or remove that line."
                ) from error
            if text:
                yield Document(name, text if _is_unicode(text) else None)


def read_bytes(file: SourceFile) -> bytes:
    """All of a file. Raises ConfigError if it cannot be read."""
    with _reading(file.path):
        return file.path.read_bytes()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"Cannot read {path}: {error.strerror}. Make the file readable, or leave it out of data.sources."
        ) from error


def _decode(content: bytes) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell but UTF-8 cannot."""
    try:
        text.encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False


def read_split(files: list[SourceFile], split: Split, held_out_fraction: float) -> Iterator[Document]:
    """The UTF-8 documents of one split, in order of file and line."""
    for file in files:
        if file.path.suffix == ".jsonl" or split_of(file.name, held_out_fraction) == split:
            for document in read_documents(file):
                if document.text is not None and split_of(document.name, held_out_fraction) == split:
                    yield document


def survey(source: SourceConfig, files: list[SourceFile], held_out_fraction: float, directory: Path) -> Corpus:
    """Reads the whole source once and describes it; kept in `directory` until a file's size or time changes.

    Raises ConfigError if the source has no text, or none in one of the two splits.
    """
    stamps = [(file.name, str(file.path.absolute()), file.size, file.mtime_ns) for file in files]
    fingerprint = hashlib.sha256(json.dumps([stamps, held_out_fraction]).encode()).hexdigest()
    path = directory / file_name(source.name, f"{fingerprint[:16]}.json")
    try:
        return Corpus(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        pass  # Not there, or damaged: read the source.

    hashes, skipped = {}, []
    documents = {"train": 0, "held_out": 0}
    sizes = {"train": 0, "held_out": 0}
    for file in files:
        content = read_bytes(file)
        hashes[file.name] = hashlib.sha256(content).hexdigest()
        for document in read_documents(file, content):
            if document.text is None:
                skipped.append(document.name)
            else:
                split = split_of(document.name, held_out_fraction)
                documents[split] += 1
                sizes[split] += len(document.text.encode("utf-8"))
    _check_splits(source, documents, skipped, held_out_fraction)
    content_hash = hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()
    corpus = Corpus(content_hash, hashes, documents, sizes, skipped)
    write_file(path, json.dumps(dataclasses.asdict(corpus)))
    return corpus


def _check_splits(source: SourceConfig, documents: dict[str, int], skipped: list[str], held_out_fraction: float):
    where = source.path or "the embedded source"
    if not sum(documents.values()):
        reason = f"none of its {len(skipped)} documents is UTF-8 text" if skipped else "its files are empty"
        raise ConfigError(f"Source {source.name!r} ({where}) holds no text: {reason}. Point its path to UTF-8 text.")
    if not documents["train"] or (held_out_fraction and not documents["held_out"]):
        empty = "for training" if not documents["train"] else "held out"
        raise ConfigError(
            f"Source {source.name!r} ({where}) has no documents {empty}: a hash of each name divides its "
            f"{sum(documents.values())} documents with data.held_out_fraction={held_out_fraction}. Give it more "
            "documents (one a file, or one a line of .jsonl), or change data.held_out_fraction (0 holds nothing out)."
        )
