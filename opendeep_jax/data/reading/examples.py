"""tf.train.Example, as TFDS writes it into ArrayRecord files: features by name. A protobuf reader of 60 lines."""

import struct
from collections.abc import Iterator
from typing import Any


def parse_example(record: bytes) -> dict[str, Any] | None:
    """Values by feature of a serialized tf.train.Example, or None if the record is not one.

    A feature of one value gives it (bytes, float or int), of several a list, of none None.
    """
    try:
        features = dict(_feature(entry) for entry in _messages(_only(record, 1), 1))
    except (ValueError, IndexError, struct.error, UnicodeDecodeError):
        return None
    return features or None


def _feature(entry: bytes) -> tuple[str, Any]:
    fields = dict(_fields(entry))
    values: list[Any] = []
    for kind, content in _fields(fields.get(2, b"")):
        if kind not in (1, 2, 3):
            raise ValueError(f"a feature of kind {kind}")
        for number, value in _fields(content):
            if number != 1:
                raise ValueError(f"field {number} in a list of values")
            values += _numbers(kind, value)
    return fields[1].decode("utf-8") if 1 in fields else "", values if len(values) > 1 else next(iter(values), None)


def _numbers(kind: int, value: Any) -> list[Any]:
    """Return the values of one entry of a bytes_list (1), float_list (2) or int64_list (3); numbers may be packed."""
    if kind == 1:
        if not isinstance(value, bytes):
            raise ValueError("a number in a list of bytes")
        return [value]
    if kind == 2:
        return list(struct.unpack(f"<{len(value) // 4}f", value))
    if isinstance(value, int):
        return [_signed(value)]
    numbers, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        numbers.append(_signed(number))
    return numbers


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _only(message: bytes, wanted: int) -> bytes:
    """Return the one field of a message. Raises ValueError if it has others."""
    found = list(_messages(message, wanted))
    if len(found) != 1:
        raise ValueError(f"{len(found)} fields where one is expected")
    return found[0]


def _messages(message: bytes, wanted: int) -> Iterator[bytes]:
    for number, value in _fields(message):
        if number != wanted or not isinstance(value, bytes):
            raise ValueError(f"field {number}")
        yield value


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, bytes or int) of each field of a protobuf message. Raises ValueError or IndexError if it is none."""
    if not isinstance(message, bytes):
        raise ValueError("a number in the place of a message")
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind in (1, 2, 5):
            size, at = (8, at) if kind == 1 else (4, at) if kind == 5 else _varint(message, at)
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise ValueError("cut short")
        else:
            raise ValueError(f"wire type {kind}")
        yield tag >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
