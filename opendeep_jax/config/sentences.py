"""Error sentences for a configuration's fields: `field = value: rule. fix.`"""

from collections.abc import Iterator
from typing import Any


def problem(name: str, value: Any, rule: str, fix: str) -> str:
    """The sentence that tells the user what is wrong with one field; `fix` may be empty."""
    return f"{name} = {value!r}: {rule}." + (f" {fix}." if fix else "")


def at_least(minimum: float, name: str, config: Any, *fields: str) -> Iterator[str]:
    """Problems of the fields below `minimum`; fields inside `config` are named relative to `name`."""
    for field in fields:
        if getattr(config, field) < minimum:
            yield problem(f"{name}.{field}", getattr(config, field), f"must be at least {minimum}", "")


def above_zero(name: str, config: Any, *fields: str) -> Iterator[str]:
    """Problems of the fields that are not greater than 0."""
    for field in fields:
        if not getattr(config, field) > 0:
            yield problem(f"{name}.{field}", getattr(config, field), "must be greater than 0", "")
