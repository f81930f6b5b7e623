"""Charts of the watch page: labels beside curves, equal curves that all show, values for the script that reads them."""

import json
import re
from html import unescape
from xml.etree import ElementTree

import pytest

from opendeep_jax.jobs.watch.chart import BOTTOM, HEIGHT, RIGHT, TOP, WIDTH, Series, line_chart
from opendeep_jax.jobs.watch.page import SCRIPT, STYLE, live_page
from opendeep_jax.jobs.watch.run import Run
from opendeep_jax.record.metrics import to_json_line

BAD = "</script>\"><b>'&"


def curve(values, start=0):
    return [(float(start + i) * 4096, value * 0.9, value, value * 1.1) for i, value in enumerate(values)]


def parsed(svg):
    """The chart as XML; attributes without quotes get them."""
    quoted = re.sub(r"([\w-]+)=([^\s\"'>]+?)(?=[\s>]|/>)", r'\1="\2"', re.sub(r'="[^"]*"', _keep, svg))
    return ElementTree.fromstring(quoted.replace("\0", "="))


def _keep(match):
    return '="' + match[0][2:-1].replace("=", "\0") + '"'


CASES = {
    "falling": [3 + 6 / i for i in range(1, 60)], "tiny": [1e-9 * i for i in range(1, 9)],
    "huge": [1e12 + i for i in range(9)], "share": [0.07 + 0.001 * (i % 5) for i in range(40)],
    "constant": [2.5] * 10, "decades": [10.0**i for i in range(-6, 6)], "close": [2.30001, 2.30002, 2.300015],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"log": True}, {"percent": True, "band": True}], ids=str)
def test_no_label_lies_on_a_curve_or_outside_the_chart(case, options):
    svg = parsed(line_chart([Series("a", curve(CASES[case]), "red")], "quantity, unit", **options))
    boxes = []
    for text in svg.iter("text"):
        x, y, wide = float(text.get("x")), float(text.get("y")), 6.4 * len(text.text)
        x -= {"end": wide, "middle": wide / 2, None: 0}[text.get("text-anchor")]
        boxes.append((x, y - 9, x + wide, y + 2))
    assert len(boxes) >= 3 and all(0 <= x0 and x1 <= WIDTH and 0 <= y0 and y1 <= HEIGHT for x0, y0, x1, y1 in boxes)
    for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", svg.find("path[@class='line']").get("d")):
        x, y = float(x), float(y)
        assert TOP - 6 < y < HEIGHT - BOTTOM + 6 and x <= WIDTH - RIGHT + 0.1
        assert not any(x0 < x < x1 and y0 < y < y1 for x0, y0, x1, y1 in boxes)


def test_a_logarithmic_axis_says_so_and_a_linear_one_does_not():
    series = [Series("a", curve([1.0, 10.0, 100.0]), "red")]
    assert ">norm (log scale)<" in line_chart(series, "norm", log=True) and ">norm<" in line_chart(series, "norm")
    with_zero = [Series("a", curve([0.0, 1.0]), "red")]
    assert "log scale" not in line_chart(with_zero, "norm", log=True)


def test_equal_curves_take_turns_and_others_stay_solid():
    equal, other = curve(CASES["falling"]), curve([value + 1 for value in CASES["falling"]])
    svg = parsed(line_chart([Series(n, p, n) for n, p in zip("abc", (equal, other, equal), strict=True)], "loss"))
    a, b, c = svg.findall("path[@class='line']")
    assert a.get("stroke-dasharray") == c.get("stroke-dasharray") == "9 9" and b.get("stroke-dasharray") is None
    assert {a.get("stroke-dashoffset", "0"), c.get("stroke-dashoffset", "0")} == {"0", "9"}


def test_equal_points_are_rings_around_each_other():
    svg = parsed(line_chart([Series(n, curve([2.0]), n) for n in "abc"], "loss"))
    assert [float(circle.get("r")) for circle in svg.findall("circle")] == [7, 5, 3]


def test_a_chart_carries_every_value_under_the_names_of_the_runs():
    svg = parsed(line_chart([Series(BAD, curve([1.0, 2.0]), "red", 0), Series("b", curve([3.0, 4.0], 7), "tan", 1)],
                            "loss", over="tokens trained"))  # fmt: skip
    chart = json.loads(svg.get("data-chart"))
    assert [(one["name"], one["y"], one["run"]) for one in chart["curves"]] == [(BAD, [1, 2], 0), ("b", [3, 4], 1)]
    assert chart["x"] == [0, 4096] and chart["curves"][1]["x"] == [28672, 32768] and chart["over"] == "tokens trained"
    assert svg.get("tabindex") == "0" and svg.get("role") == "img" and "loss" in svg.get("aria-label")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = []
    for _ in range(10):
        workdir = tmp_path_factory.mktemp("run")
        same = {"mfu": 0.072, "tokens_per_second": 8e3}
        lines = ({"step": i, "tokens": i * 4096, "loss": 3 + 6 / i, "grad_norm": 1 / i} | same for i in range(1, 20))
        (workdir / "metrics.jsonl").write_text("".join(map(to_json_line, lines)))
        found.append(Run(workdir))
        found[-1].look()
    return found


def test_the_legend_hides_what_is_of_a_run_and_nothing_else(runs):
    labels = [f"run {i} {BAD}" for i in range(10)]
    page = live_page(runs, labels, every=5.0)
    buttons = re.findall(r"<button type=button data-run=(\d) aria-pressed=true>.*?</svg>(.*?)</button>", page)
    assert [(int(place), unescape(name)) for place, name in buttons] == list(enumerate(labels))
    for chart in re.findall(r"<svg[^>]* data-chart=.*?</svg>", page):
        assert re.findall(r"class=line data-run=(\d)", chart) == list("0123456789")
    looks = re.findall(r'<svg class=swatch [^>]*><path class=line (stroke="[^"]*"[^>]*?) d=', page)
    assert len(set(looks)) == 10 and looks[:10] == looks[10:]  # the table's, and the legend's


def test_mfu_has_one_unit_in_tile_and_axis(runs):
    page = live_page(runs[:1], ["a"], every=5.0)
    assert "MFU 7.2%" in page and re.search(r"text-anchor=end>7\.\d*%</text>", page)
    assert not re.search(r"text-anchor=end>0\.07\d*</text>", page)


def test_the_script_needs_nothing_and_cannot_be_closed_early(runs):
    script = SCRIPT.read_text(encoding="utf-8")
    assert not re.search(r"https?:|import |</|fetch\(|innerHTML|eval", script)
    assert script.count("{") == script.count("}") and script.count("(") == script.count(")")
    # What it looks up is there.
    page = live_page(runs[:2], ["a", "b"], every=5.0)
    assert "class=rule" in page and "class=legend" in page and "id=show-all" in page and ".off" in STYLE
    assert "data-every=5>" in page and page.count("<script") == 1
