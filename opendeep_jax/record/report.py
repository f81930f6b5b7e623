"""The page of a run, or of several laid over each other, and `loss.png`: functions of the files in run directories.

`opendeep train` writes `report.html` at the end, `opendeep report` at any time, and `opendeep watch --html` again and
again. A run that is still going, has died, or has only just begun gives a page of what is there.
"""

import datetime
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from opendeep_jax.config.files import replacing, write_atomically
from opendeep_jax.display import chart
from opendeep_jax.display.chart import BLUE, GREEN, MUTED, ORANGE, VIOLET, Level, Line
from opendeep_jax.display.numbers import human_bytes, human_count, human_time
from opendeep_jax.display.page import (
    Markup,
    bars,
    columns,
    details,
    dot,
    grid,
    header,
    legend,
    page,
    runs_legend,
    section,
    stack,
    swatch,
    table,
    text,
    tiles,
)
from opendeep_jax.record.files import dotted
from opendeep_jax.record.goodput import Goodput
from opendeep_jax.record.origin import lineage
from opendeep_jax.record.report_curves import captioned, number_chart, over, run_points
from opendeep_jax.record.report_experts import experts_section, load_image
from opendeep_jax.record.run_view import HELD_OUT, RunView, stage_shares
from opendeep_jax.record.time_kinds import KINDS

COMPRESSORS = (("gzip\u00a0-9", "gzip_bits_per_byte", ORANGE), ("xz\u00a0-9", "xz_bits_per_byte", GREEN))
IMAGES = 24
"""So many runs have a picture of their expert loads."""
EVENTS_SHOWN = 40


def write_report(workdir: str | Path) -> Path:
    """Write report.html and loss.png into `workdir` from the files there; return the path of report.html.

    Both are replaced atomically. Raises OSError when the directory cannot be written.
    """
    run = RunView(workdir, details=True, whole=True).refresh()
    path = run.workdir / "report.html"
    write_atomically(path, page(f"{run.name}: run report", _run_page(run, _status(run))))
    with replacing(run.workdir / "loss.png") as picture:
        _loss_png(run, picture)
    return path


