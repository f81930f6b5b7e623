"""The safetensors format, read and written one tensor at a time so that a model never has to fit in memory twice.

A file is 8 bytes with the header's length N (little-endian), N bytes of JSON that give each tensor's dtype, shape and
place, then the tensors, row-major and without gaps. The `safetensors` package has no bfloat16 or float8 for NumPy,
which is most of what DeepSeek publishes; the format is small enough to speak directly.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
MAX_DIMENSIONS = 32
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CURE = "Download or write the file again."


@dataclass(frozen=True)
class StoredTensor:
    """Location of one tensor on disk."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Return the tensor, as a read-only view that the system loads page by page."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape).view(np.ndarray)


def read_file(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file by name; reads its header only.

    Raises:
        ConfigError: the file is not in the format, or shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
            raise ConfigError(
                f"{path} is not a whole safetensors file: its header does not fit in {size} bytes, or has more than "
                f"{MAX_HEADER_BYTES}. {_CURE}"
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_repetition)
            header.pop("__metadata__", None)
            tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
            _check_places(tensors, 8 + length)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path} has a header that is not safetensors ({error!r:.300}). {_CURE}") from error
    for name, tensor in tensors.items():
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise ConfigError(f"{path} is cut off: tensor {name} ends at byte {end}, the file at byte {size}. {_CURE}")
    return tensors


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, whose names must differ: of two tensors of one name, readers would take different ones."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _stored(path: Path, start: int, entry: dict) -> StoredTensor:
    """Return a header's entry, checked; any ValueError, KeyError or TypeError means that it is malformed."""
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(size) is int and size >= 0 for size in (begin, end, *shape)) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"sizes {shape} at {begin}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for shape {shape} of {dtype}")
    return StoredTensor(path, dtype, shape, start + begin)


def _check_places(tensors: Mapping[str, StoredTensor], start: int) -> None:
    """Raise ValueError unless the tensors lie one after the other: one that lies over another was not written so."""
    place = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != place:
            raise ValueError(f"tensor {name} begins at byte {tensor.offset}, the one before it ends at {place}")
        place += tensor.nbytes


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model directory by name: of the shards its index lists, or of its *.safetensors files.

    Raises:
        ConfigError: no such files, a listed shard or tensor is missing, a tensor is in two files, or a file is
            malformed.
    """
    index = directory / INDEX_NAME
    if not index.exists():
        paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            raise ConfigError(_no_weights(directory))
        return _read_files(paths)
    try:
        if index.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"it has more than {MAX_HEADER_BYTES} bytes")
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = sorted({str(shard) for shard in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{index} is not an index of shards ({error!r:.300}). {_CURE}") from error
    # A shard is named, not located: an index from elsewhere must not point out of its directory.
    absent = [shard for shard in shards if Path(shard).name != shard or not (directory / shard).is_file()]
    if absent:
        raise ConfigError(f"{index} lists shards that are not in {directory}: {', '.join(absent[:20])}. {_CURE}")
    tensors = _read_files([directory / shard for shard in shards])
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise ConfigError(f"{index} lists tensors that are not in its shards: {', '.join(lost[:20])}. {_CURE}")
    return tensors


def _read_files(paths: Sequence[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        found = read_file(path)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise ConfigError(
                f"{path} holds tensors that {tensors[twice[0]].path.name} holds too: {', '.join(twice[:20])}. Remove "
                "the file that is no part of the model."
            )
        tensors |= found
    return tensors


def _no_weights(directory: Path) -> str:
    """Return the fix for a directory without safetensors; a pickle is never opened, for it can run any code."""
    pickles = sorted(path.name for suffix in PICKLES for path in directory.glob(f"*{suffix}"))
    if not pickles:
        return f"{directory} has no *.safetensors file. Convert the weights to safetensors first."
    return (
        f"{directory} has no *.safetensors file, only {', '.join(pickles[:5])}, which can run any code when it is "
        "opened and is left alone. Take a repository with safetensors, or, if you trust its author, convert it with "
        "transformers: AutoModelForCausalLM.from_pretrained(directory).save_pretrained(another)."
    )


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
    """Write tensors as one file, or as shards of at most max_shard_bytes (one tensor at least) with their index.

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
    """Write the next len(specs) arrays; the file appears under its name only when it is whole."""
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
