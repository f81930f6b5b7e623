"""Pages: the HTML pieces that reports, plans and data cards are built from, one style sheet, and the charts' script.

A page is one file that loads nothing from anywhere, light or dark as the browser is. Everything that comes from a file
passes through `text`: sample texts are whatever a model wrote.
"""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from opendeep_jax.display.chart_style import css_colors, look

SCRIPT = Path(__file__).with_name("chart.js")


class Markup(str):
    """HTML that is safe, and passes through `text` as it is."""


def text(value) -> Markup:
    """Return a value as HTML text: markup escaped, control characters and what UTF-8 cannot hold replaced."""
    if isinstance(value, Markup):
        return value
    clean = "".join(c if c in "\n\t" or c.isprintable() or c.isspace() else "�" for c in str(value))
    return Markup(html.escape(clean.encode("utf-8", "replace").decode("utf-8")))


def table(rows: Iterable[tuple[str, object]]) -> str:
    """Return a table of two columns: name, value. Empty without rows."""
    cells = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>" if cells else ""


def columns(rows: Iterable[Sequence[object]], head: Sequence[str] = (), kind: str = "rows") -> str:
    """Return a table of any columns, under a heading where one is given. Empty without rows.

    Args:
        kind: CSS class. `rows`: the last column is prose; `numbers`: all but the first are set flush right; `words`:
            all are prose; `wide`: cells never break, and a narrow page scrolls.
    """
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    heading = f"<tr>{''.join(f'<th>{text(name)}</th>' for name in head)}</tr>" if head else ""
    return f'<div class=scroll><table class="{kind}">{heading}{body}</table></div>' if body else ""


def tiles(rows: Iterable[tuple[str, str, str]]) -> str:
    """Return headline numbers: label, value, remark."""
    items = (
        f"<div class=tile><span>{text(label)}</span><b>{text(value)}</b><small>{text(remark)}</small></div>"
        for label, value, remark in rows
    )
    return f"<div class=tiles>{''.join(items)}</div>"


def bars(rows: Sequence[tuple[str, float, str, bool]], limit: float = 0.0) -> str:
    """Return horizontal bars from zero: label, value, the value in words, and whether the bar stands out.

    Args:
        limit: a red line at this value; 0 for none.
    """
    longest = max([limit * 1.05, *(value for _, value, _, _ in rows)], default=0.0) or 1.0
    line = f'<em style="left:{limit / longest:.2%}"></em>' if limit else ""
    items = (
        f'<div class="bar{" strong" * strong}"><span>{text(label)}</span><i><u style="width:{value / longest:.2%}"></u>'
        f"{line}</i><b>{text(words)}</b></div>"
        for label, value, words, strong in rows
    )
    return f"<div class=bars>{''.join(items)}</div>" if rows else ""


def stack(parts: Iterable[tuple[str, float, str]], title: str = "", end: str = "") -> str:
    """Return one bar of stacked shares of a whole: hint, share, CSS color. Empty without parts.

    Args:
        title: before the bar.
        end: after it.
    """
    shares = "".join(
        f'<u style="width:{share:.3%};background:{color}" title="{text(hint)}"></u>' for hint, share, color in parts
    )
    label = f"<span>{text(title)}</span>" if title else ""
    return f"<div class=stack>{label}<i>{shares}</i>{f'<b>{text(end)}</b>' if end else ''}</div>" if shares else ""


def dot(color: str) -> Markup:
    """Return a dot of a CSS color, to stand before a name."""
    return Markup(f'<i class=dot style="background:{color}"></i>')


def legend(colors: Iterable[tuple[str, str]]) -> str:
    """Return names with their CSS colors, for a page with several bars."""
    items = "".join(f"<span>{dot(color)}{text(name)}</span>" for name, color in colors)
    return f"<p class=legend>{items}</p>" if items else ""


def swatch(place: int) -> Markup:
    """Return a stroke that looks like the lines of the run at `place`."""
    color, dashes = look(place)
    style = f' stroke-dasharray="{" ".join(f"{length:g}" for length in dashes)}"' if dashes else ""
    line = f'<path stroke="var(--s{color})"{style} d="M0 4H26"/>'
    return Markup(f'<svg class=swatch viewBox="0 0 26 8" aria-hidden=true>{line}</svg>')


def runs_legend(labels: Sequence[str]) -> str:
    """Return names of runs that hide and show their curves in all charts of the page; empty for one run."""
    names = "".join(
        f"<button type=button data-run={place} aria-pressed=true>{swatch(place)}{text(label)}</button>"
        for place, label in enumerate(labels)
    )
    show = "<button type=button id=show-all hidden>Show all</button>"
    return f"<div class=legend>{names}{show}</div>" if len(labels) > 1 else ""


def figure(picture: str, caption: str) -> str:
    """Return a picture (SVG or other HTML that is safe) over its caption (plain text)."""
    return f"<figure>{picture}<figcaption>{text(caption)}</figcaption></figure>"


