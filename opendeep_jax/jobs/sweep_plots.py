"""A sweep's pictures: the metric against each axis, against compute, and every run's curve; in the report's style."""

import math
import re
import statistics
from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from opendeep_jax.config.files import replacing
from opendeep_jax.jobs.sweep_axes import Axis, shown, value_of
from opendeep_jax.jobs.sweep_plan import Sweep
from opendeep_jax.jobs.sweep_results import TITLES, Row, ranked, settings
from opendeep_jax.train.metrics import EVALUATION, SCALARS, read_jsonl
from opendeep_jax.train.plots import BLUE, MUTED, STYLE, gradual_colour, moving_average
from opendeep_jax.train.progress import human_count
from opendeep_jax.train.run_files import column

WIDE = 10.0
"""An axis whose values span more than so many times gets a logarithmic scale."""
MOST_NAMES = 10
"""Curves that a legend names."""
CURVES = (
    (SCALARS, "lm_loss", "training loss, nats/token"),
    (EVALUATION, "held_out_bits_per_byte", "held-out bits/byte"),
)
"""File, field and title of the curves of a run that are drawn."""
CURVE_POINTS = 2000
"""Lines of a run's record that are read for its curve."""


def write_pictures(sweep: Sweep, table: Sequence[Row]) -> list[str]:
    """Writes axes.png, compute.png and curves.png into the sweep's directory; returns the names of those that have
    something to show."""
    measured = [row for row in table if row.numbers]
    if not measured:
        return []
    pictures = {"axes.png": axes_figure(sweep, measured), "compute.png": compute_figure(sweep, measured)}
    pictures["curves.png"] = curves_figure(sweep, measured)
    for name, figure in pictures.items():
        with replacing(sweep.directory / name) as path:
            FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
    return list(pictures)


def axes_figure(sweep: Sweep, table: Sequence[Row]) -> Figure:
    """A panel for each axis: every run as a dot; lines join means of combinations that differ in that axis alone."""
    with matplotlib.rc_context(STYLE):
        columns = min(len(sweep.axes), 3)
        lines = math.ceil(len(sweep.axes) / columns)
        figure = _figure(columns, lines)
        for number, axis in enumerate(sweep.axes, 1):
            panel = figure.add_subplot(lines, columns, number)
            _draw_axis(panel, sweep, table, axis)
            _label(panel, axis.field, TITLES[sweep.metric])
        return figure


def compute_figure(sweep: Sweep, table: Sequence[Row]) -> Figure:
    """The metric against a run's training FLOPs: dots for runs, and a line along the best for each amount."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(1.4, 1)
        panel = figure.add_subplot()
        for row in table:
            panel.plot([row.flops] * len(row.numbers), row.numbers, "o", color=BLUE, alpha=0.35, markersize=4)
        best: list[Row] = []
        for row in sorted((row for row in table if row.complete), key=lambda row: (row.flops, row.mean)):
            if not best or row.mean < best[-1].mean:
                best.append(row)
        panel.plot([row.flops for row in best], [row.mean for row in best], color=BLUE, marker="o", markersize=4)
        _scale(panel, [row.flops for row in table], lambda value, _: f"{value:.3g}")
        if panel.get_xscale() == "linear":
            panel.xaxis.set_major_locator(MaxNLocator(4))
        for row in best[:MOST_NAMES]:  # what is on the line, above it and towards the middle
            far = row.flops > statistics.fmean(panel.get_xlim())
            name = panel.annotate(settings(row, sweep), (row.flops, row.mean), xytext=(-8 if far else 8, 7),
                                  textcoords="offset points", ha="right" if far else "left", fontsize=6.5,
                                  color=MUTED)  # fmt: skip
            name.set_in_layout(False)
        panel.margins(x=0.12)
        _label(panel, "training FLOPs", TITLES[sweep.metric])
        return figure


def curves_figure(sweep: Sweep, table: Sequence[Row]) -> Figure:
    """Every run's curve over tokens, blue for the best combination, over violet, to orange for the last."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(2, 1)
        order = ranked(table)
        for number, (file, key, title) in enumerate(CURVES, 1):
            panel = figure.add_subplot(1, 2, number)
            for rank, row in enumerate(order):
                for index, (x, y) in enumerate(_curves(row, file, key)):
                    name = settings(row, sweep) if index == 0 and len(order) <= MOST_NAMES else None
                    colour, marker = gradual_colour(rank, len(order)), "o" if len(x) < 12 else ""
                    panel.plot(x, y, color=colour, linewidth=1.2, alpha=0.85, label=name, marker=marker, markersize=3)
            panel.xaxis.set_major_locator(MaxNLocator(5))
            panel.xaxis.set_major_formatter(
                FuncFormatter(lambda value, _: re.sub(r"\.?0+(?=[A-Z])", "", human_count(value)))
            )
            _label(panel, "tokens", title)
            if number == 1 and panel.get_legend_handles_labels()[1]:
                panel.legend(loc="best", fontsize=7, handlelength=1.4)
        return figure


def _curves(row: Row, file: str, key: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for result in row.results:
        records = read_jsonl(result.run.workdir / file, limit=CURVE_POINTS)
        x, y = column(records, "tokens"), column(records, key)
        if np.isfinite(y).any():
            yield x, moving_average(y)


def _draw_axis(panel, sweep: Sweep, table: Sequence[Row], axis: Axis) -> None:
    values = [value_of(row.config, axis.field) for row in table]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if numbers:
        places = {value: value for value in values}
        _scale(panel, list(places), lambda value, _: f"{value:.4g}")
        if len(places) <= 6:
            panel.set_xticks(sorted(places))
            panel.xaxis.set_minor_locator(NullLocator())
    else:
        places = {value: place for place, value in enumerate(sorted(set(values), key=str))}
        panel.set_xticks(list(places.values()), [shown(value) for value in places])
    groups: dict[str, list[Row]] = {}
    for row in table:
        others = [other for other in sweep.axes if other is not axis]
        key = ", ".join(f"{other.alias}={shown(value_of(row.config, other.field))}" for other in others)
        groups.setdefault(key, []).append(row)
    joined = sum(len(group) > 1 for group in groups.values())
    for number, (name, group) in enumerate(groups.items()):
        colour = gradual_colour(number, len(groups)) if joined else BLUE
        group = sorted(group, key=lambda row: places[value_of(row.config, axis.field)])
        x = [places[value_of(row.config, axis.field)] for row in group]
        for place, row in zip(x, group, strict=True):
            panel.plot([place] * len(row.numbers), row.numbers, "o", color=colour, alpha=0.4, markersize=4)
        if len(group) > 1:
            means = [statistics.fmean(row.numbers) for row in group]
            panel.plot(x, means, color=colour, label=name if joined <= MOST_NAMES else None)
    if joined > 1 and joined <= MOST_NAMES:
        panel.legend(loc="best", fontsize=7, handlelength=1.4)
    panel.margins(x=0.08)


def _scale(panel, values: Sequence[float], text) -> None:
    if min(values) > 0 and max(values) > WIDE * min(values):
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_major_formatter(FuncFormatter(text))


def _figure(columns: float, lines: int) -> Figure:
    figure = Figure(figsize=(4.6 * columns, 3.3 * lines), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    return figure


def _label(panel, x_label: str, title: str) -> None:
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.5g}"))
    panel.set_xlabel(x_label)
    panel.set_title(title, loc="left", fontsize=8.5, color=MUTED, pad=8)
