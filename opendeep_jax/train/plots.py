"""The report's pictures: line charts as SVG that follow the page's light or dark colours, heat maps and `loss.png`.

Figures are made and drawn without pyplot, so nothing outlives a call. matplotlib's settings belong to the process;
they are set for the length of a drawing, behind a lock.
"""

import base64
import contextlib
import io
import re
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
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from opendeep_jax.train.progress import human_count

INK, MUTED, GRID = "#20242a", "#6a7280", "#e4e6ea"
BLUE, ORANGE, GREEN, VIOLET, RED = "#2f6bd8", "#d9622b", "#2a9468", "#8657c9", "#d03a4a"
# On the page each of these colours is a CSS variable, so that one SVG serves both the light and the dark theme.
CSS_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid",
    BLUE: "--blue", ORANGE: "--orange", GREEN: "--green", VIOLET: "--violet", RED: "--red",
}  # fmt: skip
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8.5, "svg.fonttype": "none", "svg.hashsalt": "opendeep",
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
GRADUAL_COLOURS = LinearSegmentedColormap.from_list("gradual", [BLUE, VIOLET, ORANGE])
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


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with, and its name."""

    name: str
    y: float
    colour: str = MUTED


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


def _draw_lines(axes, lines: Sequence[Line], levels: Sequence[Level], x_label: str, y_label: str, log: bool) -> None:
    for line in lines:
        x, y = thin(line.x, line.y)
        average = moving_average(line.y) if line.smooth else line.y
        if line.smooth and len(line.x) >= 100:
            axes.plot(x, y, color=line.colour, alpha=0.28, linewidth=0.8)
            x, y = thin(line.x, average)
        alone = np.isfinite(y).sum() == 1
        marker = "o" if line.dots or alone else ""
        axes.plot(x, y, color=line.colour, linewidth=line.width, label=line.name, marker=marker, markersize=3.2)
    for level in levels:
        axes.axhline(level.y, color=level.colour, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.annotate(level.name, (1, level.y), xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right",
                      textcoords="offset points", color=level.colour, fontsize=8)  # fmt: skip
    low, high = axes.dataLim.y0, axes.dataLim.y1
    if high - low <= 1e-9 * abs(high) and high > 0:
        axes.set_ylim(0, 1.5 * high)  # a constant: its surroundings would all be labelled alike
    elif log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)) if axes.get_yscale() == "log" else MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.set_xlabel(x_label)
    axes.set_title(y_label, loc="left", fontsize=8.5, color=MUTED, pad=8)
    if len([line for line in lines if line.name]) > 1:
        axes.legend(loc="best", ncols=2 if len(lines) > 4 else 1, handlelength=1.4)


def _tick(value: float) -> str:
    if 10_000 <= abs(value) < 1e15:
        return re.sub(r"\.?0+(?=[A-Z])", "", human_count(value))
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.4g}"


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    levels: Sequence[Level] = (),
    log: bool = False,
    size: tuple[float, float] = (5.4, 2.7),
    prefix: str = "chart",
) -> str:
    """A line chart as an `<svg>` element for the page.

    Args:
        lines: the curves; a legend names them when there are several.
        x_label: under the axis.
        y_label: quantity and unit, above the axis.
        levels: horizontal lines to compare with.
        log: logarithmic y axis.
        size: width and height in inches; the page scales it.
        prefix: of the element ids, different for every chart of a page.
    """
    with _style():
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        _draw_lines(figure.add_subplot(), lines, levels, x_label, y_label, log)
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
    """A colour for one of `count` ordered things: blue for the first, over violet, to orange for the last."""
    return matplotlib.colors.to_hex(GRADUAL_COLOURS(rank / max(count - 1, 1)))


def write_png(
    path: Path,
    title: str,
    subtitle: str,
    panels: Sequence[tuple[str, Sequence[Line], Sequence[Level]]],
    x_label: str,
) -> None:
    """Writes panels, each (y label, lines, levels), side by side as a PNG on white."""
    with _style():
        figure = Figure(figsize=(5.2 * max(len(panels), 1), 3.7), dpi=160, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
        figure.text(0.988, 0.975, subtitle, ha="right", va="top", color=MUTED)
        for number, (label, lines, levels) in enumerate(panels, 1):
            _draw_lines(figure.add_subplot(1, len(panels), number), lines, levels, x_label, label, log=False)
        FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
