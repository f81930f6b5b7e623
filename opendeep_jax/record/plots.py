"""The report's pictures: line charts as SVG that follow the page's light or dark colours, heat maps and `loss.png`.

Figures are made and drawn without pyplot, so nothing outlives a call. matplotlib's settings belong to the process;
they are set for the length of a drawing, behind a lock.
"""

import base64
import contextlib
import io
import re
import textwrap
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullFormatter

from opendeep_jax.display.chart_style import LOG_SCALE, SERIES, coincident, look, spread, tick_labels, turns

INK, MUTED, GRID = "#20242a", "#6a7280", "#e4e6ea"
BLUE, ORANGE, GREEN, VIOLET = SERIES[:4]
# On the page each of these colours is a CSS variable, so that one SVG serves both the light and the dark theme.
CSS_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {hue: f"--s{i}" for i, hue in enumerate(SERIES)}
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
LOAD_COLOURS = LinearSegmentedColormap.from_list(
    "load", ["#123c7c", "#3f7fd6", "#a9c5e8", "#f1eee6", "#f3bd84", "#dd6a2c", "#8a1f1b"]
)
GRADUAL_COLOURS = LinearSegmentedColormap.from_list("gradual", ["#2f6bd8", "#8a4fd0", "#d0468f", "#e8743b", "#d9a02c"])
_lock = threading.Lock()


@dataclass(frozen=True)
class Line:
    """One curve: y over x, with NaN where there is nothing to show."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str = BLUE
    smooth: bool = False
    """Draw the values faintly and their moving average over them."""
    width: float = 1.6
    dots: bool = False
    """Mark each value; for curves with few of them."""
    dashes: tuple[float, ...] = ()
    """On and off lengths in points; none for a solid line."""


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with, and its name."""

    name: str
    y: float
    colour: str = MUTED


