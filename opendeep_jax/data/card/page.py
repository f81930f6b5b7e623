"""The data card as one HTML file with nothing outside it: tables, bars and histograms in the page's own colours.

Everything that comes from data passes through `text`: ids, licences and samples are whatever someone wrote.
"""

import html
from collections.abc import Iterable, Sequence

from opendeep_jax.data.card import tables
from opendeep_jax.data.card.tables import GROUPS, Table, group_of, human_bytes, human_count

COLOURS = dict(zip(("kept", *GROUPS), ("green", "blue", "violet", "yellow", "orange", "red", "muted"), strict=True))
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 236, 46, 40, 8  # of a histogram, in units of its view box
SHOWN_LANGUAGES = 15


def text(value: object) -> str:
    """A value as HTML text: markup escaped, control characters and what UTF-8 cannot hold replaced."""
    clean = "".join(c if c in "\n\t" or c.isprintable() or c.isspace() else "�" for c in str(value))
    return html.escape(clean.encode("utf-8", "replace").decode("utf-8"))


def html_page(card: dict) -> str:
    """The whole document."""
    sections = [
        _header(card),
        _sources(card),
        _licenses(card),
        _lengths(card),
        _dropped(card),
        _duplicates(card),
        _languages(card),
        _section(
            "Evaluation sets",
            "Documents that share a run of words with an item are dropped. Shorter items cannot be looked for.",
            _table(tables.evaluation_table(card)),
        ),
        _section("Personal data", "Replaced in documents that stayed.", _table(tables.masked_table(card))),
        _section("Lost text", "The tokenizer has no token for it.", _table(tables.lost_table(card))),
        _samples(card),
        _section(
            "Record",
            "Nothing else decided what is in the data.",
            _details("Recipe of the curation", tables.recipe_table(card)),
            _details("Time of the curation", tables.seconds_table(card)),
            _details("Tokenizer and hashes", tables.identity_table(card)),
        ),
    ]
    title = f"{text(card['name'])}: data card"
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        '<meta name=color-scheme content="light dark">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>{''.join(sections)}</main></body></html>\n"
    )


# Sections


def _header(card: dict) -> str:
    totals, sources = card["totals"], card["sources"]
    number = len(card["licenses"])
    tiles = [("Sources", f"{len(sources)}", f"{number} licence{'s' * (number > 1)}" if number else "")]
    forms = {"documents": human_count, "bytes": human_bytes, "tokens": human_count}
    labels = {"documents": "Documents", "bytes": "Text", "tokens": "Tokens"}
    per_token = totals["bytes"] / totals["tokens"] if totals.get("tokens") else 0
    remarks = {"tokens": f"{per_token:.2f} bytes each" if per_token else ""}
    tiles += [(labels[name], forms[name](totals[name]), remarks.get(name, "")) for name in labels if name in totals]
    given = sum(source.get("documents_in", 0) for source in sources)
    if given:
        left = sum(source["documents"] for source in sources)
        tiles.append(("Dropped", f"{1 - left / given:.1%}", f"of {human_count(given)} documents"))
    items = (
        f"<div class=tile><span>{text(label)}</span><b>{text(value)}</b><small>{text(remark)}</small></div>"
        for label, value, remark in tiles
    )
    head = f"<div class=kicker>OpenDeep data card</div><h1>{text(card['name'])}</h1>"
    return f"<header>{head}</header><div class=tiles>{''.join(items)}</div>"


def _sources(card: dict) -> str:
    bars = _bars([(source["name"], *_amount(source)) for source in card["sources"]])
    table = _table(tables.sources_table(card))
    return _section("Sources", "", bars, table, _details("Citations", tables.citations_table(card)))


def _licenses(card: dict) -> str:
    bars = _bars([(name or "unknown", *_amount(counts)) for name, counts in card["licenses"].items()])
    lead = "As each document states it, or else its source."
    return _section("Licences", lead, bars, _table(tables.licenses_table(card)))


def _amount(counts: dict) -> tuple[int, str]:
    """Tokens, or text where it is not tokenized."""
    if "tokens" in counts:
        return counts["tokens"], f"{human_count(counts['tokens'])} tokens"
    return counts.get("bytes", 0), human_bytes(counts.get("bytes", 0))


def _lengths(card: dict) -> str:
    histograms = [source["lengths"] for source in card["sources"] if "lengths" in source]
    bins = max((len(histogram["documents"]) for histogram in histograms), default=0)
    figures = []
    for name, caption in (
        ("documents", "Documents by length in tokens."),
        ("tokens", "Tokens by the length of their document: what training sees."),
    ):
        counts = [sum(h[name][i] for h in histograms if i < len(h[name])) for i in range(bins)]
        if any(counts):
            first = next(i for i, count in enumerate(counts) if count)
            labels = [_power(i) for i in range(first, bins)]
            figures.append(_figure(_histogram(counts[first:], labels, caption), caption))
    return _section("Lengths", "", f"<div class=grid>{''.join(figures)}</div>" if figures else "")


