"""The files of a source: what is read, and what else is there and why it is not."""

import glob
import os
import re
import stat
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import SourceConfig
from opendeep_jax.data.reading.files import COMPRESSED, is_remote, list_remote, reaching
from opendeep_jax.data.reading.formats import DATASETS, SUFFIXES_IN_WORDS, SourceFile, format_of

# Installed packages, tests, and the record of how this machine's interpreter was built.
LEFT_OUT_OF_STDLIB = re.compile(
    r"site-packages|dist-packages|tests?|idle_test|idlelib|__pycache__|_sysconfigdata.*|config-.*"
)
HIDDEN = re.compile(r"\..*")
ARCHIVE = re.compile(r"\.(zip|7z|rar|(tar|tgz|tbz2?|txz)(\.\w+)?)$|\.tar\.\w+$", re.IGNORECASE)
# What stands beside records and tells about them.
ABOUT = re.compile(r"(readme|licen[cs]e|copying|notice|changelog|authors|citation)([._-].*)?", re.IGNORECASE)
SETTINGS = re.compile(r"(dataset_infos?|dataset_dict|state)\.json", re.IGNORECASE)

SAME_FILE, EMPTY = "file that is read under another name", "empty file"
TABULAR = ("json", "csv")
"""Formats of records that also stand beside text for other ends: settings, numbers."""


FIELDS_OF_RECORDS = ("text_field", "id_field", "url_field", "license_field", "text_url", "keep")
ENCODED = {"text", "jsonl", "json", "csv"}


class Listing(NamedTuple):
    """All that is at a source's path."""

    files: list[SourceFile]
    """Those to read, by name; empty ones too."""
    skipped: dict[str, list[str]]
    """Names of what holds no document, by reason: hidden files, unknown endings, archives, links to what is read."""


class _Found(NamedTuple):
    name: str
    path: Path
    linked: bool
    """Reached through a link."""


def is_store(source: SourceConfig) -> bool:
    """Return whether the source's path is a finished token store."""
    return bool(source.path) and Path(source.path, "store.json").is_file()


def list_files(source: SourceConfig) -> list[SourceFile]:
    """Return the source's files sorted by name. Raises ConfigError if there are none, or one is out of reach."""
    return list_source(source).files


def list_source(source: SourceConfig) -> Listing:
    """All that is at the source's path. Raises ConfigError if nothing there can be read, or one file is out of reach.

    A file under several names, by links or by a pattern that matches it twice, is listed once: under its own name
    rather than a link's, then under the first in order of the alphabet.
    """
    skipped: dict[str, list[str]] = {}
    if source.path.startswith(DATASETS):
        from opendeep_jax.data.reading.columns import dataset_file

        files = [dataset_file(source.path)]
        _check_effects(source, files)
        return Listing(files, skipped)
    if is_remote(source.path):
        files = _readable((SourceFile(*file) for file in list_remote(source.path)), skipped)
    elif source.path:
        files = _local_files(_find(Path(source.path).expanduser(), skipped), skipped)
    elif source.name == "python_stdlib":
        found = _walk(Path(sysconfig.get_path("stdlib")), LEFT_OUT_OF_STDLIB, {})
        return Listing(_local_files((each for each in found if each.path.suffix == ".py"), {}), skipped)
    else:
        raise ConfigError(
            f"Source {source.name!r} has no path. Only the embedded source python_stdlib can do without one; set the "
            "source's path to a file, a directory or a glob."
        )
    files = _one_kind(source, sorted(files), skipped)
    _check_effects(source, files)
    for file in files:
        if not file.size:
            skipped.setdefault(EMPTY, []).append(file.name)
    if not files:
        there = "; ".join(f"{len(names)} × {reason}" for reason, names in skipped.items())
        raise ConfigError(
            f"Source {source.name!r} is empty: {source.path} holds no file that ends in {SUFFIXES_IN_WORDS}"
            f"{f', only {there}' if there else ''}. Point the source's path to some text."
        )
    return Listing(files, {reason: sorted(names) for reason, names in sorted(skipped.items())})


def _check_effects(source: SourceConfig, files: list[SourceFile]) -> None:
    """Raise ConfigError for a field of the source that none of its files' formats would read."""
    kinds = {format_of(file) for file in files}
    useless = {
        "fields": (FIELDS_OF_RECORDS if kinds == {"text"} else (), "its files are text, which has no fields"),
        "separator": (("separator",) if "text" not in kinds else (), "only files of text are divided by one"),
        "encoding": (("encoding",) if not kinds & ENCODED else (), f"{', '.join(kinds)} files say theirs themselves"),
    }
    for names, why in useless.values():
        for name in names:
            if files and getattr(source, name) != getattr(SourceConfig(), name):
                raise ConfigError(
                    f"Source {source.name!r} ({source.path}) has {name}={getattr(source, name)!r}, which would have no "
                    f"effect: {why}. Leave it out, or correct the path."
                )


def _readable(files: Iterable[SourceFile], skipped: dict[str, list[str]]) -> list[SourceFile]:
    """Return the files that have a format and are not hidden; the others are noted in `skipped`."""
    readable = []
    for file in files:
        if any(map(HIDDEN.fullmatch, file.name.split("/"))):
            skipped.setdefault("hidden", []).append(file.name)
        elif format_of(file):
            readable.append(file)
        else:
            skipped.setdefault(_why_unread(file.name), []).append(file.name)
    return readable


