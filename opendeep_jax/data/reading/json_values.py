"""JSON files that are not lines: an array of objects, or objects one after the other over several lines. Streamed."""

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, TextIO

BLOCK = 2**20
"""Characters that are read at one time."""

BLANK = re.compile(r"[ \t\r\n]*")
FIRST_LINE = 2**26
"""Bytes of a line that is looked at to tell lines from other JSON; a longer one is taken for lines."""


def is_lines(content: BinaryIO) -> bool:
    """Return whether a JSON file, read from its beginning, has one object a line, and is no array of objects."""
    first = _next_line(content)
    if first.startswith(b"["):
        return False
    try:
        json.loads(first)
        return True
    except (ValueError, RecursionError):
        return len(first) >= FIRST_LINE or _next_line(content).startswith(b"{")


def _next_line(content: BinaryIO) -> bytes:
    while line := content.readline(FIRST_LINE):
        if stripped := line.removeprefix(b"\xef\xbb\xbf").strip():
            return line.removeprefix(b"\xef\xbb\xbf").lstrip() if len(line) >= FIRST_LINE else stripped
    return b""


def read_values(stream: TextIO) -> Iterator[Any]:
    """Yield the elements of the array, or the values one after the other. Raises ValueError where it is no JSON."""
    decode, buffer, position, ended = json.JSONDecoder().raw_decode, "", 0, False
    array, number, comma = None, 0, False

    def more() -> bool:
        nonlocal buffer, position, ended
        block = stream.read(max(BLOCK, len(buffer) - position))  # doubles, so that a large value costs linear time
        buffer, position, ended = buffer[position:] + block, 0, not block
        return not ended

    while True:
        position = BLANK.match(buffer, position).end()
        if position == len(buffer):
            if not ended and more():
                continue
            if array:
                raise ValueError("the file ends inside its array")
            return
        sign = buffer[position]
        if array is None:
            array = sign == "["
            position += array
        elif array and sign == "]" and not comma:
            array, position = False, position + 1
            comma = True  # nothing may follow
        elif comma and not array:
            raise ValueError("there is more behind the end of its array")
        elif array and number and not comma:
            if sign != ",":
                raise ValueError(f"a comma is missing after element {number}")
            comma, position = True, position + 1
        else:
            try:
                value, position = decode(buffer, position)
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or ended or not more():
                    raise ValueError(f"value {number + 1}: {error}") from error
                continue
            number, comma = number + 1, False
            yield value
