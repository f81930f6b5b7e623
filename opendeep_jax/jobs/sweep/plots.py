"""A sweep's pictures: the metric against each axis, against compute, and every combination's curve, as PNG, SVG, PDF.

Colors and dashes are those of the report. Points are means over seeds, bars and bands their spread; names stand outside
the axes. A combination keeps its color, that of its rank, in `compute` and `curves`.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from opendeep_jax.config.files import replacing
from opendeep_jax.display.chart import (
    MUTED,
    Line,
    Point,
    Ticks,
    dash_style,
    draw_lines,
    legend,
    moving_average,
    save,
    style,
)
from opendeep_jax.display.chart_style import LOG_SCALE, SERIES, look, spread
from opendeep_jax.jobs.sweep.axes import Axis, format_value, value_of
from opendeep_jax.jobs.sweep.plan import Sweep
from opendeep_jax.jobs.sweep.results import TITLES, Row, ranked, settings
from opendeep_jax.record.files import EVALUATION, METRICS, number, read_jsonl

WIDE = 10.0
"""An axis whose values span more than so many times gets a logarithmic scale."""
MOST_NAMES = 24
"""Curves that a legend names."""
CURVES = (
    (METRICS, "lm_loss", "training loss, nats/token"),
    (EVALUATION, "held_out_bits_per_byte", "held-out bits/byte"),
)
"""File, field and title of the curves of a run that are drawn."""
CURVE_POINTS = 2000
"""Lines of a run's record that are read for its curve."""
FORMATS = ("png", "svg", "pdf")
"""PNG for a look, SVG for a page, PDF for a paper."""


def write_pictures(sweep: Sweep, table: Sequence[Row]) -> list[str]:
    """Write axes, compute and curves as .png, .svg and .pdf into the sweep's directory.

    Returns:
        The names of the PNG files; none where no run has a result.
    """
    if not any(row.numbers for row in table):
        return []
    figures = {"axes": axes_figure, "compute": compute_figure, "curves": curves_figure}
    with style():
        for name, draw in figures.items():
            figure = draw(sweep, table)
            for kind in FORMATS:  # the PNG first: the others leave 72 dots per inch behind
                with replacing(sweep.directory / f"{name}.{kind}") as path:
                    save(figure, path, kind)
    return [f"{name}.png" for name in figures]


def axes_figure(sweep: Sweep, table: Sequence[Row]) -> Figure:
    """Return a figure with a panel per axis: means with bars over seeds, joined where only that axis differs."""
    table = [row for row in table if row.numbers]
    with style():
        columns = min(len(sweep.axes), 3)
        lines = math.ceil(len(sweep.axes) / columns)
        figure = _figure(columns, lines + 0.25)
        parts = figure.subfigures(lines, columns, squeeze=False).flat
        for axis, part in zip(sweep.axes, parts, strict=False):
            panel = part.add_subplot()
            names = _draw_axis(panel, sweep, table, axis)
            _label(panel, axis.field, TITLES[sweep.metric], _seeds(table))
            legend(part, names if len(names) > 1 else [], 7)
        return figure


def compute_figure(sweep: Sweep, table: Sequence[Row]) -> Figure:
    """Return a figure of the metric against FLOPs: a dot for each run, and the best for each amount by their ranks."""
    table = [row for row in table if row.numbers]
    with style():
        figure = _figure(1.5, 1.25)
        panel = figure.add_subplot()
        for row in table:
            panel.plot([row.flops] * len(row.numbers), row.numbers, "o", color=MUTED, alpha=0.4, markersize=3.5)
        best: list[tuple[int, Row]] = []
        complete = [(rank, row) for rank, row in enumerate(ranked(table), 1) if row.complete]
        for rank, row in sorted(complete, key=lambda pair: (pair[1].flops, pair[1].mean)):
            if not best or row.mean < best[-1][1].mean:
                best.append((rank, row))
        panel.plot([row.flops for _, row in best], [row.mean for _, row in best], color=MUTED, linewidth=1.2)
        names = []
        for rank, row in best:
            hue = SERIES[look(rank - 1)[0]]
            _bar(panel, row.flops, row, hue, marker=None)
            for marker, size, color in (("o", 12, hue), (f"${rank}$", 6 + 2 * (rank > 9), "white")):
                panel.plot([row.flops], [row.mean], marker=marker, markersize=size, color=color, zorder=5,
                           markeredgewidth=0)  # fmt: skip
            name = f"{rank}: {settings(row, sweep)}"
            names.append(Line2D([], [], marker="o", linestyle="", markersize=7, color=hue, label=name))
        _scale(panel, [row.flops for row in table])
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}".replace("e+", "e")))
        if panel.get_xscale() == "linear":
            panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.margins(x=0.08, y=0.08)
        _label(panel, "training FLOPs", TITLES[sweep.metric], _seeds(table))
        legend(figure, names[:MOST_NAMES], 7)
        return figure