def _why_unread(name: str) -> str:
    last = name.rpartition("/")[2]
    if archive := ARCHIVE.search(last):
        return f"archive ({archive[0].lower()}), which must be unpacked"
    ending = Path(last).suffix.lower()
    if COMPRESSED.search(last):
        ending = "".join(Path(last).suffixes[-2:]).lower()
    return f"file ending in {ending}, which is not read" if ending else "file without an ending, which is not read"


def _one_kind(source: SourceConfig, files: list[SourceFile], skipped: dict[str, list[str]]) -> list[SourceFile]:
    """Return the files, all of text or all of records. What is plainly beside the point is noted in `skipped`.

    Raises ConfigError where both may be meant.
    """

    def drop(reason: str, beside: Callable[[SourceFile], bool]) -> None:
        nonlocal files
        for file in filter(beside, files):
            skipped.setdefault(reason, []).append(file.name)
        files = [file for file in files if not beside(file)]

    def is_text(file: SourceFile) -> bool:
        return format_of(file) == "text"

    records = [file for file in files if not is_text(file) and not _matches(SETTINGS, file)]
    if any(is_text(file) and not _matches(ABOUT, file) for file in files):
        if all(format_of(file) in TABULAR for file in records):
            drop("records beside text (name them with a glob to read them)", lambda file: not is_text(file))
    elif records:
        drop("text about the records", is_text)
    if any(not is_text(file) for file in records):
        drop("settings of a data set", lambda file: _matches(SETTINGS, file))
    text = list(filter(is_text, files))
    if text and len(text) < len(files):
        record = next(file for file in files if format_of(file) != "text")
        raise ConfigError(
            f"Source {source.name!r} ({source.path}) mixes files of records, as {record.name}, with files of text, as "
            f"{text[0].name}, which may be no more than a README. Say which are meant with a glob in its path, as in "
            f"**/*{Path(record.name).suffix}."
        )
    return files


def _matches(pattern: re.Pattern, file: SourceFile) -> bool:
    return bool(pattern.fullmatch(file.name.rpartition("/")[2]))


def _find(path: Path, skipped: dict[str, list[str]]) -> list[_Found]:
    """The files of a file, directory or glob, named from the directory or from what precedes the glob's first sign."""
    with reaching(str(path)):
        if path.is_dir():
            return list(_walk(path, HIDDEN, skipped))
        if path.is_file():
            return [_Found(path.name, path, False)]
    if glob.has_magic(str(path)):
        parts = path.parts
        root = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
        real = os.path.realpath(root)
        found = list(map(Path, sorted(set(glob.glob(str(path), recursive=True)))))
        entered = {parent for each in found for parent in each.parents}
        for each in found:
            if each.is_dir() and each not in entered and any(each.iterdir()):
                skipped.setdefault("directory (** in a glob goes into it)", []).append(str(each.relative_to(root)))
        names = [(each.relative_to(root).as_posix(), each) for each in found if not each.is_dir()]
        return [_Found(n, each, os.path.realpath(each) != os.path.join(real, n)) for n, each in names]
    raise ConfigError(f"No such file or directory: {path}. Correct the path of the source in data.sources.")


def _walk(root: Path, pattern: re.Pattern, skipped: dict[str, list[str]]) -> Iterator[_Found]:
    """All files below `root`, each directory once; files and directories whose whole name matches go to `skipped`.

    What is really there comes before what links lead to, so that a link gives nothing another name.
    """

    def refuse(error: OSError) -> None:
        with reaching(str(error.filename)):
            raise error

    seen, links = set(), deque([root])
    while links:
        top = links.popleft()
        if os.path.realpath(top) in seen:
            skipped.setdefault("link to a directory that is read", []).append(top.relative_to(root).as_posix())
            continue
        found: list[Path] = []
        for directory, subdirectories, names in os.walk(top, onerror=refuse):
            if (real := os.path.realpath(directory)) in seen:
                subdirectories[:] = []
                continue
            seen.add(real)
            for name in [*subdirectories, *names]:
                if pattern.fullmatch(name):
                    skipped.setdefault("hidden", []).append(Path(directory, name).relative_to(root).as_posix())
            subdirectories[:] = sorted(name for name in subdirectories if not pattern.fullmatch(name))
            found += [path for name in subdirectories if (path := Path(directory, name)).is_symlink()]
            yield from (
                _Found(path.relative_to(root).as_posix(), path, top != root or path.is_symlink())
                for name in sorted(names)
                if not pattern.fullmatch(name) and (path := Path(directory, name))
            )
        links.extend(sorted(found))


def _local_files(found: Iterable[_Found], skipped: dict[str, list[str]]) -> list[SourceFile]:
    files, seen = [], set()
    for each in sorted(found, key=lambda each: (each.linked, each.name)):
        file = SourceFile(valid_text(each.name), str(each.path.absolute()), 0, "")
        if not format_of(file):
            skipped.setdefault(_why_unread(file.name), []).append(file.name)
            continue
        with reaching(file.path):
            status = each.path.stat()
        if not stat.S_ISREG(status.st_mode):
            skipped.setdefault("no regular file", []).append(file.name)
        elif status.st_ino and (status.st_dev, status.st_ino) in seen:
            skipped.setdefault(SAME_FILE, []).append(file.name)
        else:
            seen.add((status.st_dev, status.st_ino))
            files.append(file._replace(size=status.st_size, stamp=str(status.st_mtime_ns)))
    return files


def valid_text(text: str) -> str:
    """Return the text with what UTF-8 cannot write, as bytes of a file's name that are none, spelled out."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")
