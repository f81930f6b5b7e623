"""Charts of a page: labels beside curves, equal curves that all show, values for the script that reads them."""

import json
import re
from html import unescape
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from opendeep_jax.display import chart
from opendeep_jax.display.chart import Level, Line, heat_map, line_chart, moving_average, points
from opendeep_jax.display.page import SCRIPT, STYLE, page, runs_legend

BAD = "</script>\"><b>'&"
X = np.arange(1.0, 61.0)


def line(name, y, color=chart.BLUE, **more):
    return Line(name, points(X[: len(y)], y), color, **more)


def drawn(lines, levels=(), **options):
    """Return a chart's axes with everything at its place, and the boxes of its level labels and legend, in pixels."""
    with chart.style():
        figure = Figure(figsize=(5.4, 2.7), layout="constrained")
        axes = figure.add_subplot()
        chart.draw_lines(axes, lines, levels, "step", "loss, nats", **options)
        FigureCanvasAgg(figure).draw()
        labels = [text.get_window_extent() for text in axes.texts]
        return axes, labels, [legend.get_window_extent() for legend in figure.legends]


def values(svg):
    return json.loads(unescape(re.search(r'data-chart="([^"]*)"', svg)[1]))


@pytest.mark.parametrize("levels", [[1.0], [2.6, 2.52], [2.0, 2.0, 2.0], [1e-3, 1e3], [0.13, 9.9]], ids=str)
@pytest.mark.parametrize("log", [False, True])
def test_names_of_levels_and_curves_stand_beside_the_axes_and_apart(levels, log):
    lines = [line(f"curve {i}", 10 / X**i + 1e-3, chart.SERIES[i]) for i in range(1, 7)]
    axes, labels, legends = drawn(lines, [Level("perfect balance", y) for y in levels], log=log)
    inside, paper = axes.get_window_extent(), axes.figure.bbox
    assert len(labels) == len(levels) and len(legends) == 1
    for box in [*labels, *legends]:
        assert not inside.overlaps(box) and paper.x0 <= box.x0 < box.x1 <= paper.x1 and paper.y0 - 1 <= box.y0
    heights = sorted((box.y0, box.y1) for box in labels)
    assert all(below[1] <= above[0] + 2 for below, above in zip(heights, heights[1:], strict=False))
    assert inside.height > 60 and inside.width > 150  # and the chart has room left


def test_a_logarithmic_axis_says_so():
    assert "(log scale)" in drawn([line("", 10 / X)], log=True)[0].get_title(loc="left")
    assert "(log scale)" not in drawn([line("", 10 / X)])[0].get_title(loc="left")
    assert "(log scale)" not in drawn([line("", X - 1)], log=True)[0].get_title(loc="left")  # with a zero
    narrow = drawn([line("", np.linspace(0.7, 4.3, 60))], log=True)[0]
    assert sum(0.7 <= tick <= 4.3 for tick in narrow.get_yticks()) >= 4
    constant = drawn([line("", np.full(60, 2.0))], log=True)[0]  # drawn linearly, from zero
    assert "(log scale)" not in constant.get_title(loc="left") and constant.get_ylim()[0] == 0


def test_labels_of_a_page_keep_all_their_digits():
    svg = line_chart((line("", np.linspace(0.0, 0.01, 30)),), "step", "learning rate")
    assert {">0.0025<", ">0.0075<"} <= set(re.findall(r">[\d.]+<", svg))
    assert not re.search(r'd="[^"]*\d\.\d{3}', svg)


def test_equal_curves_take_turns_and_others_stay_solid():
    axes, _, _ = drawn([line("a", 1 / X), line("b", 1 / X, chart.ORANGE), line("c", 2 / X, chart.GREEN)])
    a, b, c = axes.lines
    assert a.get_linestyle() == b.get_linestyle() == "--" and c.get_linestyle() == "-"
    assert a._dash_pattern[0] != b._dash_pattern[0]


def test_equal_points_are_rings_around_each_other():
    sizes = [one.get_markersize() for one in drawn([line(name, [2.0]) for name in "abc"])[0].lines]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_a_spike_does_not_flatten_the_rest_and_stretches_are_shaded():
    spiky = Line("", tuple((float(i), 0.5, 1.0 + (i % 5) / 10 if i != 150 else 1e4, 2.0) for i in range(300)))
    axes, _, _ = drawn([spiky])
    assert axes.get_ylim()[1] < 3 and len(axes.collections) == 1


