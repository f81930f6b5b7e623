"""`opendeep data verify`: recompute every hash of a token store and name the damaged files."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.storage import sha256_of
from opendeep_jax.data.store import INNER_CHUNK, Store, damaged, damaged_index, numbers
from opendeep_jax.data.storing.shards import content_hash
from opendeep_jax.data.storing.workers import available_cores

# Tokens that are hashed at a time.
STRETCH = 64 * INNER_CHUNK


def verify_store(store: Store) -> list[str]:
    """Return a sentence for every damaged file, in the order of the shards; none if the store is as it was written.

    Recomputes the SHA-256 of every file, of every shard's content from what is read back, and of the whole, in
    threads.
    """
    problems = list(_store_problems(store))
    with ThreadPoolExecutor(available_cores()) as threads:
        for found in threads.map(lambda number: list(_shard_problems(store, number)), range(store.shards)):
            problems += found
    return problems


def _store_problems(store: Store) -> Iterator[str]:
    """Yield what is wrong with shards.arrow and store.json."""
    path, manifest = store.directory / "shards.arrow", store.manifest
    try:
        found = sha256_of(path)
    except OSError as error:
        yield str(damaged_index(store.directory, f"it cannot be read: {error.strerror}"))
        return
    if found != manifest["index"]["sha256"]:
        wanted = manifest["index"]["sha256"]
        yield str(damaged_index(store.directory, f"its SHA-256 is {found} instead of {wanted}"))
        return
    hashes = b"".join(bytes.fromhex(value.as_py()) for value in store.index.column("content_hash"))
    totals = {key: int(np.sum(numbers(store.index.column(key)))) for key in ("documents", "tokens", "bytes")}
    totals["content_hash"] = hashlib.sha256(hashes).hexdigest()
    for key, value in totals.items():
        if manifest[key] != value:
            yield f"{store.directory / 'store.json'} says {key} {manifest[key]}, and the shards make {value}."


def _shard_problems(store: Store, number: int) -> Iterator[str]:
    directory, whole = store.shard_directory(number), True
    if not directory.exists():
        yield str(damaged(directory, "it is missing"))
        return
    for name, file in store.files(number).items():
        if problem := _file_problem(directory / name, file):
            whole = False
            yield str(damaged(directory / name, problem))
    if whole:
        wanted = store.index.column("content_hash")[number].as_py()
        try:
            found = _content_hash(store, number)
        except ConfigError as error:
            yield str(error)
            return
        if found != wanted:
            yield str(damaged(directory, f"it has the content hash {found} instead of {wanted}"))


def _file_problem(path: Path, file: dict) -> str:
    """Return what is wrong with a file, or nothing."""
    try:
        size = path.stat().st_size
        if size != file["size"]:
            return f"it has {size} bytes instead of {file['size']}"
        found = sha256_of(path)
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return f"its SHA-256 is {found} instead of {file['sha256']}" if found != file["sha256"] else ""


def _content_hash(store: Store, number: int) -> str:
    """Return the content hash of a shard from what can be read of it."""
    shard, digest = store.shard(number), hashlib.sha256()
    for begin in range(0, shard.size, STRETCH):
        tokens = shard.read_tokens(begin, min(begin + STRETCH, shard.size))
        digest.update(tokens.astype(f"<u{tokens.itemsize}", copy=False))
    columns = (shard.documents.column(name).to_pylist() for name in ("id", "url", "license"))
    return content_hash(digest, np.diff(shard.offsets(0, len(shard.begins))).tolist(), *columns)
