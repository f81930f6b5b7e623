"""`report.html` and `loss.png` of a run: a pure function of the files in its work directory.

A run that is still going, has died, or has only just begun gives a report of what is there.
"""

import json
from pathlib import Path

import numpy as np

from opendeep_jax.config.files import replacing, write_atomically
from opendeep_jax.display.numbers import human_bytes, human_count, human_time
from opendeep_jax.display.page import bars, details, figure, page, section, table, text, tiles
from opendeep_jax.record import plots
from opendeep_jax.record.lineage import lineage
from opendeep_jax.record.plots import BLUE, GREEN, MUTED, ORANGE, VIOLET, Level, Line
from opendeep_jax.record.report_events import events_section, goodput_section
from opendeep_jax.record.run_files import RunFiles, column, is_number, read_run

COMPRESSORS = (("gzip\u00a0-9", "gzip_bits_per_byte", ORANGE), ("xz\u00a0-9", "xz_bits_per_byte", GREEN))
BIAS_LAYERS, BIAS_EXPERTS, BIAS_POINTS = 12, 16, 120  # layers with a chart of their biases, curves in it, their points


def write_report(workdir: str | Path) -> Path:
    """Writes report.html and loss.png into `workdir` from the files there; returns the path of report.html.

    Both are replaced atomically. Raises OSError when the directory cannot be written.
    """
    run = read_run(workdir)
    sections = [
        _headline(run),
        _learning(run),
        _speed(run),
        goodput_section(run.goodput),
        events_section(run.events),
        _experts(run),
        _samples(run),
        _configuration(run),
    ]
    document = page(f"{run.name}: run report", "".join(sections))
    report = run.workdir / "report.html"
    write_atomically(report, document)
    with replacing(run.workdir / "loss.png") as picture:
        _loss_png(run, picture)
    return report


# Curves


def _line(run: RunFiles, name: str, key: str, colour: str = BLUE, records: list[dict] | None = None, **style) -> Line:
    records = [record for record in (run.steps if records is None else records) if key in record]
    return Line(name, run.time(records), column(records, key), colour, **style)


def _present(lines: list[Line]) -> list[Line]:
    """The lines with something to show: a loss that is zero throughout is switched off."""
    return [line for line in lines if np.any(np.nan_to_num(line.y))]


def _loss_lines(run: RunFiles) -> list[Line]:
    lines = [
        _line(run, "next token", "lm_loss", BLUE, smooth=True),
        _line(run, "multi-token prediction", "mtp_loss", VIOLET, smooth=True),
        _line(run, "total", "loss", MUTED, smooth=True, width=1.2),
    ]
    return _present(lines)


def _held_out_lines(run: RunFiles) -> list[Line]:
    few = len(run.evaluations) < 60
    return _present([_line(run, "held-out text", "held_out_bits_per_byte", BLUE, run.evaluations, dots=few)])


def _compressors(run: RunFiles) -> list[Level]:
    found = ((name, run.number(key, run.evaluations), colour) for name, key, colour in COMPRESSORS)
    return [Level(name, value, colour) for name, value, colour in found if value is not None]


def _time_label(run: RunFiles) -> str:
    return "tokens trained" if run.has_tokens else "step"


def _chart(run: RunFiles, name: str, label: str, caption: str, lines: list[Line], **options) -> str:
    """A captioned chart; empty when there is nothing to draw."""
    lines = _present(lines)
    return figure(plots.line_chart(lines, _time_label(run), label, prefix=name, **options), caption) if lines else ""


def _grid(*figures: str, small: bool = False) -> str:
    body = "".join(figures)
    return f'<div class="grid{" small" * small}">{body}</div>' if body else ""


