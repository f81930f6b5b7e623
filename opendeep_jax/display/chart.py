"""Charts, all by matplotlib: lines over time as SVG for pages and as figures for files, heat maps as PNG.

A page's SVG takes its colors from the page, light or dark, and carries its values for `chart.js`, which shows them
under the pointer. Figures are made without pyplot, so nothing outlives a call; matplotlib's settings belong to the
process and are set for the length of a drawing, behind a lock.
"""

import base64
import contextlib
import functools
import html
import io
import json
import math
import re
import textwrap
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullFormatter

from opendeep_jax.display.chart_style import (
    LOG_SCALE,
    SERIES,
    alternating_dashes,
    coincident,
    look,
    spread,
    tick_labels,
)

INK, MUTED, GRID = "#20242a", "#6a7280", "#e4e6ea"
BLUE, ORANGE, GREEN, VIOLET = SERIES[:4]
CSS_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {hue: f"--s{i}" for i, hue in enumerate(SERIES)}
"""The page's variable for each color, so that one SVG serves both themes."""
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8.5, "svg.fonttype": "none", "svg.hashsalt": "opendeep",
    "pdf.fonttype": 42,
    "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.xmargin": 0.01,
    "grid.color": GRID, "grid.linewidth": 0.7, "text.color": INK, "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round", "lines.solid_joinstyle": "round",
    "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "xtick.major.size": 3, "ytick.major.size": 0, "legend.frameon": False, "legend.labelcolor": INK,
    "axes.facecolor": "none", "figure.facecolor": "white", "savefig.facecolor": "white",
}  # fmt: skip
LOAD_COLORS = LinearSegmentedColormap.from_list(
    "load", ["#123c7c", "#3f7fd6", "#a9c5e8", "#f1eee6", "#f3bd84", "#dd6a2c", "#8a1f1b"]
)
GRADUAL_COLORS = LinearSegmentedColormap.from_list("gradual", ["#2f6bd8", "#8a4fd0", "#d0468f", "#e8743b", "#d9a02c"])
_lock = threading.RLock()

Point = tuple[float, float, float, float]
"""x, and the least, mean and largest y of a stretch that begins there."""


class Line(NamedTuple):
    """One curve."""

    name: str
    points: Sequence[Point]
    """Points in order of x; the space from least to largest is shaded. A tuple, where the line goes to `line_chart`."""
    color: str = BLUE
    smooth: bool = False
    """Draw the means faintly and their moving average over them."""
    width: float = 1.6
    dots: bool = False
    """Mark each value; for curves with few of them."""
    dashes: tuple[float, ...] = ()
    """Lengths of dashes and gaps in points; none for a solid line."""
    run: int = 0
    """Place of its run in the page's legend, which hides it."""


class Level(NamedTuple):
    """A horizontal line to compare with, and its name."""

    name: str
    y: float
    color: str = MUTED