def _power(i: int) -> str:
    """2^i as a context length is written: 512, 4K, 128K."""
    return f"{2 ** (i % 10)}{('', 'K', 'M', 'G')[i // 10]}"


def _dropped(card: dict) -> str:
    table = tables.dropped_table(card)
    if not table.rows:
        return ""
    bars = [_shares(source) for source in card["sources"]]
    used = {name for source in card["sources"] for name, share in _groups(source).items() if share}
    legend = "".join(
        f'<span><i style="background:var(--{colour})"></i>{text(name)}</span>'
        for name, colour in COLOURS.items()
        if name in used
    )
    lead = "Where each source's documents went. The dropped ones are kept beside the curated text, by reason."
    return _section(
        "What was dropped, and why",
        lead,
        f"<div class=card>{''.join(bars)}<div class=legend>{legend}</div></div>",
        _table(tables.flow_table(card)),
        _table(table),
    )


def _groups(source: dict) -> dict[str, int]:
    counts = {"kept": source.get("documents", 0)} | dict.fromkeys(GROUPS, 0)
    for reason, dropped in source["dropped"].items():
        counts[group_of(reason)] += dropped["documents"]
    return counts


def _shares(source: dict) -> str:
    counts = _groups(source)
    total = sum(counts.values()) or 1
    parts = "".join(
        f'<u style="width:{count / total:.3%};background:var(--{COLOURS[name]})" '
        f'title="{text(name)}: {count:,} documents, {count / total:.1%}"></u>'
        for name, count in counts.items()
        if count
    )
    kept = f"{counts['kept'] / total:.1%} kept"
    return f"<div class=bar><span>{text(source['name'])}</span><i>{parts}</i><b>{kept}</b></div>"


def _duplicates(card: dict) -> str:
    table = tables.clusters_table(card)
    lead = "Copies and near-copies that were found together; the first document of each cluster stayed."
    bars = _bars([(f"{size} documents", int(number.replace(",", "")), number) for size, number, _ in table.rows])
    return _section("Clusters of duplicates", lead, bars, _table(table))


def _languages(card: dict) -> str:
    total = sum(card["languages"].values())
    shown = list(card["languages"].items())[:SHOWN_LANGUAGES]
    bars = _bars([(name, count, f"{count / total:.1%}") for name, count in shown])
    every = _details("All languages", tables.languages_table(card))
    return _section("Languages", "Of the documents that stayed.", bars, every)


def _samples(card: dict) -> str:
    parts = []
    for source in card["sources"]:
        samples = "".join(
            f"<div class=sample><span>{text(sample['id'])}"
            f"{' · ' + text(sample['license']) if sample['license'] else ''}"
            f"{' · ' + text(sample['url']) if sample['url'] else ''}</span><pre>{text(sample['text'])}</pre></div>"
            for sample in source["samples"]
        )
        parts.append(f"<h3>{text(source['name'])}</h3>{samples}" if samples else "")
    return _section("Samples", "Chosen by place or by a hash, not by hand.", *parts)


# Pieces


def _section(title: str, introduction: str, *parts: str) -> str:
    body = "".join(parts)
    lead = f"<p class=lead>{text(introduction)}</p>" if introduction else ""
    return f"<section><h2>{text(title)}</h2>{lead}{body}</section>" if body else ""


def _bars(rows: Sequence[tuple[str, int, str]]) -> str:
    """Horizontal bars from zero: name, length, and what is written at the end."""
    longest = max((value for _, value, _ in rows), default=0)
    if not longest:
        return ""
    items = (
        f'<div class=bar><span>{text(name)}</span><i><u style="width:{value / longest:.2%};background:var(--blue)"></u>'
        f"</i><b>{text(label)}</b></div>"
        for name, value, label in rows
    )
    return f"<div class=card>{''.join(items)}</div>"


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    heading = "".join(f"<th>{text(name)}</th>" for name in table.heading)
    rows = "".join(
        f"<tr><th>{text(row[0])}</th>{''.join(f'<td>{text(value)}</td>' for value in row[1:])}</tr>"
        for row in table.rows
    )
    kind = "words" if table.words else "numbers"
    return f"<div class=card><table class={kind}><thead><tr>{heading}</tr></thead><tbody>{rows}</tbody></table></div>"


def _details(title: str, table: Table) -> str:
    body = _table(table)
    return f"<details><summary>{text(title)}</summary>{body}</details>" if body else ""


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{text(caption)}</figcaption></figure>"


