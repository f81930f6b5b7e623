"""The GGUF container, read without trusting it: metadata, and where each tensor lies.

A file is the magic, a version, two counts, metadata (key, type, value), tensor descriptions, padding, tensors. Every
length is checked against what is left of the file before anything is made of it. The `gguf` package knows the tensors'
block formats; its own reader follows a hostile length for hours, so the few lines of the header are spoken here.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
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
_CURE = "Download or write the file again."


@dataclass(frozen=True)
class GGUFTensor:
    """One stored tensor, for example `blk.0.attn_q.weight` of shape (576, 576) in Q4_1."""

    name: str
    kind: int
    """A gguf.GGMLQuantizationType."""
    shape: tuple[int, ...]
    """Row-major: the file's own dimensions reversed."""
    data: np.ndarray
    """uint8 [rows, bytes]: a read-only view that the system loads page by page; one row is the last axis of shape."""

    def read(self) -> np.ndarray:
        """The tensor as float32, or in its own dtype where that is float32, float16 or bfloat16."""
        import gguf
        import ml_dtypes

        kinds = gguf.GGMLQuantizationType
        plain = {kinds.F32: np.float32, kinds.F16: np.float16, kinds.F64: np.float64, kinds.BF16: ml_dtypes.bfloat16}
        if self.kind in plain:
            return self.data.view(plain[self.kind]).reshape(self.shape)
        return gguf.dequantize(self.data, kinds(self.kind)).reshape(self.shape)

    def part(self, index: int) -> "GGUFTensor":
        """The tensor at an index of the first axis."""
        rows = math.prod(self.shape[1:-1])
        return GGUFTensor(self.name, self.kind, self.shape[1:], self.data[index * rows : (index + 1) * rows])


@dataclass(frozen=True)
class GGUFFile:
    """What a file says: `fields["llama.block_count"] == 30`, `tensors["token_embd.weight"]`."""

    path: Path
    fields: Mapping[str, Any]
    """Metadata: numbers, text, truth values, and lists of them."""
    tensors: Mapping[str, GGUFTensor]


def read_gguf(path: str | Path) -> GGUFFile:
    """The metadata and tensors of a GGUF file; tensors are read when they are asked for.

    Raises:
        ConfigError: there is no such file, the `gguf` extra is missing, or the file is cut off, damaged or hostile.
    """
    require_gguf()
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise ConfigError(f"{path} cannot be read ({error}). Name a .gguf file.") from error
    try:
        return _read(path, data)
    except _Malformed as error:
        raise ConfigError(f"{path} is not a whole GGUF file: {error}. {_CURE}") from error


def require_gguf() -> None:
    """Raises ConfigError where the `gguf` package is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "GGUF files need the gguf package, which is not installed. Install it: pip install 'opendeep-jax[gguf]'."
        ) from error


class _Malformed(ValueError):
    pass


class _Cursor:
    """Reads forward through the header, never past the end."""

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
    if fields.get("split.count", 1) != 1:
        raise _Malformed("it is one of several parts; put them together with `llama-gguf-split --merge`")
    entries = [_entry(cursor) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _Malformed(f"general.alignment is {alignment}, and must be a power of two")
    start = cursor.place + -cursor.place % alignment
    tensors = {name: _tensor(data, start, name, *entry) for name, *entry in entries}
    if len(tensors) != len(entries):
        raise _Malformed("two tensors have one name")
    places = sorted((offset, offset + tensors[name].data.nbytes, name) for name, _, _, offset in entries)
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


def _tensor(data: mmap.mmap, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
    import gguf

    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise _Malformed(f"tensor {name} is stored in the unknown type {kind}") from error
    if shape[-1] % block:
        raise _Malformed(f"tensor {name} has rows of {shape[-1]}, which blocks of {block} do not divide")
    rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * size
    if start + offset + rows * row_bytes > len(data):
        raise _Malformed(f"tensor {name} ends at byte {start + offset + rows * row_bytes} of {len(data)}")
    view = np.frombuffer(data, np.uint8, rows * row_bytes, start + offset)
    return GGUFTensor(name, kind, shape, view.reshape(rows, row_bytes))