class Ticks(Formatter):
    """Labels of an axis, with as many digits as it takes to tell them apart; shares as percent if asked."""

    def __init__(self, percent: bool = False):
        self.percent = percent

    def __call__(self, value: float, pos: int | None = None) -> str:
        return tick_labels([value], self.percent)[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        return tick_labels([float(value) for value in values], self.percent)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Set matplotlib to the style of all pictures while the block runs; one thread at a time."""
    with _lock, matplotlib.rc_context():
        matplotlib.rcdefaults()  # a person's own matplotlibrc must not change a picture
        matplotlib.rcParams.update(STYLE)
        yield


def points(x: Iterable[float], y: Iterable[float]) -> tuple[Point, ...]:
    """Return the points of plain values, without those that are not finite."""
    return tuple((a, b, b, b) for a, b in zip(map(float, x), map(float, y), strict=True) if math.isfinite(a + b))


def moving_average(y: np.ndarray) -> np.ndarray:
    """Return the mean over a centered window of a fiftieth of the series; ends use what is there."""
    half = len(y) // 100
    if half == 0:
        return y
    sums = np.concatenate([[0.0], np.cumsum(y)])
    low, high = np.maximum(np.arange(len(y)) - half, 0), np.minimum(np.arange(len(y)) + half + 1, len(y))
    return (sums[high] - sums[low]) / (high - low)


def dash_style(dashes: Sequence[float], width: float, offset: float = 0.0):
    """Return dashes in points as matplotlib takes them, in widths of the line."""
    return (offset / width, tuple(length / width for length in dashes)) if dashes else "-"


def draw_lines(
    axes,
    lines: Sequence[Line],
    levels: Sequence[Level] = (),
    x_label: str = "",
    y_label: str = "",
    log: bool = False,
    percent: bool = False,
    named: bool = True,
) -> None:
    """Draw curves, and what names them outside the axes: no label lies on a line.

    Args:
        axes: to draw on, of a figure in `style`.
        named: name several curves under the axes; False where the page has a legend.
    """
    drawn = []
    for place, line in enumerate(lines):
        x, low, y, high = np.array(line.points, float).T
        common = {"color": line.color, "gid": f"run{line.run}-{place}"}
        if len(x) > 1 and np.any(high > low):
            axes.fill_between(x, low, high, alpha=0.16, linewidth=0, **common)
        if line.smooth and len(x) >= 100:
            axes.plot(x, y, alpha=0.28, linewidth=0.8, **common)
            y = moving_average(y)
        drawn += axes.plot(x, y, linewidth=line.width, label=line.name, markersize=3.2, **common,
                           marker="o" if line.dots or len(x) == 1 else "",
                           linestyle=dash_style(line.dashes, line.width))  # fmt: skip
    for level in levels:
        axes.axhline(level.y, color=level.color, linewidth=1.1, linestyle=(0, (4, 3)))
    _scale(axes, lines, levels, log)
    log = axes.get_yscale() == "log"
    axes.yaxis.set_major_formatter(Ticks(percent))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(Ticks())
    axes.set_xlabel(x_label)
    axes.set_title(y_label + LOG_SCALE * log, loc="left", fontsize=8.5, color=MUTED, pad=8)
    several = [line for line in drawn if not line.get_label().startswith("_")]
    # Before the turns, whose dashes it need not show.
    legend(axes.figure, several if named and len(several) > 1 else [])
    separate_coincident(axes, drawn)
    _name_levels(axes, levels)


def _scale(axes, lines: Sequence[Line], levels: Sequence[Level], log: bool) -> None:
    """Set the y axis's scale, limits and ticks."""
    means = np.sort([point[2] for line in lines for point in line.points] or [0.0])
    shown = [means[0], means[-1], *(level.y for level in levels)]
    low, high = min(shown), max(shown)
    if high - low <= 1e-9 * abs(high) and high > 0:
        axes.set_ylim(0, 1.5 * high)  # a constant: its surroundings would all be labeled alike
        log = False
    log = log and low > 0
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(10, range(1, 10)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, axis="y", which="minor", linewidth=0.35)
    elif len(means) >= 100:
        # A spike or the first steps must not flatten the rest: where the highest hundredth of the means would more than
        # double the axis, it is not seen.
        seen = [low, means[math.ceil(0.99 * (len(means) - 1))], *(level.y for level in levels)]
        span = max(seen) - min(seen)
        if 0 < 2 * span < high - low:
            axes.set_ylim(min(seen) - 0.05 * span, max(seen) + 0.05 * span)
    steps = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)  # of a decade
    axes.yaxis.set_major_locator(LogLocator(10, steps) if log else MaxNLocator(5))


def _shares(axes, values) -> np.ndarray:
    """Return places on the y axis, from 0 at its lower end to 1."""
    scale = axes.yaxis.get_transform().transform
    low, high = scale(np.array(axes.get_ylim()))
    return (scale(np.asarray(values, float)) - low) / (high - low)


def separate_coincident(axes, drawn: Sequence) -> None:
    """Give curves that would hide each other alternating dashes, and points that would rings around each other."""
    curves = []
    for line in drawn:
        shares = _shares(axes, line.get_ydata())
        curves.append([point for point in zip(line.get_xdata(), shares.tolist(), strict=True) if np.isfinite(point[1])])
    for group in coincident(curves, tolerance=0.006):
        for member, index in enumerate(group):
            dashes, offset = alternating_dashes(member, len(group), 7)
            drawn[index].set_linestyle(dash_style(dashes, drawn[index].get_linewidth(), offset))
            drawn[index].set_dash_capstyle("butt")
            drawn[index].set_markersize(3.2 + 2 * (len(group) - 1 - member))


