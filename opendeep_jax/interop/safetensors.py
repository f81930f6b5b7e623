"""The safetensors format, read and written one tensor at a time so that a model never has to fit in memory twice.

A file is 8 bytes with the header's length N (little-endian), N bytes of JSON that give each tensor's dtype, shape and
place, then the tensors, row-major and without gaps. The `safetensors` package has no bfloat16 or float8 for NumPy,
which is most of what DeepSeek publishes; the format is small enough to speak directly.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from opendeep_jax.config.checks import ConfigError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CURE = "Download or write the file again."


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies on disk."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """The tensor, as a read-only view that the system loads page by page."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape).view(np.ndarray)


def read_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name; reads its header only.

    Raises:
        ConfigError: the file is not in the format, or shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ConfigError(
                f"{path} is not a whole safetensors file: its header does not fit in {size} bytes. {_CURE}"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path} has a header that is not safetensors ({error!r}). {_CURE}") from error
    for name, tensor in tensors.items():
        end = tensor.offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        if end > size:
            raise ConfigError(f"{path} is cut off: tensor {name} ends at byte {end}, the file at byte {size}. {_CURE}")
    return tensors


def _stored(path: Path, start: int, entry: dict) -> StoredTensor:
    """A header's entry, checked; any ValueError, KeyError or TypeError means that it is malformed."""
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(size, int) and size >= 0 for size in (begin, *shape)):
        raise ValueError(f"sizes {shape} at {begin}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for shape {shape} of {dtype}")
    return StoredTensor(path, dtype, shape, start + begin)


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a model directory by name: of the shards its index lists, or of its *.safetensors files.

    Raises:
        ConfigError: no such files, a listed shard or tensor is missing, or a file is malformed.
    """
    index = directory / INDEX_NAME
    if not index.exists():
        paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            raise ConfigError(f"{directory} has no *.safetensors file. Convert the weights to safetensors first.")
        return {name: tensor for path in paths for name, tensor in read_file(path).items()}
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted({str(shard) for shard in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{index} is not an index of shards ({error!r}). {_CURE}") from error
    # A shard is named, not located: an index from elsewhere must not point out of its directory.
    absent = [shard for shard in shards if Path(shard).name != shard or not (directory / shard).is_file()]
    if absent:
        raise ConfigError(f"{index} lists shards that are not in {directory}: {', '.join(absent)}. {_CURE}")
    tensors = {name: tensor for shard in shards for name, tensor in read_file(directory / shard).items()}
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise ConfigError(f"{index} lists tensors that are not in its shards: {', '.join(lost[:20])}. {_CURE}")
    return tensors


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_directory(
    directory: Path, specs: Sequence[TensorSpec], arrays: Iterable[np.ndarray], max_shard_bytes: int
) -> None:
    """Writes tensors as one file, or as shards of at most max_shard_bytes (one tensor at least) with their index.

    Args:
        directory: An existing directory.
        specs: Every tensor, in order; needed before the data, for the headers.
        arrays: The tensors' values in the same order, taken one at a time.
        max_shard_bytes: Where to begin a new shard.
    """
    shards: list[list[TensorSpec]] = [[]]
    room = max_shard_bytes
    for spec in specs:
        if shards[-1] and spec.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(spec)
        room -= spec.nbytes
    remaining = iter(arrays)
    if len(shards) == 1:
        _write_file(directory / SINGLE_NAME, specs, remaining)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard, remaining)
        weight_map |= {spec.name: name for spec in shard}
    total = sum(spec.nbytes for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_file(path: Path, specs: Sequence[TensorSpec], arrays: Iterator[np.ndarray]) -> None:
    """Writes the next len(specs) arrays; the file appears under its name only when it is whole."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        place = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
        header[spec.name] = place
        offset += spec.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for spec, array in zip(specs, arrays, strict=False):
            file.write(np.ascontiguousarray(array, spec.dtype).reshape(-1).view(np.uint8).data)
    os.replace(partial, path)
