"""Frames of `opendeep watch` for a terminal of any width: a panel per run, or one table of many."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from opendeep_jax.display.numbers import human_time
from opendeep_jax.jobs.watch.run import Run, tokens_text
from opendeep_jax.record.goodput import KINDS
from opendeep_jax.record.lineage import lineage

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
COLOURS = {
    "step": "green", "data": "yellow", "compile": "magenta", "evaluation": "blue", "checkpoint": "cyan",
    "restore": "bright_magenta", "start": "bright_black", "other": "white", "waste": "red", "restart": "bright_red",
}  # fmt: skip
STATES = {"running": "green", "finished": "blue", "stopped": "yellow", "quiet": "red", "empty": "bright_black"}
PANELS = 2
"""So many runs get a panel each; more share a table."""
LABEL = 10


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """Values as a row of at most `width` characters, low to high; the highest twentieth is cut off at the top."""
    if not values or width < 1:
        return ""
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in zip(edges, edges[1:], strict=False)]
    ordered = sorted(means)
    low, high = ordered[0], ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    span = high - low
    share = [min((mean - low) / span, 1.0) if span > 0 else 0.0 for mean in means]
    return "".join(blocks[min(int(part * len(blocks)), len(blocks) - 1)] for part in share)


def frame(runs: Sequence[Run], labels: Sequence[str], console: Console, now: float | None = None) -> RenderableType:
    """All runs as they are now. A pure function of what they hold, the console's width, height and encoding."""
    if len(runs) <= PANELS:
        return Group(*(_panel(run, label, console, now) for run, label in zip(runs, labels, strict=True)))
    events = [event | {"run": label} for run, label in zip(runs, labels, strict=True) for event in run.events]
    events.sort(key=lambda event: str(event.get("time", "")))
    return Group(_table(runs, labels, console, now), *_events(events, console, 6))


def _panel(run: Run, label: str, console: Console, now: float | None) -> RenderableType:
    width, ascii_only = console.width, console.options.ascii_only
    state, words = run.state(now)
    ancestry = f"  {_plain(lineage(run.origin))}".rstrip()
    head = Text.assemble((_plain(label), "bold"), "  ", (words, STATES[state]), (ancestry, "bright_black"))
    lines = [head, _progress(run, width, ascii_only, now)]
    room = width - LABEL - 28

    def add(name: str, value: str, values: Sequence[float] = ()) -> None:
        picture = sparkline(values, room, ascii_only) if len(values) > 1 and room >= 8 else ""
        value = value.replace("×", "x") if ascii_only else value
        text = f"{value:<26}  " if picture else value
        lines.append(Text.assemble((f"{name:<{LABEL}}", "bright_black"), text, (picture, "cyan")))

    last, (data, rate) = run.last, run.phase()
    if "loss" in last:
        loss = last["loss"]
        add("loss", f"{loss:.3f} nats/token" if loss is not None else "not finite", run.curves["loss"].means())
    if run.held_out_now is not None:
        add("held-out", f"{run.held_out_now:.3f} bits/byte", run.held_out.means())
    if (speed := last.get("tokens_per_second")) is not None:
        mfu = f", MFU {last['mfu']:.1%}" if "mfu" in last else ""
        add("speed", f"{speed:,.0f} tokens/s{mfu}", run.curves["tokens_per_second"].means())
    if data:
        add("data", data)
        peak = f"{last['learning_rate']:.3g}, " if "learning_rate" in last else ""
        add("rate", peak + rate)
    if (load := last.get("expert_load_max_over_mean")) is not None:
        add("experts", f"busiest {load:.2f} × mean", run.curves["expert_load_max_over_mean"].means())
    if run.goodput and run.goodput.total > 0:
        lines.append(_goodput_line(run, width, ascii_only))
        rest = sorted((row for row in run.goodput.shares() if row[0] != "step"), key=lambda row: -row[1])
        legend = [Text(f"{kind} {share:.1%}", COLOURS[kind]) for kind, _, share in rest if share >= 0.0005]
        lines += [Text(" " * LABEL) + Text("  ").join(legend)] if legend else []
    lines = [_fit(line, width) for line in lines]
    return Group(*lines, *_events(list(run.events), console, 4), Text(""))


def _progress(run: Run, width: int, ascii_only: bool, now: float | None) -> Text:
    total, left = run.total, run.seconds_left(now)
    of = f"/{total:,}" if total else ""
    tail = [f"step {run.step:,}{of}", tokens_text(run), f"{human_time(left)} left" if left is not None else ""]
    words = "  ".join(filter(None, tail))
    bar = min(width - len(words) - 2, 40)
    if not total or bar < 8:
        return Text(words)
    full = round(min(run.step / total, 1.0) * bar)
    ink, blank = ("#", "-") if ascii_only else ("━", "╌")
    return Text.assemble((ink * full, "green"), (blank * (bar - full), "bright_black"), "  ", words)


