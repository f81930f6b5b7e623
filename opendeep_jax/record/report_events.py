"""Parts of `report.html`, and of the page of `opendeep watch`: where a run's time went, and what happened to it."""

from collections.abc import Sequence

from opendeep_jax.display.numbers import human_time
from opendeep_jax.display.page import section, text
from opendeep_jax.record.goodput import KINDS, Goodput

EVENTS_SHOWN = 40

MEANING = {
    "step": "steps whose updates the run still has: the goodput",
    "data": "waiting for batches",
    "compile": "compiling",
    "evaluation": "evaluations and samples",
    "checkpoint": "what saving kept training from",
    "restore": "reading checkpoints",
    "start": "imports and preparation, until the first of the others",
    "other": "the rest",
    "waste": "steps done twice or skipped, and waiting for their data",
    "restart": "from a start's last line to the next start",
}


def goodput_bar(goodput: Goodput, title: str = "") -> str:
    """One stacked bar of all time, a colour for each kind; empty before any time was counted."""
    parts = "".join(
        f'<u class=k-{kind} style="width:{share:.3%}" title="{kind} {share:.1%}, {human_time(seconds)}"></u>'
        for kind, seconds, share in goodput.shares()
    )
    label = f"<span>{text(title)}</span>" if title else ""
    return f"<div class=stack>{label}<i>{parts}</i><b>{goodput.goodput:.1%}</b></div>" if parts else ""


def goodput_section(goodput: Goodput | None) -> str:
    """A section with the bar and a table of kinds; empty where nothing was counted."""
    if goodput is None or goodput.total <= 0:
        return ""
    rows = "".join(
        f"<tr><td><i class='dot k-{kind}'></i>{kind}</td><td>{human_time(seconds)}</td><td>{share:.1%}</td>"
        f"<td>{MEANING[kind]}</td></tr>"
        for kind, seconds, share in goodput.shares()
    )
    starts = "one start" if goodput.starts == 1 else f"{goodput.starts:,} starts"
    lead = f"{goodput.goodput:.1%} of {human_time(goodput.total)} went into steps that count, over {starts}."
    return section("Where the time went", lead, goodput_bar(goodput), f"<table class=rows>{rows}</table>")


def goodput_legend() -> str:
    """The colours of all kinds, for a page with several bars."""
    return "<p class=legend>" + "".join(f"<span><i class='dot k-{kind}'></i>{kind}</span>" for kind in KINDS) + "</p>"


def events_table(events: Sequence[dict], shown: int = EVENTS_SHOWN, names: bool = False) -> str:
    """The newest events on top: time, (run, with `names`,) step, kind, text. Empty without events."""
    rows = []
    for event in events[: -shown - 1 : -1]:
        when = str(event.get("time", ""))[:19].replace("T", " ")
        cells = [when, *([event.get("run", "")] if names else []), event.get("step", ""), event.get("kind", "")]
        rows.append("".join(f"<td>{text(cell)}</td>" for cell in cells) + f"<td>{text(event.get('text', ''))}</td>")
    more = f"<p class=lead>{len(events) - shown:,} earlier ones are in events.jsonl.</p>" if len(events) > shown else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table class='rows events'>{body}</table>{more}" if rows else ""


def events_section(events: Sequence[dict], names: bool = False) -> str:
    """A section with the newest events on top; empty where nothing happened."""
    return section("What happened", "The newest first; times are UTC.", events_table(events, names=names))