def grid(*figures: str, small: bool = False) -> str:
    """Return figures beside each other, as many as there is room for; empty without one."""
    body = "".join(figures)
    return f'<div class="grid{" small" * small}">{body}</div>' if body else ""


def section(title: str, introduction: str, *parts: str) -> str:
    """Return a headed section; empty when none of its parts has anything to show."""
    body = "".join(parts)
    lead = f"<p class=lead>{text(introduction)}</p>" if introduction else ""
    return f"<section><h2>{text(title)}</h2>{lead}{body}</section>" if body else ""


def details(title: str, body: str, is_open: bool = False) -> str:
    """Return a part that opens on a click; empty when there is nothing in it."""
    return f"<details{' open' * is_open}><summary>{text(title)}</summary>{body}</details>" if body else ""


def header(kicker: str, title: str, status: str = "") -> str:
    """Return the head of a page: what kind of page it is, of what, and a line below."""
    line = f"<p class=status>{text(status)}</p>" if status else ""
    return f"<header><div class=kicker>{text(kicker)}</div><h1>{text(title)}</h1>{line}</header>"


def page(title: str, body: str, reload_seconds: int = 0) -> str:
    """Return the whole document.

    Args:
        reload_seconds: the page loads itself again after so long; 0 for never.
    """
    again = f"<noscript><meta http-equiv=refresh content={reload_seconds}></noscript>" if reload_seconds else ""
    script = SCRIPT.read_text(encoding="utf-8") if "data-chart" in body or reload_seconds else ""
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        '<meta name=color-scheme content="light dark">'
        f"<title>{text(title)}</title><style>{STYLE}</style>{again}</head>\n<body><main>{body}</main>"
        + f"<script data-every={reload_seconds}>{script}</script>" * bool(script)
        + "</body></html>\n"
    )