def _goodput_line(run: Run, width: int, ascii_only: bool) -> Text:
    bar = max(min(width - LABEL - 8, 60), 4)
    line = Text.assemble((f"{'goodput':<{LABEL}}", "bright_black"), f"{run.goodput.goodput:6.1%}  ")
    shares = {kind: share for kind, _, share in run.goodput.shares()}
    done = passed = 0.0
    for place, kind in enumerate(KINDS):
        passed += shares.get(kind, 0.0)
        cells = round(passed * bar) - round(done * bar)
        # Without colours the kinds must still differ.
        marks = "#-.:~%&*+=" if ascii_only else "█" + 9 * "▒"
        line.append(marks[place] * cells, COLOURS[kind])
        done = passed
    return line


def _events(events: Sequence[dict], console: Console, count: int) -> list[Text]:
    lines = []
    for event in events[: -count - 1 : -1]:
        when = str(event.get("time", ""))[11:19]
        where = " ".join(filter(None, (str(event.get("run", "")), f"step {event.get('step', '?')}")))
        head = (
            f"{where} {event.get('kind', '')} " if console.width < 80 else f"{when}  {where}  {event.get('kind', '')}  "
        )
        lines.append(_fit(Text.assemble((_plain(head), "yellow"), _plain(str(event.get("text", "")))), console.width))
    return lines


COLUMNS = (
    ("step", 4), ("loss", 7), ("state", 12), ("held-out", 8), ("curve", 16), ("tokens/s", 9), ("left", 11),
    ("goodput", 7), ("MFU", 6), ("experts", 7),
)  # fmt: skip
"""Columns beside the name and the least width of each, the dearest first: a narrow terminal shows no more than fit."""
ORDER = ("state", "step", "loss", "curve", "held-out", "tokens/s", "MFU", "left", "experts", "goodput")


def _table(runs: Sequence[Run], labels: Sequence[str], console: Console, now: float | None) -> Table:
    name = min(max(map(len, ("run", *labels))), max(console.width // 2, 12))
    shown = [(run, _shortened(_plain(label), name)) for run, label in zip(runs, labels, strict=True)]
    if console.is_terminal and len(shown) > (most := max(console.height - 10, 5)):
        kept = sorted(range(len(shown)), key=lambda place: runs[place].is_finished)[:most]  # those that go on first
        shown = [shown[place] for place in sorted(kept)]
    rows = [(Text(label), _cells(run, console.options.ascii_only, now)) for run, label in shown]
    room, fitting = console.width - name - 1, []
    for title, width in COLUMNS:
        if room >= width + 2 and any(cells[title].plain for _, cells in rows):
            fitting.append(title)
            room -= width + 2
    hidden = f"{len(runs) - len(shown)} more" if len(shown) < len(runs) else None
    table = Table(caption=hidden, caption_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("run", max_width=name, no_wrap=True, overflow="ellipsis", header_style="bright_black")
    chosen = [title for title in ORDER if title in fitting]
    for title in chosen:
        justify = "left" if title in ("state", "curve") else "right"
        table.add_column(title, justify=justify, no_wrap=True, overflow="ellipsis", header_style="bright_black")
    for label, cells in rows:
        table.add_row(label, *(cells[title] for title in chosen))
    return table


def _cells(run: Run, ascii_only: bool, now: float | None) -> dict[str, Text]:
    state, words = run.state(now)
    last, left, total = run.last, run.seconds_left(now), run.total

    def shown(value: float | None, form: str) -> Text:
        return Text("" if value is None else format(value, form))

    return {
        "state": Text(words, STATES[state]),
        "step": Text(f"{run.step / total:.0%}" if total else f"{run.step:,}"),
        "loss": Text("nan", "red") if "loss" in last and last["loss"] is None else shown(last.get("loss"), ".3f"),
        "curve": Text(sparkline(run.curves["loss"].means(64), 16, ascii_only), "cyan"),
        "held-out": shown(run.held_out_now, ".3f"),
        "tokens/s": shown(last.get("tokens_per_second"), ",.0f"),
        "MFU": shown(last.get("mfu"), ".1%"),
        "left": Text("" if left is None else human_time(left)),
        "experts": shown(last.get("expert_load_max_over_mean"), ".2f"),
        "goodput": shown(run.goodput.goodput if run.goodput else None, ".1%"),
    }


def _shortened(name: str, width: int) -> str:
    """A name with its middle left out: of a sweep's runs, some differ at the end alone."""
    if len(name) <= width or width < 5:
        return name
    return f"{name[: (width - 1) // 2]}…{name[-(width // 2) :]}"


def _fit(line: Text, width: int) -> Text:
    line.no_wrap, line.overflow = True, "ellipsis"
    line.truncate(width, overflow="ellipsis")
    return line


def _plain(text: str) -> str:
    """One line without control characters: an event may hold what a terminal would obey."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text)