def test_a_curve_stays_inside_its_axes_where_its_highest_part_is_not_far_from_the_rest():
    steady = 5.0 + np.arange(60) % 2
    axes, _, _ = drawn([line("a", np.where(np.arange(60) == 20, 6.8, steady)), line("b", steady)])
    assert axes.get_ylim()[1] > 6.8


@pytest.mark.parametrize(
    "y", [[0.0, 0.0], [-3.0, 5.0], [1e-12, 1e12], [1e300, -1e300], [7.0, 7.0], [0.3, 0.30001], [5.0], [2.30001] * 9]
)
@pytest.mark.parametrize("log", [False, True])
def test_charts_of_odd_numbers_are_drawn(y, log):
    svg = line_chart((line("a", y, smooth=True),), "step", "x", log=log)
    assert ElementTree.fromstring(svg.replace("xlink:href", "href")).tag.endswith("svg")
    assert not re.search(r"\b(nan|inf)\b", svg) and svg.count("<text") >= 2


def test_what_is_not_finite_is_no_point():
    assert points([1, 2, 3], [1.0, float("nan"), float("inf")]) == ((1.0, 1.0, 1.0, 1.0),)


def test_a_chart_carries_every_value_under_the_names_of_the_runs():
    later = tuple((x + 7, *rest) for x, *rest in points(X[:2], [3.0, 4.0]))
    svg = line_chart((line(BAD, [1.0, 2.0]), Line("b", later, chart.ORANGE, run=1)), "tokens trained", "loss")
    found = values(svg)
    assert [(one["name"], one["y"], one["run"]) for one in found["curves"]] == [(BAD, [1, 2], 0), ("b", [3, 4], 1)]
    assert found["x"] == [1, 2] and found["curves"][1]["x"] == [8, 9] and found["over"] == "tokens trained"
    assert 'tabindex="0"' in svg and 'role="img"' in svg and 'aria-label="loss; arrow keys read the values"' in svg
    assert re.findall(r'<g data-run="(\d)">', svg) == ["0", "1"] and BAD not in svg
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    assert 0 < found["left"] < found["right"] <= width and 0 < found["top"] < found["bottom"] < height


def test_the_same_chart_is_drawn_once():
    line_chart.cache_clear()
    for _ in range(3):
        line_chart((line("a", 1 / X),), "step", "loss")
    assert line_chart.cache_info().misses == 1


def test_the_legend_has_a_button_for_each_run_that_looks_like_its_curves():
    labels = [f"run {i} {BAD}" for i in range(10)]
    buttons = re.findall(r"<button type=button data-run=(\d) aria-pressed=true>(.*?</svg>)(.*?)</button>",
                         runs_legend(labels))  # fmt: skip
    assert [(int(place), unescape(name)) for place, _, name in buttons] == list(enumerate(labels))
    assert len({swatch for _, swatch, _ in buttons}) == 10 and runs_legend(["one"]) == ""


def test_the_script_needs_nothing_and_cannot_be_closed_early():
    script = SCRIPT.read_text(encoding="utf-8")
    assert not re.search(r"import |</|fetch\(|innerHTML|eval", script)
    assert [url for url in re.findall(r"https?:[^\"]*", script)] == ["http://www.w3.org/2000/svg"]  # a name, no link
    assert script.count("{") == script.count("}") and script.count("(") == script.count(")")
    assert ".off" in STYLE and ".rule" in STYLE and ".values" in STYLE
    with_chart = page("a", line_chart((line("a", 1 / X),), "step", "loss"), reload_seconds=5)
    assert "data-every=5>" in with_chart and with_chart.count("<script") == 1
    assert "<script" not in page("a", "<p>no chart</p>")


def test_a_heat_map_is_a_small_png():
    loads = np.random.default_rng(0).random((16, 1000))
    loads[3, 5] = np.nan
    assert heat_map(loads).startswith("data:image/png;base64,") and len(heat_map(loads)) < 20_000


def test_the_moving_average_of_a_straight_line_is_the_line():
    y = np.linspace(0, 10, 1001)
    assert np.allclose(moving_average(y)[20:-20], y[20:-20], atol=0.01)