def _loss_png(run: RunFiles, path: Path) -> None:
    losses, held_out = _loss_lines(run), _held_out_lines(run)
    panels = [("loss, nats per token", losses, [])] if losses else []
    panels += [("held-out bits per byte", held_out, _compressors(run))] if held_out else []
    parameters, active = run.number("parameters"), run.number("active_parameters")
    sizes = f"{human_count(parameters)} parameters" if parameters else ""
    sizes += f", {human_count(active)} active per token" if parameters and active else ""
    title = run.name if panels else f"{run.name}: nothing logged yet"
    plots.write_png(path, title, sizes, panels, _time_label(run))


# Sections


def _headline(run: RunFiles) -> str:
    step = max((int(record["step"]) for record in run.steps if is_number(record.get("step"))), default=0)
    train = run.config.get("train")
    planned = train.get("steps") if isinstance(train, dict) else 0
    if _is_finished(run):
        status = f"Finished after {run.number('steps'):,} steps."
    else:
        status = f"Not finished: the last logged step is {step:,}" + (f" of {planned:,}." if planned else ".")
    if ancestry := lineage(run.origin):
        status += f" Began with: {ancestry}."
    head = f"<h1>{text(run.name)}</h1><p class=status>{text(status)}</p>"
    numbers = tiles(_headline_numbers(run))
    return f"<header><div class=kicker>OpenDeep</div>{head}</header>{_warning(run)}{_verdict(run)}{numbers}"


def _is_finished(run: RunFiles) -> bool:
    steps = run.number("steps")
    return steps is not None and all(record.get("step", 0) <= steps for record in run.steps[-1:])


def _warning(run: RunFiles) -> str:
    bad = [record for record in run.steps + run.evaluations if record.get("non_finite")]
    if not bad:
        return ""
    names = ", ".join(f"{name} was {value}" for name, value in bad[0]["non_finite"].items())
    lines = "1 logged line has" if len(bad) == 1 else f"{len(bad)} logged lines have"
    message = f"{lines} numbers that are not finite. The first, at step {bad[0].get('step')}: {names}."
    return f"<p class=warning>{text(message)}</p>"


def _verdict(run: RunFiles) -> str:
    bits = run.number("held_out_bits_per_byte", run.evaluations)
    if bits is None:
        return ""
    levels = _compressors(run)
    better = " and ".join(level.name for level in levels if bits < level.y)
    worse = " and ".join(level.name for level in levels if bits >= level.y)
    sentence = f"Text it has never seen takes this model {bits:.3f} bits per byte"
    sentence += f", fewer than {better}" if better else ""
    sentence += f", not yet fewer than {worse}" if worse else ""
    rows = [("this model", bits, "model"), *((level.name, level.y, "") for level in levels)]
    return f"<div class=hero><p>{text(sentence)}.</p>{bars(sorted(rows, key=lambda row: row[1]))}</div>"


def _headline_numbers(run: RunFiles) -> list[tuple[str, str, str]]:
    loss, mfu = run.number("final_loss"), column(run.steps, "mfu")
    seconds, active = run.number("seconds", run.steps), run.number("active_parameters")
    utilisation = f"median MFU {_median(mfu):.1%}" if np.isfinite(mfu).any() else ""
    rows = [
        ("Final loss", loss, "{:.3f}".format, "nats per token, all terms"),
        ("Loss", run.number("loss", run.steps) if loss is None else None, "{:.3f}".format, "nats per token, all terms"),
        (
            "Tokens trained",
            run.number("tokens", run.steps),
            human_count,
            f"in {human_time(seconds)}" if seconds else "",
        ),
        ("Tokens per second", run.number("tokens_per_second", run.steps), "{:,.0f}".format, utilisation),
        ("Parameters", run.number("parameters"), human_count, f"{human_count(active)} per token" if active else ""),
        ("Peak memory", run.number("peak_memory_bytes"), human_bytes, ""),
    ]
    return [(label, form(value), remark) for label, value, form, remark in rows if value is not None]


def _median(values: np.ndarray) -> float:
    return float(np.median(values[np.isfinite(values)]))