class Ticks(Formatter):
    """Labels of an axis, all with the digits that it takes to tell them apart; a share of one as percent if told so."""

    def __init__(self, percent: bool = False):
        self.percent = percent

    def __call__(self, value: float, pos: int | None = None) -> str:
        return tick_labels([value], self.percent)[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        return tick_labels([float(value) for value in values], self.percent)


@contextlib.contextmanager
def _style():
    with _lock, matplotlib.rc_context():
        matplotlib.rcdefaults()  # a person's own matplotlibrc must not change a report
        matplotlib.rcParams.update(STYLE)
        yield


def thin(x: np.ndarray, y: np.ndarray, points: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """At most about `points` of a series: each stretch keeps its smallest and largest value, so spikes stay visible."""
    if len(x) <= points:
        return x, y
    keep = []
    for stretch in np.array_split(np.arange(len(x)), points // 2):
        values = y[stretch]
        if np.all(np.isnan(values)):
            keep.append(stretch[0])
        else:
            keep += [stretch[np.nanargmin(values)], stretch[np.nanargmax(values)]]
    keep = np.unique(keep)
    return x[keep], y[keep]


def moving_average(y: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a fiftieth of the series; NaN are left out, ends use what is there."""
    half = len(y) // 100
    if half == 0:
        return y
    valid = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(valid, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(valid)])
    low, high = np.maximum(np.arange(len(y)) - half, 0), np.minimum(np.arange(len(y)) + half + 1, len(y))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def _draw_lines(
    axes, lines: Sequence[Line], levels: Sequence[Level], x_label: str, y_label: str, log: bool, percent: bool = False
) -> None:
    """Draws curves, and whatever names them outside the axes: no label lies on a line."""
    drawn = []
    for line in lines:
        x, y = thin(line.x, line.y)
        average = moving_average(line.y) if line.smooth else line.y
        if line.smooth and len(line.x) >= 100:
            axes.plot(x, y, color=line.colour, alpha=0.28, linewidth=0.8)
            x, y = thin(line.x, average)
        alone = np.isfinite(y).sum() == 1
        marker = "o" if line.dots or alone else ""
        style = (0, tuple(length / line.width for length in line.dashes)) if line.dashes else "-"
        drawn += axes.plot(x, y, color=line.colour, linewidth=line.width, label=line.name, marker=marker,
                           markersize=3.2, linestyle=style)  # fmt: skip
    for level in levels:
        axes.axhline(level.y, color=level.colour, linewidth=1.1, linestyle=(0, (4, 3)))
    low, high = axes.dataLim.y0, axes.dataLim.y1
    if high - low <= 1e-9 * abs(high) and high > 0:
        axes.set_ylim(0, 1.5 * high)  # a constant: its surroundings would all be labelled alike
    elif log:
        axes.set_yscale("log")
    log = axes.get_yscale() == "log"
    if log:
        axes.yaxis.set_minor_locator(LogLocator(10, range(1, 10)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, axis="y", which="minor", linewidth=0.35)
    steps = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)  # of a decade
    axes.yaxis.set_major_locator(LogLocator(10, steps) if log else MaxNLocator(5))
    axes.yaxis.set_major_formatter(Ticks(percent))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(Ticks())
    axes.set_xlabel(x_label)
    axes.set_title(y_label + LOG_SCALE * log, loc="left", fontsize=8.5, color=MUTED, pad=8)
    named = [line for line in drawn if not line.get_label().startswith("_")]
    legend(axes.figure, named if len(named) > 1 else [])  # before the turns, whose dashes it need not show
    take_turns(axes, drawn)
    _name_levels(axes, levels)


def _shares(axes, values) -> np.ndarray:
    """Places on the y axis, from 0 at its lower end to 1."""
    scale = axes.yaxis.get_transform().transform
    low, high = scale(np.array(axes.get_ylim()))
    return (scale(np.asarray(values, float)) - low) / (high - low)


def take_turns(axes, drawn: Sequence) -> None:
    """Gives curves that would hide each other alternating dashes, and points that would rings around each other."""
    curves = []
    for line in drawn:
        shares = _shares(axes, line.get_ydata())
        curves.append([point for point in zip(line.get_xdata(), shares.tolist(), strict=True) if np.isfinite(point[1])])
    for group in coincident(curves, tolerance=0.006):
        for member, index in enumerate(group):
            dashes, offset = turns(member, len(group), 7)
            width = drawn[index].get_linewidth()
            drawn[index].set_linestyle((offset / width, tuple(length / width for length in dashes)))
            drawn[index].set_dash_capstyle("butt")
            drawn[index].set_markersize(3.2 + 2 * (len(group) - 1 - member))


def _name_levels(axes, levels: Sequence[Level]) -> None:
    """Names levels to the right of the axes, as high as they are, and apart from each other."""
    if not levels:
        return
    axes.set_ylim(axes.get_ylim())
    height = 0.62 * axes.figure.bbox.height * 72 / axes.figure.dpi  # of the axes, about, in points
    places = spread(_shares(axes, [level.y for level in levels]).tolist(), 10.5 / height, 0.0, 1.0)
    for level, place in zip(levels, places, strict=True):
        axes.annotate(level.name, (1, place), xycoords="axes fraction", xytext=(4, 0), ha="left", va="center",
                      textcoords="offset points", color=level.colour, fontsize=8, annotation_clip=False)  # fmt: skip


def legend(figure, handles: Sequence, fontsize: float = 8.0) -> None:
    """Names curves under the axes, in as many columns as there is room for."""
    if not handles:
        return
    longest = max(len(handle.get_label()) for handle in handles)
    room = figure.bbox.width * 72 / figure.dpi - 10
    columns = max(min(int(room / (0.54 * fontsize * longest + 34)), len(handles)), 1)
    figure.legend(handles=list(handles), loc="outside lower left", ncols=columns, handlelength=2.2, fontsize=fontsize,
                  columnspacing=1.4)  # fmt: skip


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    levels: Sequence[Level] = (),
    log: bool = False,
    percent: bool = False,
    size: tuple[float, float] = (5.4, 2.7),
    prefix: str = "chart",
) -> str:
    """A line chart as an `<svg>` element for the page.

    Args:
        lines: the curves; a legend names them when there are several.
        x_label: under the axis.
        y_label: quantity and unit, above the axis.
        levels: horizontal lines to compare with.
        log: logarithmic y axis, and its title says so.
        percent: label the y axis, a share of one, in percent.
        size: width and height in inches; the page scales it.
        prefix: of the element ids, different for every chart of a page.
    """
    with _style():
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        _draw_lines(figure.add_subplot(), lines, levels, x_label, y_label, log, percent)
        stream = io.StringIO()
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
    return _page_svg(stream.getvalue(), prefix, y_label)


def _page_svg(svg: str, prefix: str, label: str) -> str:
    """The bare `<svg>` element, its ids made unique, its colours and font those of the page."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{prefix}-", svg)
    svg = svg.replace("'DejaVu Sans'", "var(--sans)")
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{label}">{body}'


def heat_map(values: np.ndarray, low: float, high: float, columns: int = 200) -> str:
    """A heat map as a PNG data URL: one pixel row per expert (the first on top), time to the right.

    Args:
        values: [time, experts]; longer than `columns` it is averaged over stretches of time. NaN is grey.
        low: value of the bluest colour.
        high: value of the reddest colour.
    """
    if len(values) > columns:
        values = np.stack([stretch.mean(axis=0) for stretch in np.array_split(values, columns)])
    share = np.clip((values.T - low) / (high - low), 0, 1)
    share = np.round(share * 32) / 32  # few colours make a small file
    pixels = (LOAD_COLOURS(np.nan_to_num(share)) * 255).astype(np.uint8)
    pixels[np.isnan(share)] = (128, 128, 128, 255)
    stream = io.BytesIO()
    imsave(stream, pixels, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def colour_ramp() -> str:
    """The heat maps' colours as a CSS gradient, low to high."""
    stops = [matplotlib.colors.to_hex(LOAD_COLOURS(i / 8)) for i in range(9)]
    return f"linear-gradient(90deg, {', '.join(stops)})"


def gradual_colour(rank: int, count: int) -> str:
    """A colour for one of many ordered things: blue for the first, over violet and pink, to ochre for the last."""
    return matplotlib.colors.to_hex(GRADUAL_COLOURS(rank / max(count - 1, 1)))


def ordered_looks(count: int) -> list[dict]:
    """Colour and dashes of each of `count` ordered curves: all different for a few, gradual for many."""
    if count > len(SERIES):
        return [{"colour": gradual_colour(i, count)} for i in range(count)]
    return [{"colour": SERIES[look(i)[0]]} for i in range(count)]


def write_png(
    path: Path,
    title: str,
    subtitle: str,
    panels: Sequence[tuple[str, Sequence[Line], Sequence[Level]]],
    x_label: str,
) -> None:
    """Writes panels, each (y label, lines, levels), side by side as a PNG on white."""
    width = 5.2 * max(len(panels), 1)
    heading = textwrap.wrap(title, int(width * 8.5)) or [""]
    beside = len(heading) == 1 and 8.3 * len(title) + 5.6 * len(subtitle) < 72 * width - 20
    with _style():
        figure = Figure(figsize=(width, 3.9), dpi=160, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        figure.suptitle("\n".join(heading + [""] * (not beside)), x=0.012, ha="left", fontsize=12, fontweight="bold")
        at = {"x": 0.988, "y": 0.975, "ha": "right"} if beside else {"x": 0.012, "y": 0.955 - 0.05 * len(heading)}
        figure.text(s=subtitle, va="top", color=MUTED, **at)
        parts = figure.subfigures(1, len(panels), squeeze=False)[0] if panels else []
        for part, (label, lines, levels) in zip(parts, panels, strict=True):
            _draw_lines(part.add_subplot(), lines, levels, x_label, label, log=False)
        FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
