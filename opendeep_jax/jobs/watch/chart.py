"""Pictures of the live page, written by hand: line charts as SVG, loads as a PNG. Nothing to load, quick to draw."""

import base64
import json
import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from opendeep_jax.display.chart_style import LOG_SCALE, coincident, tick_labels, turns
from opendeep_jax.display.page import text

WIDTH, HEIGHT, RIGHT, TOP, BOTTOM = 520, 250, 22, 30, 24
LOAD_COLOURS = (
    (18, 60, 124), (63, 127, 214), (169, 197, 232), (241, 238, 230), (243, 189, 132), (221, 106, 44), (138, 31, 27),
)  # fmt: skip
"""From a quarter of the mean load, over the mean, to four times."""


class Series(NamedTuple):
    """A curve: (x, least, mean, largest) of each of its stretches, and how it looks."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    colour: str
    """A CSS colour."""
    run: int = 0
    """Place of the run that it is of, by which the legend finds it."""
    dashes: tuple[float, ...] = ()


def line_chart(
    series: Sequence[Series],
    label: str,
    log: bool = False,
    band: bool = False,
    percent: bool = False,
    over: str = "step",
) -> str:
    """Return curves over one axis as `<svg>`; empty where there is nothing to draw.

    Args:
        label: quantity and unit, above the axis.
        log: logarithmic y axis where all values allow it; the label says so.
        band: shade from least to largest.
        percent: label the y axis, a share of one, in percent.
        over: what the x axis counts.
    """
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
    ticks = _ticks(y_low, y_high, log)
    labels = tick_labels(ticks, percent)
    left = max(12 + 7.6 * max(map(len, labels), default=0), 30)  # also where a narrow page writes larger

    def across(x: float) -> float:
        return left + (x - x_low) / x_span * (WIDTH - left - RIGHT)

    def up(y: float) -> float:
        share = ((math.log10(y) if log else y) - y_low) / y_span
        return HEIGHT - BOTTOM - min(max(share, -0.02), 1.02) * (HEIGHT - TOP - BOTTOM)

    parts = [f"<text x={left:.0f} y=14>{text(label + LOG_SCALE * log)}</text>"]
    for value, name in zip(ticks, labels, strict=True):
        at = up(value)
        parts.append(f'<path class=grid d="M{left:.1f} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f"<text x={left - 6:.1f} y={at + 4:.1f} text-anchor=end>{name}</text>")
    x_ticks = _ticks(x_low, x_high, False)
    for value, name in zip(x_ticks, tick_labels(x_ticks), strict=True):
        parts.append(f"<text x={across(value):.1f} y={HEIGHT - 6} text-anchor=middle>{name}</text>")
    for one in series:
        if band and len(one.points) > 1:
            above = [f"{across(x):.1f} {up(high):.1f}" for x, _, _, high in one.points]
            below = [f"{across(x):.1f} {up(low):.1f}" for x, low, _, _ in reversed(one.points)]
            shape = f'd="M{"L".join(above + below)}Z"'
            parts.append(f'<path class=band data-run={one.run} fill="{one.colour}" opacity=.16 {shape}/>')
    drawn = [[(across(x), up(mean)) for x, _, mean, _ in one.points] for one in series]
    sharing = {}
    for group in coincident(drawn, tolerance=1.2):
        sharing |= {index: (member, len(group)) for member, index in enumerate(group)}
    for index, (one, points) in enumerate(zip(series, drawn, strict=True)):
        member, size = sharing.get(index, (0, 1))
        name = f"<title>{text(one.name)}</title>"
        if len(points) == 1:
            (x, y), r = points[0], 3 + 2 * (size - 1 - member)  # rings around each other where they are equal
            parts.append(f'<circle data-run={one.run} cx={x:.1f} cy={y:.1f} r={r} fill="{one.colour}">{name}</circle>')
            continue
        dashes, offset = turns(member, size) if size > 1 else (one.dashes, 0.0)
        style = f' stroke-dasharray="{" ".join(f"{d:g}" for d in dashes)}"' if dashes else ""
        style += f" stroke-dashoffset={offset:g}" if offset else ""
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path class=line data-run={one.run} stroke="{one.colour}"{style} d="M{path}">{name}</path>')
    parts.append("<path class=rule visibility=hidden />")
    frame = {"left": round(left, 1), "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM}
    values = frame | {"low": x_low, "high": x_high, "over": over, "percent": percent} | _values(series)
    name = f"{label}; arrow keys read the values"
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role=img tabindex=0 aria-label="{text(name)}"'
    data = text(json.dumps(values, separators=(",", ":")))
    return f'<svg {box} data-chart="{data}">{"".join(parts)}</svg>'


def _values(series: Sequence[Series]) -> dict:
    """What the page's script shows under the pointer: x once where all curves share it."""
    shared = [_short(point[0]) for point in series[0].points]
    curves = []
    for one in series:
        x = [_short(point[0]) for point in one.points]
        own = {} if x == shared else {"x": x}
        y = [_short(point[2]) for point in one.points]
        curves.append({"run": one.run, "name": one.name, "color": one.colour, "y": y} | own)
    return {"x": shared, "curves": curves}


def _short(value: float) -> float:
    short = float(f"{value:.5g}") if abs(value) < 1e5 else float(round(value))
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


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