def _learning(run: RunFiles) -> str:
    rate = [_line(run, "", "learning_rate")]
    norm = [_line(run, "", "grad_norm", smooth=True)]
    unseen = "Bits needed for a byte of text the model never saw. Lower is better, whatever the tokenizer."
    charts = _grid(
        _chart(run, "loss", "loss, nats per token", "Training loss; the total holds every term.", _loss_lines(run)),
        _chart(run, "unseen", "held-out bits per byte", unseen, _held_out_lines(run), levels=_compressors(run)),
        _chart(run, "rate", "learning rate", "The schedule as it was applied.", rate),
        _chart(run, "norm", "gradient norm", "Global norm before clipping; it shows trouble first.", norm, log=True),
    )
    return section("Learning", "", charts)


def _speed(run: RunFiles) -> str:
    speed = [_line(run, "", "tokens_per_second", smooth=True)]
    mfu, shares = [_line(run, "", "mfu", GREEN, smooth=True)], column(run.steps, "mfu")
    median = [Level(f"median {_median(shares):.1%}", _median(shares))] if np.isfinite(shares).any() else []
    utilization = "Model FLOPs utilization: the share of the hardware’s peak that the model’s arithmetic used."
    charts = _grid(
        _chart(run, "speed", "tokens per second", "Training alone; evaluations and checkpoints don’t count.", speed),
        _chart(run, "mfu", "MFU, percent of the hardware’s peak", utilization, mfu, levels=median, percent=True),
    )
    return section("Speed", "", charts)


def _experts(run: RunFiles) -> str:
    (time, load), (bias_time, bias) = run.routing("load"), run.routing("bias")
    layers = load.shape[1]
    names = _layer_names(run, max(layers, bias.shape[1]))
    peaks = [
        Line(names[i] if layers <= 8 else "", time, load[:, i].max(axis=1), **style, width=1.2)
        for i, style in enumerate(plots.ordered_looks(layers))
    ]
    peaks = peaks or [_line(run, "", "expert_load_max_over_mean", smooth=True)]
    ranges = [_line(run, "highest", "router_bias_max", ORANGE), _line(run, "lowest", "router_bias_min", BLUE)]
    small = [_line(run, "balance", "balance_loss", smooth=True), _line(run, "z", "z_loss", VIOLET, smooth=True)]
    balanced = [Level("perfect balance", 1.0, GREEN)]
    auxiliary = "The balance loss before its weight: each router adds 1 when balanced. The z loss with its weight."
    busiest = "The busiest expert of each layer" + ", from the first (blue) to the last (ochre)" * (layers > 8) + "."
    overview = _grid(
        _chart(run, "peak", "largest load over the mean", busiest, peaks, levels=balanced),
        # Every bias has a chart of its own below, where they were logged.
        _chart(run, "biases", "router bias", "Range over all layers and experts.", [] if len(bias) else ranges),
        _chart(run, "small", "auxiliary losses", auxiliary, small),
    )
    introduction = (
        "Where the tokens went. After each step the bias of an expert that got less than its share rises, and of one "
        "that got more falls; it takes part in the choice of experts, not in their weights."
    )
    return section("Experts", introduction * bool(overview), overview, _load_maps(load, names),
                   _bias_charts(run, bias_time, bias, load, names))  # fmt: skip


def _layer_names(run: RunFiles, count: int) -> list[str]:
    """Layers as the model counts them, from 0 and with the dense ones; the one beyond the last is MTP's."""
    model = run.config.get("model")
    model = model if isinstance(model, dict) else {}
    first, end = model.get("num_dense_layers", 0), model.get("num_layers", 10**9)
    return [f"Layer {first + i}" if first + i < end else "MTP module" for i in range(count)]


