"""Curves of runs as captioned charts of a page."""

from collections.abc import Iterable, Sequence

from opendeep_jax.display import chart
from opendeep_jax.display.chart import BLUE, Line
from opendeep_jax.display.chart_style import SERIES, look
from opendeep_jax.display.page import figure
from opendeep_jax.record.run_view import HELD_OUT, POINTS, RunView

POINTS_OF_ALL = 2400
"""Points of all runs' curves in a chart together, so that a page of a hundred runs stays small."""


def run_points(run: RunView, key: str, count: int = POINTS) -> tuple[chart.Point, ...]:
    """Return a curve of a run; empty for a number that is zero throughout: it is switched off."""
    curve = run.held_out if key == HELD_OUT else run.curves.get(key)
    found = tuple(curve.points(count)) if curve is not None else ()
    return found if any(least or most for _, least, _, most in found) else ()


def over(runs: Iterable[RunView]) -> str:
    """Return what the charts' x axis counts."""
    return "tokens trained" if any(run.last.get("tokens") for run in runs) else "step"


def captioned(runs: Sequence[RunView], lines: Iterable[Line], name: str, label: str, caption: str, **options) -> str:
    """Return a captioned chart; empty when there is nothing to draw."""
    lines = tuple(line for line in lines if line.points)
    return figure(chart.line_chart(lines, over(runs), label, prefix=name, **options), caption) if lines else ""


def number_chart(
    runs: Sequence[RunView], labels: Sequence[str], key: str, label: str, caption: str, color: str = BLUE, **options
) -> str:
    """Return a chart of one number of all runs: of one run smoothed, of several in the runs' own looks."""
    if len(runs) == 1:
        dots = key == HELD_OUT
        line = Line("", run_points(runs[0], key), color, smooth=not dots, dots=dots and len(runs[0].held_out) < 60)
        return captioned(runs, [line], key, label, caption, **options)
    count = min(POINTS, max(POINTS_OF_ALL // len(runs), 12))
    lines = [
        Line(
            name,
            run_points(run, key, count),
            SERIES[look(place)[0]],
            dashes=look(place)[1],
            run=place,
            smooth=key != HELD_OUT,
        )
        for place, (run, name) in enumerate(zip(runs, labels, strict=True))
    ]
    return captioned(runs, lines, key, label, caption, named=False, **options | {"levels": ()})
