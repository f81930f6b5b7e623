"""The settings of a run that are places in a file system, for whoever takes a run to other machines."""

import re
from collections.abc import Iterator
from typing import Any

from opendeep_jax.config.schema import RunConfig

PATHS = {
    "data.sources.path": "read",
    "data.tokenizer": "read",
    "data.directory": "write",
    "data.curation.language_model": "read",
    "data.curation.evaluation_sets": "read",
    "train.compilation_cache": "cache",
    "checkpoint.local_directory": "local",
}
"""Path fields by dotted name, without the index of an entry: `read` has to be there, `write` is made where it is
missing, `cache` may be lost at the price of time, and `local` is each machine's own."""
ELSEWHERE = r"[a-z][a-z0-9+.-]+://.*|datasets:.*"
"""Pattern of remote paths: gs://, s3://, hf://, https:// and the like, and datasets of Hugging Face."""
NOT_A_FILE = {"data.tokenizer": r"bytes|bpe:\d+"}
"""Values of a field that name no file."""


def paths(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """(dotted name, path, kind of PATHS) of everything that a run reads or writes in a file system, but for its work
    directory. Addresses elsewhere are left out."""
    for name, kind in PATHS.items():
        for dotted, value in _values(config, name.split("."), ""):
            if value and not re.fullmatch(ELSEWHERE, value) and not re.fullmatch(NOT_A_FILE.get(name, ""), value):
                yield dotted, value, kind


def _values(value: Any, names: list[str], dotted: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, tuple):
        for index, element in enumerate(value):
            yield from _values(element, names, f"{dotted}.{index}")
    elif names:
        yield from _values(getattr(value, names[0]), names[1:], f"{dotted}.{names[0]}".lstrip("."))
    else:
        yield dotted, value