def _name_levels(axes, levels: Sequence[Level]) -> None:
    """Name levels to the right of the axes, as high as they are, and apart from each other."""
    if not levels:
        return
    axes.set_ylim(axes.get_ylim())
    height = 0.62 * axes.figure.bbox.height * 72 / axes.figure.dpi  # of the axes, about, in points
    places = spread(_shares(axes, [level.y for level in levels]).tolist(), 10.5 / height, 0.0, 1.0)
    for level, place in zip(levels, places, strict=True):
        axes.annotate(level.name, (1, place), xycoords="axes fraction", xytext=(4, 0), ha="left", va="center",
                      textcoords="offset points", color=level.color, fontsize=8, annotation_clip=False)  # fmt: skip


def legend(figure, handles: Sequence, fontsize: float = 8.0) -> None:
    """Name curves under the axes, in as many columns as there is room for."""
    if not handles:
        return
    longest = max(len(handle.get_label()) for handle in handles)
    room = figure.bbox.width * 72 / figure.dpi - 10
    columns = max(min(int(room / (0.54 * fontsize * longest + 34)), len(handles)), 1)
    figure.legend(handles=list(handles), loc="outside lower left", ncols=columns, handlelength=2.2, fontsize=fontsize,
                  columnspacing=1.4)  # fmt: skip


@functools.lru_cache(maxsize=256)
def line_chart(
    lines: tuple[Line, ...],
    x_label: str,
    y_label: str,
    levels: tuple[Level, ...] = (),
    log: bool = False,
    percent: bool = False,
    named: bool = True,
    size: tuple[float, float] = (5.4, 2.7),
    prefix: str = "chart",
) -> str:
    """Return a line chart as an `<svg>` element for the page. One whose data have not changed is not drawn again.

    Args:
        lines: the curves; a legend names them when there are several.
        x_label: under the axis.
        y_label: quantity and unit, above the axis.
        levels: horizontal lines to compare with.
        log: logarithmic y axis where all values allow it, and its title says so.
        percent: label the y axis, a share of one, in percent.
        named: name several curves; False where the page has a legend.
        size: width and height in inches; the page scales it.
        prefix: of the element ids, different for every chart of a page.
    """
    with style():
        figure = Figure(figsize=size, layout="constrained", facecolor="none", dpi=72)
        axes = figure.add_subplot()
        draw_lines(axes, lines, levels, x_label, y_label, log, percent, named)
        stream = io.StringIO()
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
        box, (low, high), height = axes.get_window_extent(), axes.get_xlim(), figure.bbox.height
    values = {"left": box.x0, "right": box.x1, "top": height - box.y1, "bottom": height - box.y0}
    values = {name: round(float(value), 1) for name, value in values.items()}
    values |= {"low": float(low), "high": float(high), "over": x_label, "percent": percent} | _values(lines, y_label)
    return _page_svg(stream.getvalue(), prefix, y_label, values)


def _values(lines: Sequence[Line], y_label: str) -> dict:
    """Return what the page's script shows under the pointer: x once where all curves share it."""
    lines = [line for line in lines if line.name or len(lines) == 1]
    shared = [_short(point[0]) for point in lines[0].points] if lines else []
    curves = []
    for line in lines:
        x = [_short(point[0]) for point in line.points]
        y = [_short(point[2]) for point in line.points]
        name = line.name or y_label.partition(",")[0]
        color = f"var({CSS_VARIABLES.get(line.color, line.color)})"
        curves.append({"run": line.run, "name": name, "color": color, "y": y} | ({} if x == shared else {"x": x}))
    return {"x": shared, "curves": curves}


