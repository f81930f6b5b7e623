"""Files that grow while one looks: read a piece at a time, kept as curves of bounded size. No JAX, no NumPy."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

CHUNK = 4 * 2**20
POINTS = 300
WHOLE, LAST, SAMPLES = 16 * 2**20, 2**20, 6000
"""A long history that is to be drawn is read in part: of more bytes than WHOLE, so many lines and the LAST bytes."""


class Tail:
    """Reads what was added to a JSON-lines file since the last look.

    A run that goes on from a checkpoint replaces such a file by a shorter one; then it is read again.

    Args:
        path: of the file, which need not be there.
        samples: of a long backlog, evenly spread lines will do, and the last ones.
    """

    def __init__(self, path: Path, samples: bool = False):
        self.path, self.samples, self._file, self._offset = path, samples, None, 0

    def restarted(self) -> bool:
        """Whether the file was replaced or cut, so that what was read of it counts no more. Ask before `read`."""
        try:
            found = os.stat(self.path)
        except OSError:
            found = None
        identity = (found.st_dev, found.st_ino) if found else None
        gone = self._offset > 0 and (identity != self._file or found.st_size < self._offset)
        if gone or identity != self._file:
            self._file, self._offset = identity, 0
        return gone

    def read(self) -> Iterator[dict]:
        """The objects of the new whole lines; half a line is left for the next look, a broken one passed over."""
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                if self.samples and size - self._offset > WHOLE:
                    yield from filter(None, map(parse, self._sampled(file, size - LAST)))
                while lines := self._lines(file):
                    yield from filter(None, map(parse, lines))
        except OSError:
            return

    def _sampled(self, file, end: int) -> Iterator[bytes]:
        begin = self._offset
        for place in range(SAMPLES):
            file.seek(begin + place * (end - begin) // SAMPLES)
            if place:
                file.readline()  # the rest of a line
            yield file.readline()
        file.seek(end)
        file.readline()
        self._offset = file.tell()

    def _lines(self, file) -> list[bytes]:
        file.seek(self._offset)
        piece = file.read(CHUNK)
        while piece and b"\n" not in piece:
            more = file.read(CHUNK)
            if not more:
                return []
            piece += more
        end = piece.rfind(b"\n") + 1
        self._offset += end
        return piece[:end].split(b"\n")[:-1]


def parse(line: bytes | str) -> dict | None:
    """The object that a line holds, or None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def last_record(path: Path, longest: int = 64 * 2**20) -> dict | None:
    """The last whole object of a JSON-lines file, read from its end; None where there is none."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            size = 64 * 2**10
            while True:
                file.seek(max(end - size, 0))
                lines = file.read(size).split(b"\n")
                whole = lines[:-1] if end <= size else lines[1:-1]
                for line in reversed(whole):
                    if record := parse(line):
                        return record
                if end <= size or size >= longest:
                    return None
                size *= 4
    except OSError:
        return None


def read_object(path: Path) -> dict:
    """The object in a JSON file; {} where there is none."""
    try:
        return parse(path.read_bytes()) or {}
    except OSError:
        return {}


def number(value) -> float | None:
    """A finite number as it is, else None."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return value if plain and math.isfinite(value) else None
    except OverflowError:
        return None


class Curve:
    """A series of any length in at most 2 * POINTS stretches, each with its first x and its least, mean and largest y.

    Stretches are merged by twos when they become too many, so no spike is lost and all have the same number of values.
    """

    def __init__(self):
        self._stretches: list[list[float]] = []  # [x, least, sum, largest, count]
        self._length = 1

    def add(self, x: float | None, y: float | None) -> None:
        """Adds a value; passed over unless both are numbers."""
        if x is None or y is None:
            return
        if self._stretches and self._stretches[-1][4] < self._length:
            _merge(self._stretches[-1], [x, y, y, y, 1])
            return
        if len(self._stretches) >= 2 * POINTS:
            self._stretches = _halved(self._stretches)
            self._length *= 2
        self._stretches.append([x, y, y, y, 1])

    def __len__(self) -> int:
        return len(self._stretches)

    def points(self, count: int = POINTS) -> list[tuple[float, float, float, float]]:
        """(x, least, mean, largest) of at most `count` stretches, in order."""
        found = [list(stretch) for stretch in self._stretches]
        while len(found) > max(count, 1):
            found = _halved(found)
        return [(x, low, total / n, high) for x, low, total, high, n in found]

    def means(self, count: int = POINTS) -> list[float]:
        """The means of at most `count` stretches, in order."""
        return [mean for _, _, mean, _ in self.points(count)]


def _halved(stretches: list[list[float]]) -> list[list[float]]:
    for first, second in zip(stretches[::2], stretches[1::2], strict=False):
        _merge(first, second)
    return stretches[::2]


def _merge(into: list[float], other: list[float]) -> None:
    into[1], into[2] = min(into[1], other[1]), into[2] + other[2]
    into[3], into[4] = max(into[3], other[3]), into[4] + other[4]