STYLE = """
:root{--sans:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
--page:#f6f7f9;--card:#fff;--ink:#20242a;--muted:#667080;--grid:#e4e6ea;
SERIES_LIGHT--blue:var(--s0);--orange:var(--s1);--green:var(--s2);--violet:var(--s3);--red:#d03a4a;--yellow:var(--s6)}
@media (prefers-color-scheme:dark){:root{--page:#0f1216;--card:#171b21;--ink:#e6e9ee;--muted:#939dab;--grid:#2a3039;
SERIES_DARK--red:#ff6b78}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 var(--sans)}
main{max-width:1120px;margin:0 auto;padding:40px 20px 64px}
header .kicker{color:var(--blue);font-weight:600;font-size:13px;letter-spacing:.02em}
h1{font-size:34px;line-height:1.15;margin:4px 0 8px;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:21px;margin:0 0 4px;letter-spacing:-.01em}
h3{font-size:15px;margin:28px 0 10px}
section{margin-top:48px}
.lead{color:var(--muted);max-width:70ch;margin:0 0 16px}
.status{color:var(--muted);margin:0}
.warning{border-left:3px solid var(--red);background:var(--card);padding:10px 14px;border-radius:0 8px 8px 0}
.hero{background:var(--card);border:1px solid var(--grid);border-radius:14px;padding:22px 24px;margin-top:26px}
.hero p{margin:0 0 16px;font-size:19px;line-height:1.4;max-width:62ch}
.bar{display:grid;grid-template-columns:minmax(96px,170px) 1fr minmax(52px,110px);
gap:12px;align-items:center;margin:7px 0;font-size:14px}
.bar span{color:var(--muted)}.bar b{font-variant-numeric:tabular-nums;text-align:right;font-weight:500}
.bar i{display:block;height:14px;border-radius:4px;background:var(--page)}
.bar u{display:block;height:100%;border-radius:4px;background:var(--muted);opacity:.55}
.bar.strong u{background:var(--blue);opacity:1}.bar.strong span,.bar.strong b{color:var(--ink);font-weight:600}
.bar i{position:relative}.bar em{position:absolute;top:-3px;bottom:-3px;border-left:2px solid var(--red)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin-top:16px;
background:var(--card);border:1px solid var(--grid);border-radius:14px;overflow:hidden}
.tile{box-shadow:1px 1px 0 var(--grid);padding:14px 18px;display:flex;flex-direction:column}
.tile span,.tile small{color:var(--muted);font-size:12.5px}
.tile b{font-size:22px;font-weight:650;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:16px}
.small{grid-template-columns:repeat(auto-fit,minmax(min(100%,250px),1fr))}
figure{margin:0;background:var(--card);border:1px solid var(--grid);border-radius:14px;padding:14px 16px 12px;
min-width:0}
figure svg{display:block;width:100%;height:auto}
figure img{display:block;width:100%;height:150px;image-rendering:pixelated;border-radius:4px}
figcaption{color:var(--muted);font-size:13px;line-height:1.45;margin-top:8px}
.ramp{display:flex;gap:10px;align-items:center;color:var(--muted);font-size:13px;margin:0 0 14px}
.ramp i{height:10px;width:180px;border-radius:5px;display:block}
.sample{background:var(--card);border:1px solid var(--grid);border-radius:14px;padding:12px 16px;margin-bottom:12px}
.sample span{color:var(--muted);font-size:12.5px}
pre{font:13px/1.5 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere;margin:4px 0 0;tab-size:4;
max-height:420px;overflow:auto}
pre mark{background:none;color:var(--blue);font-weight:650}
details{background:var(--card);border:1px solid var(--grid);border-radius:14px;margin-bottom:10px;padding:0 16px}
details>*:last-child{margin-bottom:14px}
summary{cursor:pointer;padding:11px 0;font-weight:550}
details .sample{border:0;border-top:1px solid var(--grid);border-radius:0;padding:10px 0 4px;margin:0}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th{font-weight:400;color:var(--muted);text-align:left;padding:5px 16px 5px 0;vertical-align:top;width:44%;
overflow-wrap:anywhere}
td{padding:5px 0;font-family:var(--mono);font-size:12.5px;overflow-wrap:anywhere}
tr+tr>*{border-top:1px solid var(--grid)}
.rows td{padding:5px 14px 5px 0;vertical-align:top}.rows td:last-child{padding-right:0}
.rows td:not(:last-child){white-space:nowrap}.rows td:last-child{font-family:var(--sans);font-size:13.5px;width:100%}
.stack{display:flex;gap:12px;align-items:center;margin:7px 0 12px;font-size:14px}
.stack span{flex:0 0 22%;overflow-wrap:anywhere}.stack b{flex:0 0 52px;text-align:right;font-weight:550}
.stack i{flex:1;display:flex;height:18px;border-radius:5px;overflow:hidden;background:var(--grid)}
.stack u{display:block;height:100%}.dot{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:7px}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;color:var(--muted);font-size:13px;margin:0 0 14px}
.legend button{font:inherit;color:inherit;background:none;border:0;border-radius:6px;padding:4px 6px;margin:0 -6px;
cursor:pointer;text-align:left;overflow-wrap:anywhere}.legend button:hover{color:var(--ink)}
.legend button[aria-pressed=false]{opacity:.45;text-decoration:line-through}#show-all{color:var(--blue)}
.swatch{display:inline-block;vertical-align:middle;width:26px;height:8px;flex:none;margin-right:7px}
.swatch path{fill:none;stroke-width:2.6}
figure{position:relative}svg[data-chart]{touch-action:pan-y;outline:none}
svg .rule{stroke:var(--muted);stroke-dasharray:2 2;fill:none}
svg[data-chart]:focus-visible,.legend button:focus-visible{outline:2px solid var(--blue);outline-offset:2px}
.values{position:absolute;top:34px;z-index:2;pointer-events:none;background:var(--card);border:1px solid var(--grid);
border-radius:8px;box-shadow:0 3px 14px #0003;padding:6px 10px;font-size:12px;line-height:1.5;max-width:78%}
.values[hidden],.off,.legend button[hidden]{display:none}.values b{font-weight:550;color:var(--muted)}
.values div{display:flex;align-items:baseline;gap:0}.values .dot{flex:none}
.values span{overflow-wrap:anywhere;flex:1;line-height:1.3}
.values em{font-style:normal;font-variant-numeric:tabular-nums;padding-left:12px;font-weight:600}
.scroll{overflow-x:auto}.wide{min-width:720px}.wide td{white-space:nowrap;padding:6px 14px 6px 0}
.wide td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:170px;padding-left:36px;position:relative}
.wide td .swatch{position:absolute;left:0;top:12px}.wide th{width:auto;padding-right:14px;white-space:nowrap}
.numbers td:not(:first-child),.numbers th:not(:first-child){text-align:right;padding-left:16px;width:auto}
.running{color:var(--green)}.quiet{color:var(--red)}.stopped{color:var(--orange)}.finished{color:var(--blue)}
figure img.loads{height:auto;min-height:40px;max-height:220px}
footer{margin-top:56px;color:var(--muted);font-size:13px}
@media (max-width:520px){main{padding:24px 14px 40px}h1{font-size:27px}.hero{padding:16px}.hero p{font-size:17px}
.tiles{grid-template-columns:1fr 1fr}.bar{grid-template-columns:84px 1fr 74px;gap:8px}section{margin-top:36px}
.rows td:not(:last-child){white-space:normal;min-width:62px;padding-right:8px}.rows td:last-child{width:auto}}
@media(pointer:coarse){.legend button{padding:10px 6px}}
@media print{body{background:#fff}figure,.sample,details{break-inside:avoid}}
""".replace("SERIES_LIGHT", css_colors()).replace("SERIES_DARK", css_colors(dark=True))
