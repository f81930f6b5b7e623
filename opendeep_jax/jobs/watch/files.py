"""Series of any length, kept as curves of bounded size. No JAX, no NumPy."""

POINTS = 300


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
