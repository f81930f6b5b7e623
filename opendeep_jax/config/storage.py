"""Writing into data.directory so that a reader never meets half of it, and failing to with a message for the user."""

import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import write_atomically
from opendeep_jax.config.locks import locked

LOCK, OWNER = ".lock", ".lock.owner"

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write below `path`, in data.directory, into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"Cannot write {path}: {error.strerror or error}. Prepared tokenizers and tokens are kept there, in "
            "data.directory. Free some space, or set --data.directory to a place that can be written."
        ) from error


@contextlib.contextmanager
def alone_in(directory: Path, work: str) -> Iterator[int]:
    """Hold a directory's lock, waiting for another process that is at the same `work` there; give its descriptor.

    Child processes that inherit the descriptor share the lock: it is free once the last of them has ended.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        waiting = functools.partial(logger.warning, "Waiting for another process that is %s %s.", work, directory)
        with locked(descriptor, directory / OWNER, waiting):
            yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends well, and vanishes when it does not.

    A directory that is at `path` by then stays: another process has prepared the same content. Raises ConfigError
    when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with writing(path):
            temporary.mkdir(parents=True)
        yield temporary
        with writing(path):
            try:
                temporary.rename(path)
            except OSError:
                if not path.is_dir():
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a file of data.directory in one step, and its directory. Raises ConfigError when it can't be."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_name(*parts: str) -> str:
    """`parts` joined by dashes, with what a file name should not hold replaced; never hidden."""
    return re.sub(r"^\.+|[^\w.-]+", "_", "-".join(parts))
