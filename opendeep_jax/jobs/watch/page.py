"""The page of `opendeep watch --html=FILE`: one file that needs nothing else and reloads itself while a run goes on."""

import datetime
import math
import time
from collections.abc import Sequence
from pathlib import Path

from opendeep_jax.config.schedule import stages
from opendeep_jax.display.chart_style import look
from opendeep_jax.display.numbers import human_time
from opendeep_jax.display.page import figure, page, section, text, tiles
from opendeep_jax.jobs.watch.chart import Series, line_chart, load_image
from opendeep_jax.jobs.watch.files import POINTS
from opendeep_jax.jobs.watch.run import Run, tokens_text
from opendeep_jax.record.report_events import events_section, goodput_bar, goodput_legend, goodput_section

POINTS_OF_ALL = 2400
"""Points of all runs' curves in a chart together, so that a page of a hundred runs stays small."""
IMAGES = 24
"""So many runs have a picture of their expert loads."""

CHARTS = (
    ("loss", "loss, nats per token", "Training loss, all terms. Shaded: least to largest.", {"band": True}),
    ("grad_norm", "gradient norm", "Global norm before clipping.", {"log": True, "band": True}),
    ("tokens_per_second", "tokens per second", "Training alone; evaluations and checkpoints don’t count.", {}),
    ("mfu", "MFU, percent of the hardware’s peak", "Model FLOPs utilization.", {"percent": True}),
    ("learning_rate", "learning rate", "The schedule as it was applied.", {}),
)

STYLE = """<style>
.tile b{font-size:20px;white-space:nowrap}
svg .grid{stroke:var(--grid);fill:none}svg .line{fill:none;stroke-width:1.7;stroke-linejoin:round}
svg text{fill:var(--muted);font:11px var(--sans)}svg .rule{stroke:var(--muted);stroke-dasharray:2 2;fill:none}
figure{position:relative}svg[data-chart]{touch-action:pan-y;outline:none}
svg[data-chart]:focus-visible,.legend button:focus-visible{
outline:2px solid var(--blue);outline-offset:2px}
.values{position:absolute;top:34px;z-index:2;pointer-events:none;background:var(--card);border:1px solid var(--grid);
border-radius:8px;box-shadow:0 3px 14px #0003;padding:6px 10px;font-size:12px;line-height:1.5;max-width:78%}
.values[hidden],.off,.legend button[hidden]{display:none}.values b{font-weight:550;color:var(--muted)}
.values div{display:flex;align-items:baseline;gap:0}.values .dot{flex:none}
.values span{overflow-wrap:anywhere;flex:1;line-height:1.3}
.values em{font-style:normal;font-variant-numeric:tabular-nums;padding-left:12px;font-weight:600}
.legend button{font:inherit;color:inherit;background:none;border:0;border-radius:6px;padding:4px 6px;margin:0 -6px;
cursor:pointer;text-align:left;overflow-wrap:anywhere}.legend button:hover{color:var(--ink)}
.legend button[aria-pressed=false]{opacity:.45;text-decoration:line-through}
.swatch{display:inline-block;vertical-align:middle;width:26px;height:8px;flex:none}.swatch .line{stroke-width:2.6}
.legend .swatch,.values .swatch{margin-right:7px}
#show-all{color:var(--blue)}@media(pointer:coarse){.legend button{padding:10px 6px}}
@media(max-width:520px){svg text{font-size:14px}}
.runs{overflow-x:auto}.runs table{min-width:720px}.runs td{white-space:nowrap;padding:6px 14px 6px 0;width:auto}
.runs td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:170px;padding-left:36px;position:relative}
.runs td svg{position:absolute;left:0;top:12px}
.runs th{width:auto;padding-right:14px;white-space:nowrap}
.s-running{color:var(--green)}.s-quiet{color:var(--red)}.s-stopped{color:var(--orange)}.s-finished{color:var(--blue)}
.phases{position:relative;margin-bottom:14px}.phases i{gap:2px}.phases u{background:var(--blue);opacity:.35}
.phases u.now{opacity:1}
figure img.loads{height:auto;min-height:40px;max-height:220px}
</style>"""

