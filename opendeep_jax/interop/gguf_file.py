"""The GGUF container, read without trusting it: metadata, and where each tensor lies.

A file is the magic, a version, two counts, metadata (key, type, value), tensor descriptions, padding, tensors. Every
length is checked against what is left of the file before anything is made of it. The `gguf` package knows the tensors'
block formats; its own reader follows a hostile length for hours, so the few lines of the header are spoken here.
"""

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from opendeep_jax.config.checks import ConfigError

VERSIONS = (2, 3)
SCALARS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4
MOST_ENTRIES = 1 << 22
MOST_PARTS = 99_999  # their names have five digits
SPLIT_COUNT = "split.count"
PART = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
_CURE = "Download or write the file again."


@dataclass(frozen=True)
class GGUFTensor:
    """One stored tensor, for example `blk.0.attn_q.weight` of shape (576, 576) in Q4_1."""

    name: str
    kind: int
    """A gguf.GGMLQuantizationType."""
    shape: tuple[int, ...]
    """Row-major: the file's own dimensions reversed."""
    path: Path
    """The file that it is in."""
    offset: int
    """The byte of the file that it begins at."""

    @property
    def rows(self) -> int:
        """Number of rows along the last axis of shape."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes that a row is stored in."""
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.kind)]
        return self.shape[-1] // block * size

    def read(self) -> np.ndarray:
        """Return the tensor as float32, or in its own dtype where that is float32, float16 or bfloat16.

        A plain one is the file's own memory, loaded page by page, and given up with the array.
        """
        import gguf
        import ml_dtypes

        kinds = gguf.GGMLQuantizationType
        plain = {kinds.F32: np.float32, kinds.F16: np.float16, kinds.F64: np.float64, kinds.BF16: ml_dtypes.bfloat16}
        data = np.memmap(self.path, np.uint8, "r", self.offset, (self.rows, self.row_bytes)).view(np.ndarray)
        if self.kind in plain:
            return data.view(plain[self.kind]).reshape(self.shape)
        return gguf.dequantize(data, kinds(self.kind)).reshape(self.shape)

    def part(self, start: int, stop: int) -> "GGUFTensor":
        """Return the tensor's entries from start to stop on its first axis, of which it has two or more."""
        offset = self.offset + start * math.prod(self.shape[1:-1]) * self.row_bytes
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=offset)


@dataclass(frozen=True)
class GGUFFile:
    """Header of a file: `fields["llama.block_count"] == 30`, `tensors["token_embd.weight"]`."""

    path: Path
    fields: Mapping[str, Any]
    """Metadata: numbers, text, truth values, and lists of them."""
    tensors: Mapping[str, GGUFTensor]


def read_gguf(path: str | Path) -> GGUFFile:
    """Return the metadata and tensors of a GGUF file, or of all the parts that a model is split into.

    Tensors are read when they are asked for.

    Args:
        path: The file, or any one of the parts, `NAME-00001-of-00003.gguf`; the others lie beside it.

    Raises:
        ConfigError: there is no such file, the `gguf` extra is missing, or a file is cut off, damaged or hostile.
    """
    require_gguf()
    path = Path(path)
    named = _read_file(path)
    count = named.fields.get(SPLIT_COUNT, 1)
    if count == 1:
        return named
    place = PART.fullmatch(path.name)
    if place is None or place["count"] != f"{count:05}":
        raise ConfigError(
            f"{path} is one of {count} parts of a model, and its name does not say which. Name it "
            f"NAME-00001-of-{count:05}.gguf as llama.cpp does, beside the others."
        )
    files = [_read_file(path.with_name(f"{place['name']}-{k + 1:05}-of-{count:05}.gguf")) for k in range(count)]
    for k, file in enumerate(files):
        if (file.fields.get("split.no"), file.fields.get(SPLIT_COUNT)) != (k, count):
            raise ConfigError(f"{file.path} is not part {k + 1} of {count} by its own fields. {_CURE}")
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    if len(tensors) != sum(len(file.tensors) for file in files):
        raise ConfigError(f"Two of the {count} parts of {path} have tensors of one name. {_CURE}")
    return GGUFFile(path, files[0].fields, tensors)


