"""The style that all pictures share: colors everyone tells apart, labels that do not meet, curves that all show."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opendeep_jax.display import page as report_page
from opendeep_jax.display.chart_style import (
    PAPER,
    PAPER_DARK,
    SERIES,
    SERIES_DARK,
    alternating_dashes,
    coincident,
    look,
    spread,
    tick_labels,
)

# Machado, Oliveira and Fernandes (2009), full severity, on linear RGB.
EYES = {
    "all cones": np.eye(3),
    "no long cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.052]],
    "no middle cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no short cones": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}  # fmt: skip


def linear(color):
    share = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    """Ottosson's perceptual space: a distance of 0.02 is just seen."""
    to_cones = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
    to_lab = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("colors", [SERIES, SERIES_DARK], ids=["light", "dark"])
def test_colors_differ_for_every_kind_of_eyes(colors, eyes):
    seen = [oklab(np.array(EYES[eyes]) @ linear(color)) for color in colors]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.07


@pytest.mark.parametrize("colors, paper", [(SERIES, PAPER), (SERIES_DARK, PAPER_DARK)], ids=["light", "dark"])
def test_colors_stand_out_from_the_paper(colors, paper):
    light = [linear(color) @ (0.2126, 0.7152, 0.0722) + 0.05 for color in (paper, *colors)]
    assert min(max(light[0], one) / min(light[0], one) for one in light[1:]) >= 3  # WCAG 2.1, graphical objects


def test_pages_take_their_hues_from_the_same_palette():
    style = report_page.STYLE
    for colors in (SERIES, SERIES_DARK):
        assert f"--blue:{colors[0]}" in style or f"--s0:{colors[0]}" in style
        assert colors[1] in style and colors[2] in style and colors[3] in style
    assert len(re.findall(r"--page:", style)) == 2


def test_thirty_two_series_look_different():
    assert len({look(place) for place in range(32)}) == 32


RISING = [(float(x), x / 10) for x in range(60)]
NOISE = [(float(x), float(y)) for x, y in enumerate(np.random.default_rng(0).random(60))]
OTHER_NOISE = [(float(x), float(y)) for x, y in enumerate(np.random.default_rng(1).random(60))]


@pytest.mark.parametrize("curves, groups", [
    ([RISING, RISING, RISING], [[0, 1, 2]]),
    ([RISING, NOISE, RISING[::3]], [[0, 2]]),  # logged less often
    ([RISING[:30], RISING[:20] + [(x, y + 1) for x, y in RISING[20:]]], [[0, 1]]),  # a branch from a trunk
    ([RISING[:20], RISING[40:]], []),  # they never meet
    ([NOISE, OTHER_NOISE], []),  # crossing is not hiding
    ([RISING, [(x, y + 0.5) for x, y in RISING]], []),
    ([[(1.0, 2.0)], [(1.0, 2.0)], [(1.0, 3.0)]], [[0, 1]]),
    ([[], RISING, []], []),
])  # fmt: skip
def test_curves_that_hide_each_other_are_found(curves, groups):
    assert coincident(curves, tolerance=0.01) == groups


@pytest.mark.parametrize("size", [2, 3, 7, 60])
def test_every_place_of_equal_curves_shows_one_of_them_and_all_get_as_much(size):
    period = sum(alternating_dashes(0, size)[0])
    places = np.arange(0, period, period / (size * 8)) + period / (size * 16)
    shown = np.zeros((size, len(places)), bool)
    for member in range(size):
        (on, off), offset = alternating_dashes(member, size)
        assert on + off == pytest.approx(period)
        shown[member] = (places + offset) % period < on
    assert (shown.sum(axis=0) == 1).all() and (shown.sum(axis=1) == 8).all()


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.5))
def test_spread_labels_keep_their_distance_their_order_and_inside(places, gap):
    moved = spread(places, gap, 0.0, 1.0)
    order = sorted(range(len(places)), key=lambda i: places[i])
    least = min(gap, 1 / max(len(places) - 1, 1))
    steps = [moved[after] - moved[before] for before, after in itertools.pairwise(order)]
    assert all(step >= least - 1e-9 for step in steps) and all(-1e-9 <= place <= 1 + 1e-9 for place in moved)


def test_labels_with_room_stay_where_they_are():
    assert spread([0.5, 0.1, 0.9], 0.1, 0, 1) == [0.5, 0.1, 0.9]
    assert spread([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])


@pytest.mark.parametrize("values, percent, labels", [
    ([0.0, 0.025, 0.05], True, ["0%", "2.5%", "5%"]), ([0.072, 0.0721], True, ["7.2%", "7.21%"]),
    ([2.30001, 2.30002], False, ["2.30001", "2.30002"]), ([0, 5e5, 1e6], False, ["0", "500K", "1M"]),
    ([1e-4, 2.5e-4, 0.001], False, ["1e-4", "2.5e-4", "0.001"]), ([-1500.0, 0], False, ["-1,500", "0"]),
    ([1_234_500, 1_234_600], False, ["1,234,500", "1,234,600"]), ([1e300], False, ["1e300"]), ([], False, []),
])  # fmt: skip
def test_tick_labels_are_short_and_different(values, percent, labels):
    assert tick_labels(values, percent) == labels