def curves_figure(sweep: Sweep, table: Sequence[Row]) -> Figure:
    """Return a figure of each mean curve and the band of its seeds, over tokens; ranks at the ends, named below."""
    order = ranked([row for row in table if row.numbers])
    with style():
        rows = math.ceil(min(len(order), MOST_NAMES) / 3)
        figure = _figure(2, 1 + 0.05 * rows)
        names = []
        for place, (file, key, title) in enumerate(CURVES, 1):
            panel = figure.add_subplot(1, 2, place)
            lines, ranks = [], []
            for rank, row in sorted(enumerate(order), reverse=True):  # the best on top
                color, dashes = SERIES[look(rank)[0]], look(rank)[1]
                if points := _band(row, file, key, shaded=rank < len(SERIES)):  # of more, bands would hide the curves
                    lines.append(Line("", points, color, width=1.4, dots=len(points) < 12, dashes=dashes))
                    ranks.append((str(rank + 1) if row.complete else "-", color))
            draw_lines(panel, lines)
            which = " of the best 8" * (len(order) > len(SERIES))
            _label(panel, "tokens", title, _seeds(order, f"bands: least to largest{which}"))
            _name_ends(panel, [line.points[-1][2] for line in lines], ranks)
            if place == 1:
                names = [_name(rank, row, sweep) for rank, row in enumerate(order[:MOST_NAMES])]
        if len(order) > MOST_NAMES:
            names.append(Line2D([], [], linestyle="", label=f"and {len(order) - MOST_NAMES} more, in results.md"))
        legend(figure, names, 7)
        return figure


def _name(rank: int, row: Row, sweep: Sweep) -> Line2D:
    hue, dashes = look(rank)
    label = f"{rank + 1 if row.complete else '-'}: {settings(row, sweep)}"
    return Line2D([], [], color=SERIES[hue], linewidth=1.4, linestyle=dash_style(dashes, 1.4), label=label)


def _name_ends(panel, last: Sequence[float], ranks: Sequence[tuple[str, str]]) -> None:
    """Write ranks right of the axes, at the heights of their curves' ends but apart from each other."""
    panel.set_ylim(panel.get_ylim())
    low, high = panel.get_ylim()
    ends = [(value - low) / (high - low) for value in last]
    # Many ranks go into as many columns as it takes, neighbors into different ones.
    columns = math.ceil(len(ends) / 24)
    places = [0.0] * len(ends)
    order = sorted(range(len(ends)), key=lambda i: ends[i])
    for column_of in range(columns):
        chosen = order[column_of::columns]
        for i, place in zip(chosen, spread([ends[i] for i in chosen], 0.041, 0.0, 1.0), strict=True):
            places[i] = place
    for position, i in enumerate(order):
        panel.annotate(ranks[i][0], (1, places[i]), xycoords="axes fraction", ha="left", va="center",
                       xytext=(4 + 13 * (position % columns), 0), textcoords="offset points", fontsize=6.5,
                       color=ranks[i][1], annotation_clip=False)  # fmt: skip


def _band(row: Row, file: str, key: str, shaded: bool) -> tuple[Point, ...]:
    """Return (tokens, least, mean, largest) over the seeds of a combination, as far as all of them go."""
    curves = []
    for result in row.results:
        records = read_jsonl(result.run.workdir / file, limit=CURVE_POINTS)
        pairs = [(number(record.get("tokens")), number(record.get(key))) for record in records]
        if pairs := [pair for pair in pairs if None not in pair]:
            x, y = np.array(pairs, float).T
            curves.append((x, moving_average(y)))
    if not curves:
        return ()
    x = min((x for x, _ in curves), key=lambda x: x[-1])
    values = np.stack([np.interp(x, other, y) for other, y in curves])
    mean = values.mean(axis=0)
    low, high = (values.min(axis=0), values.max(axis=0)) if shaded else (mean, mean)
    return tuple(zip(*(part.tolist() for part in (x, low, mean, high)), strict=True))


