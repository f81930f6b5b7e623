"""Conditions on a record's fields, as data.sources.N.keep writes them: `lang=en`, `score>=3`, `kind!=code`."""

import operator
import re
from typing import Any, NamedTuple

CONDITION = re.compile(r"([^=<>!]+)(>=|<=|!=|==|=|<|>)(.*)", re.DOTALL)
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class Condition(NamedTuple):
    """A parsed condition, as `Condition("score", ">=", "3")`."""

    field: str
    sign: str
    """`=`, `!=`, or a key of COMPARISONS."""
    value: str

    def fails(self, found: Any, text: str) -> str:
        """Return why a field's value does not meet the condition, nothing if it does. `text` is the value as text."""
        if self.sign in COMPARISONS:
            number = as_number(found if isinstance(found, int | float) and not isinstance(found, bool) else text)
            if number is None:
                return f"{self.field} is no number"
            return (
                ""
                if COMPARISONS[self.sign](number, float(self.value))
                else f"{self.field} is not {self.sign}{self.value}"
            )
        wanted, same = self.value, text == self.value
        if isinstance(found, bool):
            same = text.lower() == wanted.lower()
        if self.sign == "!=":
            return f"{self.field} is {wanted}" if same else ""
        return "" if same else f"{self.field} is not {wanted}"


def parse_condition(text: str) -> Condition | None:
    """The condition that `text` spells, or None if it spells none, as one that compares with no number."""
    match = CONDITION.fullmatch(text)
    if not match or not match[1].strip():
        return None
    sign = "=" if match[2] == "==" else match[2]
    found = Condition(match[1].strip(), sign, match[3].strip())
    return None if sign in COMPARISONS and as_number(found.value) is None else found


def as_number(value: Any) -> float | None:
    """The value as a number, or None if it spells none (not even one that is not finite)."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None