def _histogram(counts: Sequence[int], labels: Sequence[str], name: str) -> str:
    """Bars over labels, the first label where the first bar begins."""
    step = (WIDTH - LEFT) / len(counts)
    floor, high = HEIGHT - BOTTOM, max(counts)
    scale = (floor - TOP) / high

    def lines() -> Iterable[str]:
        for share in (0, 0.5, 1):
            y = floor - share * (floor - TOP)
            yield f'<path d="M{LEFT} {y:.1f}H{WIDTH}" class=rule />'
            yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor=end>{human_count(share * high)}</text>'
        for i, count in enumerate(counts):
            x, size = LEFT + i * step, count * scale
            hint = f"<title>from {text(labels[i])} tokens: {count:,}</title>"
            shape = f'x="{x + 1:.1f}" y="{floor - size:.1f}" width="{step - 2:.1f}" height="{size:.1f}" rx="2"'
            yield f"<rect {shape} fill='var(--blue)'>{hint}</rect>"
            if i % (len(counts) // 9 + 1) == 0:
                yield f'<text x="{x:.1f}" y="{floor + 16}" text-anchor=middle>{text(labels[i])}</text>'

        yield f'<text x="{WIDTH}" y="{HEIGHT - 2}" text-anchor=end>tokens (log scale)</text>'

    label = f'role=img aria-label="{text(name)}"'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" {label}>{"".join(lines())}</svg>'


STYLE = """
:root{--sans:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
--page:#f6f7f9;--card:#fff;--ink:#20242a;--muted:#8a93a1;--soft:#667080;--grid:#e4e6ea;
--blue:#2f6bd8;--orange:#cd4805;--green:#2f7258;--violet:#a32b9e;--red:#62090f;--yellow:#9d9459}
@media (prefers-color-scheme:dark){:root{--page:#0f1216;--card:#171b21;--ink:#e6e9ee;--muted:#7b8594;--soft:#939dab;
--grid:#2a3039;--blue:#6ea0ff;--orange:#f37513;--green:#429082;--violet:#eb9dbb;--red:#c92516;--yellow:#f7e04f}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 var(--sans)}
main{max-width:1120px;margin:0 auto;padding:40px 20px 64px}
.kicker{color:var(--blue);font-weight:600;font-size:13px;letter-spacing:.02em}
h1{font-size:34px;line-height:1.15;margin:4px 0 8px;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:21px;margin:0 0 8px;letter-spacing:-.01em}
h3{font-size:15px;margin:28px 0 10px}
section{margin-top:48px}
.lead{color:var(--soft);max-width:70ch;margin:0 0 14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin-top:22px;
background:var(--card);border:1px solid var(--grid);border-radius:14px;overflow:hidden}
.tile{box-shadow:1px 1px 0 var(--grid);padding:14px 18px;display:flex;flex-direction:column}
.tile span,.tile small{color:var(--soft);font-size:12.5px}
.tile b{font-size:22px;font-weight:650;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
.card,figure,.sample,details{background:var(--card);border:1px solid var(--grid);border-radius:14px;padding:12px 18px;
margin:0 0 12px;min-width:0;overflow-x:auto}
details .card{border:0;padding:0 0 8px}
summary{cursor:pointer;font-weight:550}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:16px}
figure svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font:11px var(--sans)}
.rule{stroke:var(--grid);fill:none}
figcaption{color:var(--soft);font-size:13px;margin-top:6px}
.bar{display:grid;grid-template-columns:minmax(90px,170px) 1fr 110px;gap:12px;align-items:center;margin:8px 0;
font-size:14px}
.bar span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.bar i{display:flex;height:16px;border-radius:4px;background:var(--page);overflow:hidden}
.bar u{display:block;height:100%}.bar u+u{box-shadow:-1px 0 var(--card)}
.bar b{font-weight:500;text-align:right;font-variant-numeric:tabular-nums}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;color:var(--soft);font-size:13px;margin-top:12px}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}
.sample span{color:var(--soft);font-size:12.5px;overflow-wrap:anywhere}
pre{font:13px/1.5 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere;margin:4px 0 0;tab-size:4;
max-height:300px;overflow:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{padding:6px 0 6px 16px;vertical-align:top;font-variant-numeric:tabular-nums}
th:first-child{padding-left:0;text-align:left;font-weight:500}
thead th{color:var(--soft);font-weight:400}
tbody tr>*{border-top:1px solid var(--grid)}
.numbers td,.numbers th:not(:first-child){text-align:right}
.words td,.words th{text-align:left;overflow-wrap:anywhere}
@media (max-width:520px){main{padding:24px 14px 40px}h1{font-size:27px}.tiles{grid-template-columns:1fr 1fr}
.bar{grid-template-columns:84px 1fr 74px;gap:8px}section{margin-top:36px}}
@media print{body{background:#fff}figure,.sample,.card{break-inside:avoid}}
"""
