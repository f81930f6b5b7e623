"""Docstrings begin with an imperative or a noun phrase, hardly ever with a bare relative clause."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import opendeep_jax

ROOT = Path(opendeep_jax.__file__).parent.parent
RELATIVE = re.compile(r"(What|Whatever|Whether|Which|Whichever|Where|Who|Whoever|Whose|How|Why|That|Of (?!course\b))\b")
MOST = 0.03
"""Part of the docstrings that may begin so: some are whole sentences."""


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of the docstrings of modules, classes, functions, and of names that are assigned to."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for before, statement in zip([node if documented else None, *body], body, strict=False):
            holder = before is node or isinstance(before, ast.Assign | ast.AnnAssign)
            if holder and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                if isinstance(statement.value.value, str):
                    yield statement.lineno, statement.value.value.strip()


def test_hardly_any_docstring_begins_with_a_relative_clause():
    count, found = 0, []
    for package in ("opendeep_jax", "kernels_pallas", "configs"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for line, text in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
                count += 1
                if RELATIVE.match(text):
                    found.append(f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}")
    assert len(found) < MOST * count, "\n".join([f"{len(found)} of {count}:", *found])


def test_the_check_sees_every_kind_of_docstring():
    body = 'A = 1\n"""What A is."""\nclass B:\n    """B."""\n    c: int\n    """C."""\n'
    text = '"""Module."""\n' + body
    assert [text for _, text in docstrings(ast.parse(text))] == ["Module.", "What A is.", "B.", "C."]
