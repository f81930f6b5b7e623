"""Error sentences for a configuration's fields: `field = value: rule. fix.`"""

from collections.abc import Iterator
from typing import Any

from opendeep_jax.config.limits import Limit


def problem(name: str, value: Any, rule: str, fix: str) -> str:
    """The sentence that tells the user what is wrong with one field; `fix` may be empty."""
    return f"{name} = {value!r}: {rule}." + (f" {fix}." if fix else "")


def limited(limit: Limit, name: str, config: Any, *fields: str) -> Iterator[str]:
    """Problems of fields that keep a limit in some configurations only, so that no annotation says it.

    Args:
        name: of `config` among all settings.
        fields: of `config`.
    """
    for field in fields:
        value = getattr(config, field)
        if not limit.holds(value):
            yield problem(f"{name}.{field}", value, limit.rule, "")