def _load_maps(load: np.ndarray, names: list[str]) -> str:
    if not len(load):
        return ""
    # In log2 half and double the mean load are equally far from balance.
    maps = np.log2(np.maximum(load, 2.0**-9))
    ramp = f'<i style="background:{plots.colour_ramp()}"></i>'
    legend = f"<p class=ramp><span>a quarter of the mean</span>{ramp}<span>four times</span></p>"
    images = (plots.heat_map(maps[:, i], -2, 2) for i in range(load.shape[1]))
    pictures = (
        figure(f'<img alt="{text(names[i])}: load of every expert over time" src="{image}">', names[i])
        for i, image in enumerate(images)
    )
    title = "<h3>Load of every expert</h3><p class=lead>A row for each expert, time to the right.</p>"
    return title + legend + _grid(*pictures, small=True)


def _bias_charts(run: RunFiles, time: np.ndarray, bias: np.ndarray, load: np.ndarray, names: list[str]) -> str:
    if not np.any(np.nan_to_num(bias)):
        return ""
    layers, experts = bias.shape[1:]
    shown = _spread(layers, BIAS_LAYERS)
    early = (
        load[: 1 + len(load) // 20].mean(axis=0) if load.shape[1:] == bias.shape[1:] else np.zeros((layers, experts))
    )
    charts = []
    for layer in shown:
        # From the idlest to the busiest expert of the first steps: the biases must fan out in the opposite order.
        chosen = np.argsort(early[layer], kind="stable")[_spread(experts, BIAS_EXPERTS)]
        lines = [
            Line(
                "",
                *plots.thin(time, bias[:, layer, expert], BIAS_POINTS),
                plots.gradual_colour(i, len(chosen)),
                width=0.9,
            )
            for i, expert in enumerate(chosen)
        ]
        charts.append(_chart(run, f"bias{layer}", "router bias", names[layer], lines, size=(3.2, 1.9)))
    lead = "Blue to ochre: from the idlest to the busiest expert at the start."
    if layers > BIAS_LAYERS or experts > BIAS_EXPERTS:
        lead += f" {len(shown)} of {layers} layers, {min(experts, BIAS_EXPERTS)} of {experts} experts in each."
    return f"<h3>Router biases</h3><p class=lead>{lead}</p>{_grid(*charts, small=True)}"


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` indices below `count`, evenly spread, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, limit))})


def _samples(run: RunFiles) -> str:
    by_prompt: dict[str, list[dict]] = {}
    for record in run.samples:
        by_prompt.setdefault(str(record.get("prompt", "")), []).insert(0, record)
    parts = []
    for prompt, (latest, *earlier) in by_prompt.items():
        title = f"{len(earlier)} earlier, from “{prompt.strip()}”"
        parts += [_sample(latest), details(title, "".join(map(_sample, earlier)))]
    return section("What it writes", "Texts sampled along the way, after the prompt in blue.", *parts)


def _sample(record: dict) -> str:
    prompt, continuation = str(record.get("prompt", "")), str(record.get("text", ""))
    written = f"<pre><mark>{text(prompt)}</mark>{text(continuation.removeprefix(prompt))}</pre>"
    return f"<div class=sample><span>step {text(record.get('step', '?'))}</span>{written}</div>"


def _configuration(run: RunFiles) -> str:
    groups = {name: value for name, value in run.config.items() if isinstance(value, dict)}
    rest = {name: value for name, value in run.config.items() if name not in groups}
    nested = {name: value for name, value in run.summary.items() if isinstance(value, dict)}
    numbers = {name: value for name, value in run.summary.items() if name not in nested}
    environment = run.environment | nested.pop("environment", {})
    return section(
        "Configuration",
        "Nothing else decided what this run computed.",
        details("Difference from the recipe", f"<pre>{text(run.diff)}</pre>" if run.diff.strip() else "", is_open=True),
        details("Run", table(_flatten(rest))),
        *(details(name.capitalize(), table(_flatten(group))) for name, group in groups.items()),
    ) + section(
        "Record",
        "",
        details("Summary", table(_flatten(numbers | nested))),
        details("Environment", table(_flatten(environment))),
        details("Origin", table(_flatten(run.origin))),
    )


def _flatten(tree: dict, prefix: str = "") -> list[tuple[str, object]]:
    rows = []
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            rows += _flatten(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows
