"""The look of `report.html`: its style sheet and the few HTML pieces it is built from.

Everything that comes from a file passes through `text`: sample texts are whatever a model wrote.
"""

import html
from collections.abc import Iterable

from opendeep_jax.display.chart_style import css_colors


def text(value) -> str:
    """A value as HTML text: markup escaped, control characters and what UTF-8 cannot hold replaced."""
    clean = "".join(c if c in "\n\t" or c.isprintable() or c.isspace() else "�" for c in str(value))
    return html.escape(clean.encode("utf-8", "replace").decode("utf-8"))


def table(rows: Iterable[tuple[str, object]]) -> str:
    """Two columns: name, value."""
    cells = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>" if cells else ""


def tiles(rows: Iterable[tuple[str, str, str]]) -> str:
    """Headline numbers: label, value, remark."""
    items = (
        f"<div class=tile><span>{text(label)}</span><b>{text(value)}</b><small>{text(remark)}</small></div>"
        for label, value, remark in rows
    )
    return f"<div class=tiles>{''.join(items)}</div>"


def bars(rows: list[tuple[str, float, str]]) -> str:
    """Horizontal bars from zero: label, value, CSS class."""
    longest = max(value for _, value, _ in rows)
    items = (
        f'<div class="bar {kind}"><span>{text(label)}</span><i><u style="width:{value / longest:.2%}"></u></i>'
        f"<b>{value:.3f}</b></div>"
        for label, value, kind in rows
    )
    return f"<div class=bars>{''.join(items)}</div>"


def figure(picture: str, caption: str) -> str:
    """A picture (SVG or other HTML that is safe) over its caption (plain text)."""
    return f"<figure>{picture}<figcaption>{text(caption)}</figcaption></figure>"


def section(title: str, introduction: str, *parts: str) -> str:
    """A headed section; empty when none of its parts has anything to show."""
    body = "".join(parts)
    lead = f"<p class=lead>{text(introduction)}</p>" if introduction else ""
    return f"<section><h2>{text(title)}</h2>{lead}{body}</section>" if body else ""


def details(title: str, body: str, is_open: bool = False) -> str:
    """A part that opens on a click; empty when there is nothing in it."""
    return f"<details{' open' * is_open}><summary>{text(title)}</summary>{body}</details>" if body else ""


def page(title: str, body: str, head: str = "") -> str:
    """The whole document; `head` is HTML for its head."""
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        '<meta name=color-scheme content="light dark">'
        f"<title>{text(title)}</title><style>{STYLE}</style>{head}</head>\n<body><main>{body}</main></body></html>\n"
    )


STYLE = """
:root{--sans:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
--page:#f6f7f9;--card:#fff;--ink:#20242a;--muted:#667080;--grid:#e4e6ea;
SERIES_LIGHT--blue:var(--s0);--orange:var(--s1);--green:var(--s2);--violet:var(--s3);--red:#d03a4a}
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
.bar{display:grid;grid-template-columns:96px 1fr 52px;gap:12px;align-items:center;margin:7px 0;font-size:14px}
.bar span{color:var(--muted)}.bar b{font-variant-numeric:tabular-nums;text-align:right;font-weight:500}
.bar i{display:block;height:14px;border-radius:4px;background:var(--page)}
.bar u{display:block;height:100%;border-radius:4px;background:var(--muted);opacity:.55}
.bar.model u{background:var(--blue);opacity:1}.bar.model span,.bar.model b{color:var(--ink);font-weight:650}
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
.k-step{background:var(--green)}.k-data{background:var(--orange)}.k-compile{background:var(--violet)}
.k-evaluation{background:var(--blue)}.k-waste{background:var(--red)}.k-start{background:var(--muted)}
.k-checkpoint{background:color-mix(in srgb,var(--blue) 50%,var(--card))}
.k-restore{background:color-mix(in srgb,var(--violet) 50%,var(--card))}
.k-restart{background:color-mix(in srgb,var(--red) 50%,var(--card))}
.k-other{background:color-mix(in srgb,var(--muted) 50%,var(--card))}
footer{margin-top:56px;color:var(--muted);font-size:13px}
@media (max-width:520px){main{padding:24px 14px 40px}h1{font-size:27px}.hero{padding:16px}.hero p{font-size:17px}
.tiles{grid-template-columns:1fr 1fr}.bar{grid-template-columns:74px 1fr 48px;gap:8px}section{margin-top:36px}
.rows td:not(:last-child){white-space:normal;min-width:62px;padding-right:8px}.rows td:last-child{width:auto}}
@media print{body{background:#fff}figure,.sample,details{break-inside:avoid}}
""".replace("SERIES_LIGHT", css_colors()).replace("SERIES_DARK", css_colors(dark=True))
