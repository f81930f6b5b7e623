"""Tables as text: label and value in two columns, aligned columns for a terminal, Markdown and LaTeX."""

import re
from collections.abc import Collection, Sequence

LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$", "×": r"$\times$",
    "`": r"\textasciigrave{}", "'": r"\textquotesingle{}", "[": "{[}", "]": "{]}",
} | {character: f"\\{character}" for character in "&%$#_{}"}  # fmt: skip
"""LaTeX that prints characters which it would take for a command, a ligature or an option."""


def key_value_table(rows: Sequence[tuple[str, str]]) -> str:
    """Return two aligned columns. A row with an empty value is the heading of the rows after it.

    key_value_table([("Model", ""), ("parameters", "15.83M"), ("active", "5.21M")]) gives

        Model
          parameters  15.83M
          active      5.21M
    """
    width = max((len(label) for label, value in rows if value), default=0)
    lines = []
    for label, value in rows:
        if not value:
            lines += [""] * bool(lines) + [label]
            continue
        first, *rest = value.split("\n")
        lines += [f"  {label:<{width}}  {first}"] + [" " * (width + 4) + line for line in rest]
    return "\n".join(lines)


def text_table(lines: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Return aligned columns with two spaces between them; the columns in `right` are set flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = ([c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
             for line in lines)  # fmt: skip
    return "\n".join("  ".join(line).rstrip() for line in cells)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, headings first."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    cells.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def latex_text(text: str) -> str:
    """Return a text as LaTeX that prints it, on one line."""
    if power := re.fullmatch(r"([-+]?\d+(?:\.\d+)?)e([-+]?\d+)", text):
        return rf"${power[1]}\times10^{{{int(power[2])}}}$"
    return re.sub("-(?=-)", "-{}", "".join(LATEX.get(c, c) if c.isprintable() else " " for c in text))


def latex_table(lines: Sequence[Sequence[str]], title: str) -> str:
    """Return a table in LaTeX, for packages booktabs and textcomp; text to the left, numbers to the right."""
    head, *body = ([latex_text(cell) for cell in line] for line in lines)
    sides = "".join("r" if _all_numbers(column) else "l" for column in zip(*lines[1:], strict=True)) or "l" * len(head)
    rows = [" & ".join(line) + r" \\" for line in (head, *body)]
    opening = [f"% {title}".replace("\n", " "), r"% \usepackage[T1]{fontenc}, \usepackage{textcomp,booktabs}"]
    opening += [rf"\begin{{tabular}}{{{sides}}}", r"\toprule", rows[0], r"\midrule"]
    return "\n".join([*opening, *rows[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def _all_numbers(cells: Sequence[str]) -> bool:
    return all(cell == "-" or re.match(r"[-+]?[\d.]", cell) for cell in cells)
