"""Names of sources from their paths, and comparison of paths of the same text."""

import posixpath
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

EMBEDDED = "python_stdlib"


def same_text(old: str, new: str) -> bool:
    """Return whether `new` is the text of a source with the path `old`, or a part of it.

    That is the same repository of a hub, the same data set by its name, and what lies below the old path.
    """
    root = _root(old)
    return old == new or (bool(root.parts) and _root(new).is_relative_to(root))


def _root(path: str) -> PurePosixPath:
    """The place that a path is about, before the first part with a sign of a glob; of a hub's path the repository."""
    if path.startswith("datasets:"):
        return PurePosixPath(path.partition("?")[0])
    if path.startswith("hf://"):
        return PurePosixPath(*PurePosixPath(path.partition("@")[0]).parts[:4])  # hf: datasets OWNER NAME
    parts = PurePosixPath(path if "://" in path or not path else posixpath.normpath(path)).parts
    end = next((i for i, part in enumerate(parts) if re.search(r"[*?\\[]", part)), len(parts))
    return PurePosixPath(*parts[:end])


def source_name(path: str, taken: Sequence[str]) -> str:
    """A name for the source at a path: its last part without endings, and a number where the name is taken."""
    parts = PurePosixPath(path.removeprefix("datasets:").partition("?")[0]).parts
    plain = [part for part in parts if not re.search(r"[*?\\[]|^[./~]+$|:$", part)]
    last = plain[-1] if plain else "text"
    name = (last.partition(".")[0] or last).strip() or "text"
    names = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 3))]
    return next(each for each in names if each not in (*taken, EMBEDDED))
