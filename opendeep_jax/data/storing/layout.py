"""The files of a token store: how tokens lie in them, their hashes, and what is said of damage."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opendeep_jax.config.checks import ConfigError

# Tokens that are read, and checked, together.
INNER_CHUNK = 1 << 14
# Most tokens in one file; all of a shard's, except where one document or compressed file holds more.
OUTER_CHUNK = 1 << 25
# Bytes at each end of a large index that are hashed apart.
END_BYTES = 1 << 16


def token_spec(directory: Path, tokens: int, dtype: str) -> dict:
    """TensorStore's description of the array of `tokens` tokens at `directory`. A file that is gone is an error."""
    outer = min(-(-max(tokens, 1) // INNER_CHUNK) * INNER_CHUNK, OUTER_CHUNK)
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [INNER_CHUNK], "codecs": codecs, "index_codecs": codecs}
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(directory)},
        "metadata": {
            "shape": [tokens],
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [outer]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
        "recheck_cached_data": "open",
    }


def token_file(directory: Path, token: int) -> Path:
    """The file of a shard that holds one of its tokens."""
    return directory / "tokens" / "c" / str(token // OUTER_CHUNK)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_ends(path: Path) -> str:
    """SHA-256 of the first and last END_BYTES of a file: Arrow keeps its layout there. Raises OSError."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(END_BYTES))
        file.seek(max(path.stat().st_size - END_BYTES, 0))
        digest.update(file.read())
    return digest.hexdigest()


def numbers(column: Any) -> np.ndarray:
    """The numbers of a pyarrow Array without nulls, not copied. Its own `to_numpy` loads pandas, if that is there."""
    whole = np.frombuffer(column.buffers()[1], str(column.type))
    return whole[column.offset : column.offset + len(column)]


def damaged(path: Path, reason: str) -> ConfigError:
    """The error for a damaged file of a shard."""
    shard = next(place for place in (path, *path.parents) if place.parent.name == "shards")
    return ConfigError(
        f"{path} is damaged: {reason}. Delete {shard} and run `opendeep data prepare` again (for a run with its "
        "--workdir): only that shard is made anew."
    )


def damaged_index(directory: Path, reason: str) -> ConfigError:
    """The error for a damaged shards.arrow of the store at `directory`."""
    return ConfigError(
        f"{directory / 'shards.arrow'} is damaged: {reason}. Delete it and run `opendeep data prepare` again: it is "
        "made anew from the shards, which are kept."
    )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a shard's file is read into a ConfigError that names it."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, LookupError) as error:  # Arrow's own errors are among them.
        raise damaged(path, getattr(error, "strerror", None) or str(error)) from error


def map_arrow(path: Path) -> Any:
    """The one RecordBatch of an Arrow file, memory-mapped."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:  # What is mapped stays so without the file descriptor.
        return pyarrow.ipc.open_file(file).get_batch(0)