RELOAD = "<noscript><meta http-equiv=refresh content={seconds}></noscript>"
SCRIPT = Path(__file__).with_name("page.js")


def live_page(runs: Sequence[Run], labels: Sequence[str], every: float, now: float | None = None) -> str:
    """The page as HTML. It reloads itself every `every` seconds, rounded up, until all runs are finished.

    Args:
        now: seconds since 1970; the present by default.
    """
    now = time.time() if now is None else now
    many = len(runs) > 1
    title = f"{len(runs)} runs" if many else labels[0]
    going_on = not all(run.is_finished for run in runs)
    written = datetime.datetime.fromtimestamp(now, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    status = f"As of {written} UTC." + (" The page reloads itself." if going_on else " Nothing is left to wait for.")
    events = [event | {"run": label} for run, label in zip(runs, labels, strict=True) for event in run.events]
    events.sort(key=lambda event: str(event.get("time", "")))
    body = (
        f"<header><div class=kicker>OpenDeep</div><h1>{text(title)}</h1><p class=status>{status}</p></header>",
        _table(runs, labels, now) if many else _tiles(runs[0], now),
        _curves(runs, labels),
        _goodput(runs, labels),
        "" if many else _phase(runs[0]),  # the table has it
        _experts(runs, labels),
        events_section(events, names=many),
    )
    seconds = max(math.ceil(every), 1) if going_on else 0
    script = f"<script data-every={seconds}>{SCRIPT.read_text(encoding='utf-8')}</script>"
    reload = RELOAD.format(seconds=seconds) if going_on else ""
    return page(f"{title}: watch", "".join(body) + script, STYLE + reload)


def colour(place: int) -> str:
    """Return the CSS color of a run; after eight runs they begin anew, with other dashes."""
    return f"var(--s{look(place)[0]})"


def _curves(runs: Sequence[Run], labels: Sequence[str]) -> str:
    loss, *rest = CHARTS
    held_out = _chart(runs, labels, "", "held-out bits per byte", "Text the model never saw; lower is better.")
    charts = [_chart(runs, labels, *loss[:3], **loss[3]), held_out]
    charts += [_chart(runs, labels, key, name, caption, **options) for key, name, caption, options in rest]
    grid = "".join(charts)
    lead = f"Over {_over(runs)}."
    if len(runs) > 1:
        lead += " Curves that coincide take turns in dashes. Click a name to hide its run, with Shift the others."
    return section("Curves", lead, _legend(labels) * bool(grid), grid and f"<div class=grid>{grid}</div>")


def _over(runs: Sequence[Run]) -> str:
    return "tokens trained" if any(run.last.get("tokens") for run in runs) else "steps"


def _chart(runs: Sequence[Run], labels: Sequence[str], key: str, name: str, caption: str, **options) -> str:
    points = min(POINTS, max(POINTS_OF_ALL // len(runs), 12))
    curves = [run.curves[key] if key else run.held_out for run in runs]
    series = [
        Series(label, curve.points(points), colour(place), place, look(place)[1])
        for place, (label, curve) in enumerate(zip(labels, curves, strict=True))
    ]
    picture = line_chart(series, name, over=_over(runs), **options)
    return figure(picture, caption) if picture else ""


def _legend(labels: Sequence[str]) -> str:
    if len(labels) == 1:
        return ""
    names = "".join(
        f"<button type=button data-run={place} aria-pressed=true>{_swatch(place)}{text(label)}</button>"
        for place, label in enumerate(labels)
    )
    return f"<div class=legend>{names}<button type=button id=show-all hidden>Show all</button></div>"


def _swatch(place: int) -> str:
    dashes = look(place)[1]
    style = f' stroke-dasharray="{" ".join(f"{length:g}" for length in dashes)}"' if dashes else ""
    line = f'<path class=line stroke="{colour(place)}"{style} d="M0 4H26"/>'
    return f'<svg class=swatch viewBox="0 0 26 8" aria-hidden=true>{line}</svg>'


def _numbers(run: Run, now: float) -> list[tuple[str, str, str]]:
    last, left, total = run.last, run.seconds_left(now), run.total
    loss = last.get("loss")
    shown = [
        ("Step", f"{run.step:,}", ", ".join(filter(None, (f"of {total:,}" if total else "", tokens_text(run))))),
        ("Loss", "" if "loss" not in last else "not finite" if loss is None else f"{loss:.3f}", "nats per token"),
        ("Held-out", "" if run.held_out_now is None else f"{run.held_out_now:.3f}", "bits per byte"),
        (
            "Tokens per second",
            f"{last['tokens_per_second']:,.0f}" if "tokens_per_second" in last else "",
            f"MFU {last['mfu']:.1%}" if "mfu" in last else "",
        ),
        ("Time left", human_time(left) if left is not None else "", ""),
        ("Goodput", f"{run.goodput.goodput:.1%}" if run.goodput else "", ""),
    ]
    state, _, since = run.state(now)[1].partition(" for ")
    return [("State", state, f"for {since}" if since else ""), *shown]


def _tiles(run: Run, now: float) -> str:
    return tiles(row for row in _numbers(run, now) if row[1])


def _table(runs: Sequence[Run], labels: Sequence[str], now: float) -> str:
    rows, heads = [], []
    for place, (run, label) in enumerate(zip(runs, labels, strict=True)):
        (state, words), (_, *numbers) = run.state(now), _numbers(run, now)
        heads = ["Run", "State", *(name for name, _, _ in numbers), "Data", "Learning rate"]
        values = [*(value for _, value, _ in numbers), *run.phase()]
        cells = "".join(f"<td>{text(value)}</td>" for value in values)
        rows.append(f"<tr><td>{_swatch(place)}{text(label)}</td><td class=s-{state}>{text(words)}</td>{cells}</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return section("Runs", "", f"<div class=runs><table><tr>{head}</tr>{''.join(rows)}</table></div>")


def _goodput(runs: Sequence[Run], labels: Sequence[str]) -> str:
    if len(runs) == 1:
        return goodput_section(runs[0].goodput)
    bars = [goodput_bar(run.goodput, label) for run, label in zip(runs, labels, strict=True) if run.goodput]
    body = "".join(bars)
    return section("Where the time went", "", goodput_legend() + body if body else "")


def _phase(run: Run) -> str:
    data, rate = run.phase()
    words = f"<p>{text(data)}; learning rate: {text(rate)}</p>" if data else ""
    return section("Data and schedule", "", words and words + _stage_bar(run))


def _stage_bar(run: Run) -> str:
    """The stages of data phases and batch ramp, as long as their steps, the present one strong; no bar for just one."""
    total, at = run.total, max(run.step - 1, 0)
    found = [(stage.first_step, min(stage.first_step + stage.steps, total)) for stage in stages(run.config)]
    found = [(first, end) for first, end in found if end > first]
    if len(found) < 2:
        return ""
    parts = "".join(
        f'<u{" class=now" * (first <= at < end)} style="width:{(end - first) / total:.3%}"'
        f' title="steps {first + 1:,.0f} to {end:,.0f}"></u>'
        for first, end in found
    )
    return f'<div class="stack phases"><i>{parts}</i></div>'


def _experts(runs: Sequence[Run], labels: Sequence[str]) -> str:
    key = "expert_load_max_over_mean"
    caption = "The busiest expert’s load over the mean of its layer, in the worst layer; 1 is perfect."
    peak = _chart(runs, labels, key, "largest load over the mean", caption, band=True)
    images = [
        figure(
            f'<img class=loads alt="{text(label)}: load of every expert" src="{load_image(run.experts)}">',
            f"{label}: a row for each of {len(run.experts)} layers, a column for each of {len(run.experts[0])} "
            "experts; blue is below the mean load, red above.",
        )
        for run, label in zip(runs, labels, strict=True)
        if run.experts
    ]
    grid = peak + "".join(images[:IMAGES])
    return section("Experts", "", f"<div class=grid>{grid}</div>" if grid else "")