def _short(value: float) -> float:
    short = float(f"{value:.5g}") if abs(value) < 1e5 else float(round(value))
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _page_svg(svg: str, prefix: str, label: str, values: dict) -> str:
    """Return the bare `<svg>` element, its ids made unique, its colors and font those of the page."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'<g id="run(\d+)-\d+">', r'<g data-run="\1">', svg)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{prefix}-", svg)
    # Hundredths of a point are enough for places, and half the size; labels keep their digits.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(?<=\d\.\d\d)\d+", "", tag[0]), svg)
    svg = svg.replace("'DejaVu Sans'", "var(--sans)")
    for color, variable in CSS_VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    data = f' data-chart="{html.escape(json.dumps(values, separators=(",", ":")))}"' if values["curves"] else ""
    focus = ' tabindex="0"' if data else ""
    say = html.escape(f"{label}; arrow keys read the values" if data else label)
    return f'{head} role="img"{focus} aria-label="{say}"{data}>{body}'


HEAT_MAP_COLUMNS = 200


def heat_map(values: np.ndarray) -> str:
    """Return a heat map as a PNG data URL: one pixel for each value, the first row on top.

    Colors go from -2 (the bluest) to 2. Loads over their mean are best shown as their log2: half and double the mean
    are equally far from balance.

    Args:
        values: [rows, columns]; of more than HEAT_MAP_COLUMNS, stretches are averaged. NaN is gray.
    """
    values = values.T
    if len(values) > HEAT_MAP_COLUMNS:
        values = np.stack([stretch.mean(axis=0) for stretch in np.array_split(values, HEAT_MAP_COLUMNS)])
    share = np.clip((values.T + 2) / 4, 0, 1)
    share = np.round(share * 32) / 32  # few colors make a small file
    pixels = (LOAD_COLORS(np.nan_to_num(share)) * 255).astype(np.uint8)
    pixels[np.isnan(share)] = (128, 128, 128, 255)
    stream = io.BytesIO()
    imsave(stream, pixels, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def color_ramp() -> str:
    """Return the heat maps' colors as a CSS gradient, low to high."""
    stops = [matplotlib.colors.to_hex(LOAD_COLORS(i / 8)) for i in range(9)]
    return f"linear-gradient(90deg, {', '.join(stops)})"


def ordered_colors(count: int, few: int = len(SERIES)) -> list[str]:
    """Return a color for each of `count` ordered curves: all different for a few, else gradual from blue to ocher."""
    if count <= few:
        return [SERIES[look(i)[0]] for i in range(count)]
    return [matplotlib.colors.to_hex(GRADUAL_COLORS(i / max(count - 1, 1))) for i in range(count)]


def save(figure: Figure, path: Path, kind: str) -> None:
    """Write a figure as `png`, `svg` or `pdf`; the PNG first where there are several, the others change its dots."""
    if kind == "png":
        FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
    elif kind == "pdf":
        FigureCanvasPdf(figure).print_pdf(path, metadata={"CreationDate": None})
    else:
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None, "Creator": None})
        fonts = "'DejaVu Sans', Verdana, sans-serif"  # the same widths where DejaVu is not installed
        path.write_text(path.read_text(encoding="utf-8").replace("'DejaVu Sans'", fonts), encoding="utf-8")


def write_png(
    path: Path,
    title: str,
    subtitle: str,
    panels: Sequence[tuple[str, Sequence[Line], Sequence[Level]]],
    x_label: str,
) -> None:
    """Write panels, each (y label, lines, levels), side by side as a PNG on white."""
    width = 5.2 * max(len(panels), 1)
    heading = textwrap.wrap(title, int(width * 8.5)) or [""]
    beside = len(heading) == 1 and 8.3 * len(title) + 5.6 * len(subtitle) < 72 * width - 20
    with style():
        figure = Figure(figsize=(width, 3.9), dpi=160, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        figure.suptitle("\n".join(heading + [""] * (not beside)), x=0.012, ha="left", fontsize=12, fontweight="bold")
        at = {"x": 0.988, "y": 0.975, "ha": "right"} if beside else {"x": 0.012, "y": 0.955 - 0.05 * len(heading)}
        figure.text(s=subtitle, va="top", color=MUTED, **at)
        parts = figure.subfigures(1, len(panels), squeeze=False)[0] if panels else []
        for part, (label, lines, levels) in zip(parts, panels, strict=True):
            draw_lines(part.add_subplot(), lines, levels, x_label, label)
        save(figure, path, "png")