def _read_file(path: Path) -> GGUFFile:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, data)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        if isinstance(error, _Malformed):
            raise ConfigError(f"{path} is not a whole GGUF file: {error}. {_CURE}") from error
        raise ConfigError(f"{path} cannot be read ({error}). Name a .gguf file.") from error


def require_gguf() -> None:
    """Raise ConfigError where the `gguf` package is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "GGUF files need the gguf package, which is not installed. Install it: pip install 'opendeep-jax[gguf]'."
        ) from error


class _Malformed(ValueError):
    pass


class _Cursor:
    """Reader that moves forward through the header, never past the end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.place = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.place:
            raise _Malformed(f"{size} bytes are announced at byte {self.place} of {len(self.data)}")
        self.place += size
        return self.data[self.place - size : self.place]

    def number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def count(self, what: str) -> int:
        value = self.number("Q")
        if value > MOST_ENTRIES:
            raise _Malformed(f"it announces {value} {what}")
        return value

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Malformed(f"the text at byte {self.place - len(raw)} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return np.frombuffer(self.take(SCALARS[kind].itemsize), SCALARS[kind])[0].item()
        if kind != ARRAY:
            raise _Malformed(f"there is no metadata type {kind}")
        inner, count = self.number("I"), self.count("entries of a list")
        if inner == STRING:
            return [self.text() for _ in range(count)]
        if inner not in SCALARS:
            raise _Malformed(f"a list holds entries of type {inner}")
        return np.frombuffer(self.take(count * SCALARS[inner].itemsize), SCALARS[inner]).tolist()


def _read(path: Path, data: mmap.mmap) -> GGUFFile:
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF":
        raise _Malformed("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise _Malformed(f"its version is {version}; versions 2 and 3 can be read, little-endian")
    tensor_count, field_count = cursor.count("tensors"), cursor.count("fields")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.text()
        if key in fields:
            raise _Malformed(f"the field {key} is there twice")
        fields[key] = cursor.value(cursor.number("I"))
    parts = fields.get(SPLIT_COUNT, 1)
    if not isinstance(parts, int) or not 1 <= parts <= MOST_PARTS:
        raise _Malformed(f"it says that it is one of {parts!r} parts")
    entries = [_entry(cursor) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _Malformed(f"general.alignment is {alignment}, and must be a power of two")
    start = cursor.place + -cursor.place % alignment
    tensors = {name: _tensor(path, len(data), start, name, *entry) for name, *entry in entries}
    if len(tensors) != len(entries):
        raise _Malformed("two tensors have one name")
    places = sorted((t.offset, t.offset + t.rows * t.row_bytes, name) for name, t in tensors.items())
    for (_, end, first), (begin, _, second) in zip(places, places[1:], strict=False):
        if begin < end:
            raise _Malformed(f"the tensors {first} and {second} overlap")
    return GGUFFile(path, fields, tensors)


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, row-major shape, kind and offset of the next tensor."""
    name, dimensions = cursor.text(), cursor.number("I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise _Malformed(f"tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    return name, shape, cursor.number("I"), cursor.number("Q")


def _tensor(
    path: Path, length: int, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> GGUFTensor:
    """Return a tensor of a file of this length, whose tensors begin at `start`."""
    import gguf

    try:
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise _Malformed(f"tensor {name} is stored in the unknown type {kind}") from error
    if shape[-1] % block:
        raise _Malformed(f"tensor {name} has rows of {shape[-1]}, which blocks of {block} do not divide")
    if min(shape) < 1:
        raise _Malformed(f"tensor {name} has the shape {list(shape)}")
    tensor = GGUFTensor(name, kind, shape, path, start + offset)
    end = tensor.offset + tensor.rows * tensor.row_bytes
    if end > length:
        raise _Malformed(f"tensor {name} ends at byte {end} of {length}")
    return tensor
