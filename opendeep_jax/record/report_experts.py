"""The part of a report on experts: their loads, the routers' biases, the balance."""

import math

import numpy as np

from opendeep_jax.display import chart
from opendeep_jax.display.chart import BLUE, GREEN, ORANGE, VIOLET, Level, Line
from opendeep_jax.display.page import figure, grid, section, text
from opendeep_jax.record.files import number
from opendeep_jax.record.report_curves import captioned, run_points
from opendeep_jax.record.run_view import RunView

BIAS_LAYERS, BIAS_EXPERTS, BIAS_POINTS = 12, 16, 120
"""Layers with a chart of their biases, curves in it, their points."""


def routing(run: RunView, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return `load` (over its layer's mean) or `bias` of every expert: time [T], values [T, MoE layers, experts].

    Values that are not finite are NaN. Records of another shape than the last are left out.
    """
    records = [record for record in run.experts if record.get(key)]
    values = [_array(record[key]) for record in records]
    shape = values[-1].shape if values else ()
    kept = [i for i, value in enumerate(values) if value.ndim == 2 and value.shape == shape]
    stacked = np.stack([values[i] for i in kept]) if kept else np.zeros((0, 0, 0))
    return np.array(run.x_of([number(records[i].get("step")) or 0 for i in kept])), stacked


def _array(rows: list) -> np.ndarray:
    try:
        return np.array(rows, dtype=float)
    except (TypeError, ValueError):
        return np.empty(0)


def experts_section(run: RunView) -> str:
    """Return the section of a report on where the tokens went; empty for a dense model."""
    (when, load), (bias_when, bias) = routing(run, "load"), routing(run, "bias")
    layers = load.shape[1]
    names = _layer_names(run, max(layers, bias.shape[1]))
    peaks = [
        Line(names[i] if layers <= 8 else "", chart.points(when, load[:, i].max(axis=1)), color, width=1.2)
        for i, color in enumerate(chart.ordered_colors(layers))
    ]
    peaks = peaks or [Line("", run_points(run, "expert_load_max_over_mean"), smooth=True)]
    ranges = [("highest", "router_bias_max", ORANGE), ("lowest", "router_bias_min", BLUE)]
    small = [("balance", "balance_loss", BLUE), ("z", "z_loss", VIOLET)]
    balanced = (Level("perfect balance", 1.0, GREEN),)
    auxiliary = "The balance loss before its weight: each router adds 1 when balanced. The z loss with its weight."
    busiest = "The busiest expert of each layer" + ", from the first (blue) to the last (ocher)" * (layers > 8) + "."
    # Every bias has a chart of its own below, where they were logged.
    range_lines = [Line(name, run_points(run, key), color) for name, key, color in ranges * (not len(bias))]
    small_lines = [Line(name, run_points(run, key), color, smooth=True) for name, key, color in small]
    overview = grid(
        captioned([run], peaks, "peak", "largest load over the mean", busiest, levels=balanced),
        captioned([run], range_lines, "biases", "router bias", "Range over all layers and experts."),
        captioned([run], small_lines, "small", "auxiliary losses", auxiliary),
    )
    introduction = (
        "Where the tokens went. After each step the bias of an expert that got less than its share rises, and of one "
        "that got more falls; it takes part in the choice of experts, not in their weights."
    )
    maps, charts = _load_maps(load, names), _bias_charts(run, bias_when, bias, load, names)
    return section("Experts", introduction * bool(overview), overview, maps, charts)


def _layer_names(run: RunView, count: int) -> list[str]:
    """Return layers as the model counts them, from 0 and with the dense ones; the one beyond the last is MTP's."""
    model = run.settings.get("model")
    model = model if isinstance(model, dict) else {}
    first, end = model.get("num_dense_layers", 0), model.get("num_layers", 10**9)
    return [f"Layer {first + i}" if first + i < end else "MTP module" for i in range(count)]


def _log2(load) -> np.ndarray:
    """Return loads so that half and double the mean are equally far from balance."""
    return np.log2(np.maximum(load, 2.0**-9))


def _load_maps(load: np.ndarray, names: list[str]) -> str:
    if not len(load):
        return ""
    ramp = f'<i style="background:{chart.color_ramp()}"></i>'
    scale = f"<p class=ramp><span>a quarter of the mean</span>{ramp}<span>four times</span></p>"
    pictures = (
        figure(
            f'<img alt="{text(names[i])}: load of every expert over time" src="{chart.heat_map(_log2(load[:, i]).T)}">',
            names[i],
        )
        for i in range(load.shape[1])
    )
    title = "<h3>Load of every expert</h3><p class=lead>A row for each expert, time to the right.</p>"
    return title + scale + grid(*pictures, small=True)


def load_image(run: RunView, label: str) -> str:
    """Return the expert loads of the last log of one of several runs."""
    width = max(map(len, run.load))
    padded = np.array([[*row, *[math.nan] * (width - len(row))] for row in run.load])
    caption = f"{label}: a row for each of {len(run.load)} layers, a column for each of {width} experts; blue is below"
    image = f'<img class=loads alt="{text(label)}: load of every expert" src="{chart.heat_map(_log2(padded))}">'
    return figure(image, caption + " the mean load, red above.")


def _bias_charts(run: RunView, when: np.ndarray, bias: np.ndarray, load: np.ndarray, names: list[str]) -> str:
    if not np.any(np.nan_to_num(bias)):
        return ""
    layers, experts = bias.shape[1:]
    shown = _spread(layers, BIAS_LAYERS)
    same = load.shape[1:] == bias.shape[1:]
    early = load[: 1 + len(load) // 20].mean(axis=0) if same else np.zeros((layers, experts))
    times = _spread(len(when), BIAS_POINTS)
    charts = []
    for layer in shown:
        # From the idlest to the busiest expert of the first steps: the biases must fan out in the opposite order.
        chosen = np.argsort(early[layer], kind="stable")[_spread(experts, BIAS_EXPERTS)]
        colors = chart.ordered_colors(len(chosen), few=0)
        lines = [
            Line("", chart.points(when[times], bias[times, layer, expert]), color, width=0.9)
            for expert, color in zip(chosen, colors, strict=True)
        ]
        charts.append(captioned([run], lines, f"bias{layer}", "router bias", names[layer], size=(3.2, 1.9)))
    lead = "Blue to ocher: from the idlest to the busiest expert at the start."
    if layers > BIAS_LAYERS or experts > BIAS_EXPERTS:
        lead += f" {len(shown)} of {layers} layers, {min(experts, BIAS_EXPERTS)} of {experts} experts in each."
    return f"<h3>Router biases</h3><p class=lead>{lead}</p>{grid(*charts, small=True)}"


def _spread(count: int, limit: int) -> list[int]:
    """Return at most `limit` indices below `count`, evenly spread, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, limit))})
