"""Pictures of the live page, written by hand: line charts as SVG, loads as a PNG. Nothing to load, quick to draw."""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from opendeep_jax.train.progress import human_count
from opendeep_jax.train.report_page import text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 230, 46, 10, 10, 24
LOAD_COLOURS = (
    (18, 60, 124), (63, 127, 214), (169, 197, 232), (241, 238, 230), (243, 189, 132), (221, 106, 44), (138, 31, 27),
)  # fmt: skip
"""From a quarter of the mean load, over the mean, to four times."""


class Series(NamedTuple):
    """A curve: (x, least, mean, largest) of each of its stretches, and the place of its colour."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    colour: str
    """A CSS colour."""


def line_chart(series: Sequence[Series], label: str, log: bool = False, band: bool = False) -> str:
    """Curves over one axis as `<svg>`; empty where there is nothing to draw. `band` shades from least to largest."""
    series = [one for one in series if one.points]
    if not series:
        return ""
    log = log and all(point[1] > 0 for one in series for point in one.points)
    x_low, x_high = _limits([point[0] for one in series for point in one.points])
    # A spike or the first steps must not flatten the rest: the axis covers all but the highest hundredth of the means.
    means = sorted(point[2] for one in series for point in one.points)
    cut = means[math.ceil(0.99 * (len(means) - 1))]
    y_low, y_high = _limits([means[0], cut], log)
    x_span, y_span = x_high - x_low, y_high - y_low

    def across(x: float) -> float:
        return LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        share = ((math.log10(y) if log else y) - y_low) / y_span
        return HEIGHT - BOTTOM - min(max(share, -0.02), 1.02) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in _ticks(y_low, y_high, log):
        at = up(value)
        parts.append(f'<path class=grid d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f"<text x={LEFT - 6} y={at + 4:.1f} text-anchor=end>{_tick(value)}</text>")
    for value in _ticks(x_low, x_high, False):
        parts.append(f"<text x={across(value):.1f} y={HEIGHT - 6} text-anchor=middle>{_tick(value)}</text>")
    for one in series:
        if band and len(one.points) > 1:
            above = [f"{across(x):.1f} {up(high):.1f}" for x, _, _, high in one.points]
            below = [f"{across(x):.1f} {up(low):.1f}" for x, low, _, _ in reversed(one.points)]
            parts.append(f'<path fill="{one.colour}" opacity=.16 d="M{"L".join(above + below)}Z"/>')
    for one in series:
        middle = [f"{across(x):.1f} {up(mean):.1f}" for x, _, mean, _ in one.points]
        if len(middle) == 1:
            x, y = middle[0].split()
            parts.append(f'<circle cx={x} cy={y} r=3 fill="{one.colour}"/>')
        else:
            name = f"<title>{text(one.name)}</title>"
            parts.append(f'<path class=line stroke="{one.colour}" d="M{"L".join(middle)}">{name}</path>')
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{text(label)}"'
    return f"<svg {box}>{''.join(parts)}</svg>"


def _limits(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
    if high - low <= 1e-9 * max(abs(high), abs(low), 1e-300):
        margin = 0.05 * abs(high) or 1.0
        return low - margin, high + margin
    return low, high


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        found = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
        found = [value for value in found if low <= math.log10(value) <= high]
        if len(found) > 2:
            return found[:: math.ceil(len(found) / 6)]
        low, high = 10.0**low, 10.0**high
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= 0.85 * rough)
    first = math.ceil(low / step)
    return [i * step for i in range(first, first + 12) if i * step <= high + 1e-9 * step]


def _tick(value: float) -> str:
    if abs(value) >= 10_000:
        number = human_count(value)
        unit = number[-1] if number[-1].isalpha() else ""
        digits = number.removesuffix(unit)
        return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + unit
    return f"{value:.4g}" if value else "0"


def load_image(load: Sequence[Sequence[float]]) -> str:
    """Loads over their mean, [layers][experts], as a PNG data URL: a pixel row per layer, an expert per column."""
    width = max(map(len, load))
    rows = b"".join(
        b"\0" + b"".join(_load_colour(value) for value in [*row, *[0.0] * (width - len(row))]) for row in load
    )
    header = struct.pack(">IIBBBBB", width, len(load), 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def _load_colour(value: float) -> bytes:
    share = (math.log2(min(max(value, 0.25), 4.0)) + 2) / 4 * (len(LOAD_COLOURS) - 1)
    place = min(int(share), len(LOAD_COLOURS) - 2)
    low, high, part = LOAD_COLOURS[place], LOAD_COLOURS[place + 1], round((share - place) * 8) / 8
    return bytes(round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
