"""Chart style shared by the report, the watch page and a sweep's figures: colors, dashes, tick labels. Plain Python.

Colors are told apart by people who see no red, no green or no blue: the least distance between two of a theme is
held by a test, as is their contrast with the theme's background.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence

from opendeep_jax.display.numbers import human_count

SERIES = ("#2f6bd8", "#cd4805", "#2f7258", "#a32b9e", "#139ec6", "#62090f", "#9d9459", "#2d0d67")
SERIES_DARK = ("#6ea0ff", "#f37513", "#429082", "#eb9dbb", "#b6e6ff", "#c92516", "#f7e04f", "#8b44c9")
PAPER, PAPER_DARK = "#ffffff", "#171b21"
"""Background of the series: a card of the page, or a picture."""
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2.5), (1.8, 2.2), (9, 2.5, 1.8, 2.5))
"""Lengths of dashes and gaps in points: solid for the first eight series, dashed for the next eight, and so on."""
LOG_SCALE = " (log scale)"
"""Added to the title of an axis that has one."""

Curve = Sequence[tuple[float, float]]


def look(place: int) -> tuple[int, tuple[float, ...]]:
    """Return the color's index in SERIES and the dashes of a series; 32 series look different."""
    return place % len(SERIES), DASHES[place // len(SERIES) % len(DASHES)]


def css_colors(dark: bool = False) -> str:
    """Return the series' colors as CSS variables, `--s0` and up."""
    return "".join(f"--s{i}:{color};" for i, color in enumerate(SERIES_DARK if dark else SERIES))


# Curves that hide each other


def coincident(curves: Sequence[Curve], tolerance: float) -> list[list[int]]:
    """Return groups of two or more curves that would hide each other for a sixth of their length or more.

    Args:
        curves: points (x, y) with x that does not fall.
        tolerance: the distance in y up to which two curves are drawn as one.
    """
    groups: list[list[int]] = []
    for index, curve in enumerate(curves):
        for group in groups:
            if _hide(curve, curves[group[0]], tolerance):
                group.append(index)
                break
        else:
            groups.append([index])
    return [group for group in groups if len(group) > 1]


def _hide(first: Curve, second: Curve, tolerance: float) -> bool:
    xs = [x for x, _ in second]
    longest = stretch = common = 0
    for x, y in first:
        if not xs or not xs[0] <= x <= xs[-1]:
            continue
        common += 1
        after = min(max(bisect_right(xs, x), 1), len(xs) - 1)
        (x0, y0), (x1, y1) = second[after - 1], second[after]
        other = y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
        stretch = stretch + 1 if abs(y - other) <= tolerance else 0
        longest = max(longest, stretch)
    return longest > 0 and longest >= min(max(common / 6, 2), common)


def alternating_dashes(member: int, size: int, length: float = 9.0) -> tuple[tuple[float, float], float]:
    """Return the dashes and their offset with which a group of coinciding curves take turns: all of them show."""
    length = max(min(length, 240 / size), 2.0)
    return (length, length * (size - 1)), length * (size - member) % (length * size)


# Labels


def tick_labels(values: Sequence[float], percent: bool = False) -> list[str]:
    """Return short labels for an axis's ticks, with as many digits as it takes to tell them apart."""
    labels: list[str] = []
    for digits in range(4, 13):
        if percent:
            labels = [f"{100 * value:.{digits - 1}g}%" for value in values]
        else:
            labels = [_number(value, digits) for value in values]
        if len(set(labels)) == len(set(values)):
            break
    return labels


def _number(value: float, digits: int) -> str:
    size = abs(value)
    if 10_000 <= size < 1e15 and digits == 4:
        return re.sub(r"\.?0+(?=[A-Z])", "", human_count(value))
    if 0 < size < 1e-3 or size >= 1e15:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 10_000:
        return f"{value:,.{max(digits - len(str(int(size))), 0)}f}"
    return f"{value:,.{digits}g}" if value else "0"


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions at least `gap` apart, near the given ones and in their order, within [low, high] if they fit."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    gap = min(gap, (high - low) / max(len(order) - 1, 1))
    blocks: list[list[float]] = []  # [first position, how many]: what had to be pushed apart moves as one
    for i in order:
        blocks.append([positions[i], 1])
        while True:
            first, count = blocks[-1]
            blocks[-1][0] = min(max(first, low), high - gap * (count - 1))
            if len(blocks) == 1 or blocks[-2][0] + gap * blocks[-2][1] <= blocks[-1][0]:
                break
            (first, count), (before, number) = blocks.pop(), blocks.pop()
            middle = (first + gap * (count - 1) / 2) * count + (before + gap * (number - 1) / 2) * number
            total = count + number
            blocks.append([middle / total - gap * (total - 1) / 2, total])
    placed = [first + gap * k for first, count in blocks for k in range(int(count))]
    return [place for _, place in sorted(zip(order, placed, strict=True))]