def _bar(panel, x: float, row: Row, color: str, marker: str | None = "o") -> None:
    """Draw a combination's mean and sample standard deviation; hollow where runs of it have no result."""
    mean = statistics.fmean(row.numbers)
    error = None if math.isnan(row.spread) else row.spread
    face = color if row.complete else "white"
    panel.errorbar([x], [mean], yerr=error, color=color, marker=marker, markersize=5, markerfacecolor=face, capsize=3,
                   elinewidth=1.3, zorder=4)  # fmt: skip


def _seeds(table: Sequence[Row], bars: str = "bars: standard deviation") -> str:
    """Return the caption on seeds, their spread, and runs without results."""
    counts = sorted({len(row.numbers) for row in table})
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    words = "one seed" if counts == [1] else f"mean of {number} seeds, {bars}"
    left_out = sum(len(row.results) - len(row.numbers) for row in table)
    return words + (f"; hollow: {left_out} without result" if left_out else "")


def _draw_axis(panel, sweep: Sweep, table: Sequence[Row], axis: Axis) -> list[Line2D]:
    """Draw one panel; return the names of its lines for a legend."""
    values = [value_of(row.config, axis.field) for row in table]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if numbers:
        places = {value: float(value) for value in values}
        _scale(panel, list(places.values()))
        if len(places) <= 6:
            panel.xaxis.set_major_locator(FixedLocator(sorted(places.values())))
            panel.xaxis.set_minor_locator(NullLocator())
    else:
        places = {value: float(place) for place, value in enumerate(sorted(set(values), key=str))}
        panel.set_xticks(list(places.values()), [format_value(value) for value in places])
    groups: dict[str, list[Row]] = {}
    for row in table:
        others = [other for other in sweep.axes if other is not axis]
        key = ", ".join(f"{other.alias}={format_value(value_of(row.config, other.field))}" for other in others)
        groups.setdefault(key, []).append(row)
    joined = any(len(group) > 1 for group in groups.values())
    shift = _shift(panel, sorted(places.values()), len(groups))
    names = []
    for which, (name, group) in enumerate(groups.items()):
        hue, dashes = look(which) if joined else (0, ())
        color = SERIES[hue]
        group = sorted(group, key=lambda row: places[value_of(row.config, axis.field)])
        x = [shift(places[value_of(row.config, axis.field)], which) for row in group]
        for place, row in zip(x, group, strict=True):
            panel.plot([place] * len(row.numbers), row.numbers, "o", color=color, alpha=0.3, markersize=3.5,
                       markeredgewidth=0)  # fmt: skip
            _bar(panel, place, row, color)
        whole = [(place, row.mean) for place, row in zip(x, group, strict=True) if row.complete]
        if len(group) > 1:
            look_of = {"color": color, "linewidth": 1.4, "linestyle": dash_style(dashes, 1.4)}
            if whole:
                panel.plot(*zip(*whole, strict=True), **look_of)
            names.append(Line2D([], [], label=name, **look_of))
    panel.margins(x=0.08)
    if len(names) > MOST_NAMES:
        names = [*names[:MOST_NAMES], Line2D([], [], linestyle="", label=f"and {len(names) - MOST_NAMES} more")]
    return names


def _shift(panel, places: Sequence[float], groups: int):
    """Return how to set groups a little apart along x, so that equal values stand beside each other."""
    log = panel.get_xscale() == "log"
    scale = [math.log10(place) for place in places] if log else list(places)
    gaps = [after - before for before, after in zip(scale, scale[1:], strict=False)]
    room = min(0.3 * min(gaps), 0.025 * (groups - 1) * sum(gaps)) if gaps else 0.0

    def shift(place: float, group: int) -> float:
        by = room * (group / (groups - 1) - 0.5) if groups > 1 else 0.0
        return place * 10**by if log else place + by

    return shift


def _scale(panel, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) > WIDE * min(values):
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(10))
        panel.xaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_major_formatter(Ticks())


def _figure(columns: float, lines: float) -> Figure:
    figure = Figure(figsize=(4.6 * columns, 3.3 * lines), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    return figure


def _label(panel, x_label: str, title: str, seeds: str) -> None:
    panel.yaxis.set_major_formatter(Ticks())
    panel.set_xlabel(x_label + LOG_SCALE * (panel.get_xscale() == "log"))
    panel.set_title(f"{title}\n{seeds}", loc="left", fontsize=8, color=MUTED, pad=8)
