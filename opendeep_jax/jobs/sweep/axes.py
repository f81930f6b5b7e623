"""Axes of a sweep: their values, the combinations of these, and names that tell runs apart.

    --sweep.optimizer.learning_rate=1e-4,3e-4        a list: for every method
    --sweep.optimizer.learning_rate=1e-4:1e-2:log    a range: for random and optuna
    --sweep.model.moe.experts_per_token=2:8          a range of whole numbers, both ends included

The elements of a tuple are divided by spaces, so that commas divide values: --sweep.model.remat.names="a b,c".
"""

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_origin

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.limits import field_types
from opendeep_jax.config.overrides import apply
from opendeep_jax.config.schema import RunConfig

MOST_CHARACTERS = 180
"""Longest name of a run: file systems take 255 bytes, and suffixes come behind it."""
Combination = dict[str, str]
"""A value, as it is written on the command line, for the field of every axis."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Closed interval of numbers."""

    low: float
    high: float
    log: bool
    whole: bool

    def text(self, number: float) -> str:
        """Return a number of the range as it is given to a run: whole, or with four digits that count."""
        if self.whole:
            return str(round(number))
        return str(min(max(float(f"{number:.4g}"), self.low), self.high))


@dataclasses.dataclass(frozen=True)
class Axis:
    """One field that a sweep varies."""

    field: str
    """Its dotted name."""
    alias: str
    """Shortest suffix of the name that differs from the other axes."""
    text: str
    """Its values as they were given."""
    annotation: Any
    """The field's type."""
    values: tuple[str, ...]
    """() for a range."""
    range: Range | None = None

    def arguments(self, value: str) -> list[str]:
        """Return what sets the field to `value` on the command line of a run."""
        return [f"--{self.field}", *value.split()] if _is_tuple(self.annotation) else [f"--{self.field}={value}"]


def parse_axes(base: RunConfig, settings: Mapping[str, str], method: str) -> tuple[Axis, ...]:
    """Return the axes of `settings`, {dotted name of a field: its values as text}.

    Raises ConfigError for fields that there are not, empty lists, ranges that are none, and ranges in a grid or zip.
    """
    if not settings:
        raise ConfigError(
            "A sweep varies one setting or more: say which, as in --sweep.optimizer.learning_rate=1e-4,3e-4."
        )
    aliases = _aliases(list(settings))
    axes = []
    for field, text in settings.items():
        if field == "seed":
            raise ConfigError(f"--sweep.seed={text}: seeds are no axis. Give their number, as in --seeds=3.")
        if field == "name":
            raise ConfigError(f"--sweep.name={text}: the sweep names its runs itself. Leave it out.")
        annotation = _annotation(base, field)
        if annotation is None:
            apply(base, [f"--{field}=0"])  # raises, and knows which name was meant
        interval = _range(field, text, annotation) if annotation in (int, float) else None
        if interval and method not in ("random", "optuna"):
            raise ConfigError(
                f"--sweep.{field}={text}: --method={method} takes lists, as in --sweep.{field}="
                f"{interval.text(interval.low)},{interval.text(interval.high)}. Ranges are for --method=random and "
                "--method=optuna."
            )
        values = () if interval else _values(field, text, annotation)
        axes.append(Axis(field, aliases[field], text, annotation, values, interval))
    return tuple(axes)


def combinations(axes: Sequence[Axis], method: str) -> list[Combination]:
    """Return the combinations of a `grid` or a `zip`, in the order they are run.

    Raises ConfigError for lists to zip that are not equally long.
    """
    lists = [axis.values for axis in axes]
    if method == "zip" and len(set(map(len, lists))) > 1:
        counts = ", ".join(f"{axis.field} has {len(axis.values)}" for axis in axes)
        raise ConfigError(f"--method=zip goes along all lists at once, so they are equally long: {counts}.")
    rows = zip(*lists, strict=True) if method == "zip" else itertools.product(*lists)
    return [{axis.field: value for axis, value in zip(axes, row, strict=True)} for row in rows]


def run_name(config: RunConfig, axes: Sequence[Axis]) -> str:
    """`learning_rate=0.0003,experts_per_token=2,seed=0`: what this run has that others do not, safe as a file name."""
    name = ",".join(f"{axis.alias}={_safe(format_value(value_of(config, axis.field)))}" for axis in axes)
    if len(name) > MOST_CHARACTERS:
        name = f"{name[: MOST_CHARACTERS - 8]}-{_digest(name)}"
    return f"{name},seed={config.seed}"


def value_of(config: RunConfig, field: str) -> Any:
    """Return the value of a field by its dotted name."""
    value: Any = config
    for part in field.split("."):
        value = value[int(part)] if isinstance(value, tuple) else getattr(value, part)
    return value


def format_value(value: Any) -> str:
    """Return a field's value as people write it."""
    return " ".join(map(str, value)) or "empty" if isinstance(value, tuple) else str(value)


def _safe(text: str) -> str:
    safe = re.sub(r"[^\w.+-]", "_", text, flags=re.ASCII)[:60]
    return safe if safe == text else f"{safe}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _aliases(fields: list[str]) -> dict[str, str]:
    aliases = {}
    for field in fields:
        parts = field.split(".")
        for count in range(1, len(parts) + 1):
            ending = parts[-count:]
            if sum(other.split(".")[-count:] == ending for other in fields) == 1:
                break
        aliases[field] = ".".join(ending)
    return aliases


def _annotation(config: RunConfig, field: str) -> Any:
    """Return the type of a field that can be set; None if there is no such field."""
    *path, last = field.split(".")
    try:
        parent = value_of(config, ".".join(path)) if path else config
    except (AttributeError, ValueError, IndexError, TypeError):
        return None
    if not dataclasses.is_dataclass(parent):
        return None
    types = field_types(parent)
    return None if dataclasses.is_dataclass(types.get(last)) else types.get(last)


def _is_tuple(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def _values(field: str, text: str, annotation: Any) -> tuple[str, ...]:
    values = [value.strip().replace("\\,", ",") for value in re.split(r"(?<!\\),", text)]
    if not _is_tuple(annotation) and "" in values:
        raise ConfigError(f"--sweep.{field}={text}: a value is missing. Divide values by single commas, as in 1,2,4.")
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ConfigError(f"--sweep.{field}={text}: {', '.join(repeated)} stands there more than once. Give it once.")
    return tuple(values)


def _range(field: str, text: str, annotation: Any) -> Range | None:
    if ":" not in text:
        return None
    ends, scale = text.split(":")[:2], text.split(":")[2:]
    whole = annotation is int
    try:
        low, high = (int(end) if whole else float(end) for end in ends)
        fits = low < high and scale in ([], ["log"]) and (low > 0 or not scale) and math.isfinite(high - low)
    except ValueError:
        fits = False
    if not fits:
        example = "2:8" if whole else "1e-4:1e-2 or 1e-4:1e-2:log"
        rule = "a range is low:high or low:high:log, with low below high, and above 0 for log"
        raise ConfigError(
            f"--sweep.{field}={text}: {rule}; its field must be {'a whole number' if whole else 'a number'}. "
            f"Write it as {example}, or give a list."
        )
    return Range(low, high, bool(scale), whole)