def live_page(runs: Sequence[RunView], labels: Sequence[str], every: float, now: float | None = None) -> str:
    """Return the page of runs that may be under way. It loads itself again until all of them are finished.

    Args:
        runs: one, of a view with details, gives its whole report; several are laid over each other.
        every: seconds between loads, rounded up.
        now: seconds since 1970; the present by default.
    """
    now = time.time() if now is None else now
    going_on = not all(run.is_finished for run in runs)
    written = datetime.datetime.fromtimestamp(now, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    status = f"As of {written} UTC." + (" The page reloads itself." if going_on else " Nothing is left to wait for.")
    title = labels[0] if len(runs) == 1 else f"{len(runs)} runs"
    body = _run_page(runs[0], status, now) if len(runs) == 1 else _runs_page(runs, labels, title, status, now)
    return page(f"{title}: watch", body, max(math.ceil(every), 1) if going_on else 0)


def _run_page(run: RunView, status: str, now: float | None = None) -> str:
    parts = [
        header("OpenDeep", run.name, status),
        _warning(run),
        _bits_summary(run),
        tiles([*(_live_numbers(run, now) if now is not None else ()), *_headline_numbers(run)]),
        _learning([run], [""]),
        _speed([run], [""]),
        goodput_section(run.goodput),
        _phase(run) if now is not None else "",
        _events(run.events, run.event_count),
        experts_section(run),
        _samples(run),
        _configuration(run),
    ]
    return "".join(parts)


def _runs_page(runs: Sequence[RunView], labels: Sequence[str], title: str, status: str, now: float) -> str:
    events = [event | {"run": label} for run, label in zip(runs, labels, strict=True) for event in run.events]
    events.sort(key=lambda event: str(event.get("time", "")))
    spent = [_goodput_bar(run.goodput, label) for run, label in zip(runs, labels, strict=True) if run.goodput]
    kinds = legend((name, kind.css) for name, kind in KINDS.items())
    peak = number_chart(runs, labels, "expert_load_max_over_mean", "largest load over the mean", "The busiest expert.")
    images = [load_image(run, label) for run, label in zip(runs, labels, strict=True) if run.load]
    parts = [
        header("OpenDeep", title, status),
        _table(runs, labels, now),
        _learning(runs, labels),
        _speed(runs, labels),
        section("Where the time went", "", kinds * bool(spent), *spent),
        section("Experts", "", grid(peak, *images[:IMAGES])),
        _events(events, len(events)),
    ]
    return "".join(parts)


# Curves


def _loss_lines(run: RunView) -> list[Line]:
    terms = (("next token", "lm_loss", BLUE), ("multi-token prediction", "mtp_loss", VIOLET), ("total", "loss", MUTED))
    lines = [Line(name, run_points(run, key), color, smooth=True) for name, key, color in terms]
    return [line for line in lines if line.points]


def _compressors(run: RunView) -> tuple[Level, ...]:
    found = ((name, run.number(key), color) for name, key, color in COMPRESSORS)
    return tuple(Level(name, value, color) for name, value, color in found if value is not None)


def _loss_png(run: RunView, path: Path) -> None:
    losses = _loss_lines(run)
    held_out = [Line("held-out text", run_points(run, HELD_OUT), dots=len(run.held_out) < 60)]
    panels = [("loss, nats per token", losses, ())] if losses else []
    panels += [("held-out bits per byte", held_out, _compressors(run))] if len(run.held_out) else []
    parameters, active = run.number("parameters"), run.number("active_parameters")
    sizes = f"{human_count(parameters)} parameters" if parameters else ""
    sizes += f", {human_count(active)} active per token" if parameters and active else ""
    title = run.name if panels else f"{run.name}: nothing logged yet"
    chart.write_png(path, title, sizes, panels, over([run]))


def _learning(runs: Sequence[RunView], labels: Sequence[str]) -> str:
    one = len(runs) == 1
    levels = _compressors(runs[0]) if one else ()
    unseen = "Bits needed for a byte of text the model never saw. Lower is better, whatever the tokenizer."
    loss = "Training loss; the total holds every term."
    charts = grid(
        captioned(runs, _loss_lines(runs[0]), "loss", "loss, nats per token", loss)
        if one
        else number_chart(runs, labels, "loss", "loss, nats per token", loss),
        number_chart(runs, labels, HELD_OUT, "held-out bits per byte", unseen, levels=levels),
        number_chart(runs, labels, "learning_rate", "learning rate", "The schedule as it was applied."),
        number_chart(runs, labels, "grad_norm", "gradient norm", "Global norm before clipping; it shows trouble first.",
               log=True),
    )  # fmt: skip
    lead = "Curves that coincide take turns in dashes. Click a name to hide its run, with Shift the others."
    return section("Learning", "" if one else lead, runs_legend(labels) * bool(charts), charts)


def _speed(runs: Sequence[RunView], labels: Sequence[str]) -> str:
    median = _median_mfu(runs[0])
    levels = (Level(f"median {median:.1%}", median),) if median is not None else ()
    utilization = "Model FLOPs utilization: the share of the hardware’s peak that the model’s arithmetic used."
    speed = "Training alone; evaluations and checkpoints don’t count."
    mfu = "MFU, percent of the hardware’s peak"
    charts = grid(
        number_chart(runs, labels, "tokens_per_second", "tokens per second", speed),
        number_chart(runs, labels, "mfu", mfu, utilization, GREEN, levels=levels, percent=True),
    )
    return section("Speed", "", charts)


def _median_mfu(run: RunView) -> float | None:
    means = run.curves["mfu"].means() if "mfu" in run.curves else []
    return float(np.median(means)) if means else None


# A run in numbers and words


def _status(run: RunView) -> str:
    planned = run.total or _dict(run.settings, "train").get("steps")
    if run.is_finished:
        status = f"Finished after {run.number('steps'):,} steps."
    else:
        status = f"Not finished: the last logged step is {run.step:,}" + (f" of {planned:,}." if planned else ".")
    ancestry = lineage(run.origin)
    return f"{status} Began with: {ancestry}." if ancestry else status


def _warning(run: RunView) -> str:
    if not (bad := run.not_finite):
        return ""
    names = ", ".join(f"{name} was {value}" for name, value in _dict(bad[0], "non_finite").items())
    lines = "1 logged line has" if len(bad) == 1 else f"{len(bad)} logged lines have"
    message = f"{lines} numbers that are not finite. The first, at step {bad[0].get('step')}: {names}."
    return f"<p class=warning>{text(message)}</p>"


def _bits_summary(run: RunView) -> str:
    bits = run.number(HELD_OUT)
    if bits is None:
        return ""
    levels = _compressors(run)
    better = " and ".join(level.name for level in levels if bits < level.y)
    worse = " and ".join(level.name for level in levels if bits >= level.y)
    sentence = f"Text it has never seen takes this model {bits:.3f} bits per byte"
    sentence += f", fewer than {better}" if better else ""
    sentence += f", not yet fewer than {worse}" if worse else ""
    rows = [("this model", bits, True), *((level.name, level.y, False) for level in levels)]
    rows = [(name, value, f"{value:.3f}", strong) for name, value, strong in sorted(rows, key=lambda row: row[1])]
    return f"<div class=hero><p>{text(sentence)}.</p>{bars(rows)}</div>"


def _headline_numbers(run: RunView) -> list[tuple[str, str, str]]:
    loss, median, seconds = run.number("final_loss"), _median_mfu(run), run.number("seconds")
    active = run.number("active_parameters")
    rows = [
        ("Final loss", loss, "{:.3f}".format, "nats per token, all terms"),
        ("Loss", run.number("loss") if loss is None else None, "{:.3f}".format, "nats per token, all terms"),
        ("Tokens trained", run.number("tokens"), human_count, f"in {human_time(seconds)}" if seconds else ""),
        ("Tokens per second", run.number("tokens_per_second"), "{:,.0f}".format,
         f"median MFU {median:.1%}" if median is not None else ""),
        ("Parameters", run.number("parameters"), human_count, f"{human_count(active)} per token" if active else ""),
        ("Peak memory", run.number("peak_memory_bytes"), human_bytes, ""),
    ]  # fmt: skip
    return [(label, form(value), remark) for label, value, form, remark in rows if value is not None]


def _live_numbers(run: RunView, now: float) -> list[tuple[str, str, str]]:
    """Return what only a run under way has: state, step, time left."""
    state, _, since = run.state(now)[1].partition(" for ")
    total, left, loss = run.total, run.seconds_left(now), run.last.get("loss", "")
    rows = [
        ("State", state, f"for {since}" if since else ""),
        ("Step", f"{run.step:,}", ", ".join(filter(None, (f"of {total:,}" if total else "", run.tokens_text())))),
        ("Loss now", "not finite" if loss is None else "", ""),
        ("Time left", human_time(left) if left is not None else "", ""),
        ("Goodput", f"{run.goodput.goodput:.1%}" if run.goodput else "", ""),
    ]
    return [row for row in rows if row[1]]


def _table(runs: Sequence[RunView], labels: Sequence[str], now: float) -> str:
    """Return the table of several runs as they are now."""
    head = ("Run", "State", "Step", "Loss", "Held-out", "Tokens/s", "MFU", "Time left", "Goodput", "Data", "Rate")
    rows = []
    for place, (run, label) in enumerate(zip(runs, labels, strict=True)):
        (state, words), left, last = run.state(now), run.seconds_left(now), run.last
        loss = last.get("loss", "")
        cells = [
            Markup(swatch(place) + text(label)),
            Markup(f"<span class={state}>{text(words)}</span>"),
            f"{run.step:,}" + (f" of {run.total:,}" if run.total else ""),
            "not finite" if loss is None else loss and f"{loss:.3f}",
            "" if run.held_out_now is None else f"{run.held_out_now:.3f}",
            f"{last['tokens_per_second']:,.0f}" if "tokens_per_second" in last else "",
            f"{last['mfu']:.1%}" if "mfu" in last else "",
            "" if left is None else human_time(left),
            f"{run.goodput.goodput:.1%}" if run.goodput else "",
            *run.phase(),
        ]
        rows.append(cells)
    return section("Runs", "", columns(rows, head, "wide"))


def _goodput_bar(goodput: Goodput, title: str = "") -> str:
    """Return one stacked bar of all time, a color for each kind; empty before any time was counted."""
    parts = [
        (f"{kind} {share:.1%}, {human_time(seconds)}", share, KINDS[kind].css)
        for kind, seconds, share in goodput.shares()
    ]
    return stack(parts, title, f"{goodput.goodput:.1%}")


def goodput_section(goodput: Goodput | None) -> str:
    """Return a section with the bar and a table of kinds; empty where nothing was counted."""
    if goodput is None or goodput.total <= 0:
        return ""
    rows = [
        (Markup(dot(KINDS[kind].css) + text(kind)), human_time(seconds), f"{share:.1%}", KINDS[kind].meaning)
        for kind, seconds, share in goodput.shares()
    ]
    starts = "one start" if goodput.starts == 1 else f"{goodput.starts:,} starts"
    lead = f"{goodput.goodput:.1%} of {human_time(goodput.total)} went into steps that count, over {starts}."
    return section("Where the time went", lead, _goodput_bar(goodput), columns(rows))


def _phase(run: RunView) -> str:
    """Return where a run is in its data phases, batch ramp and schedule."""
    data, rate = run.phase()
    parts = [(hint, share, "var(--blue)" if here else "var(--grid)") for hint, share, here in stage_shares(run)]
    words = f"<p>{text(data)}; learning rate: {text(rate)}</p>" if data else ""
    return section("Data and schedule", "", words and words + (stack(parts) if len(parts) > 1 else ""))


def _events(events: Iterable[dict], count: int) -> str:
    """Return a section with the newest events on top; empty where nothing happened."""
    newest = list(events)[: -EVENTS_SHOWN - 1 : -1]
    named = any("run" in event for event in newest)
    rows = [
        [str(event.get("time", ""))[:19].replace("T", " "), *([event.get("run", "")] if named else []),
         event.get("step", ""), event.get("kind", ""), event.get("text", "")]
        for event in newest
    ]  # fmt: skip
    hidden = count - len(newest)
    more = f"<p class=lead>{hidden:,} earlier ones are in events.jsonl.</p>" if hidden > 0 else ""
    lead = "The newest first; times are UTC."
    return section("What happened", lead, columns(rows), more) if rows else ""


# Texts and settings


def _samples(run: RunView) -> str:
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


def _configuration(run: RunView) -> str:
    groups = {name: value for name, value in run.settings.items() if isinstance(value, dict)}
    rest = {name: value for name, value in run.settings.items() if name not in groups}
    summary = {name: value for name, value in run.summary.items() if name != "environment"}
    return section(
        "Configuration",
        "Nothing else decided what this run computed.",
        details("Difference from the recipe", f"<pre>{text(run.diff)}</pre>" if run.diff.strip() else "", is_open=True),
        details("Run", _table_of(rest)),
        *(details(name.capitalize(), _table_of(group)) for name, group in groups.items()),
    ) + section(
        "Record",
        "",
        details("Summary", _table_of(summary)),
        details("Environment", _table_of(run.environment | _dict(run.summary, "environment"))),
        details("Origin", _table_of(run.origin)),
    )


def _table_of(tree: dict) -> str:
    """Return a table of nested settings by their dotted names."""
    shown = ((name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
             for name, value in dotted(tree))  # fmt: skip
    return table(shown)


def _dict(tree: dict, name: str) -> dict:
    value = tree.get(name)
    return value if isinstance(value, dict) else {}
