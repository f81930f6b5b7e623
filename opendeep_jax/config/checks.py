"""The rules that tie configuration fields together. Each failure says the value, the rule and the fix.

Types are read from the dataclasses' own annotations, so a wrong literal or a text where a number belongs is refused
in a Python recipe too. All problems of a configuration are collected and reported at once. Standard library only.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from opendeep_jax.config import model_rules, rules
from opendeep_jax.config.limits import field_types, limits_of
from opendeep_jax.config.sentences import problem

_deferred = contextvars.ContextVar("deferred", default=False)


class ConfigError(ValueError):
    """A configuration, file or directory that a run cannot start from; the message is written for its user."""


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Defer the checks until the block ends, so that several fields can change together.

    Whoever uses this calls `check_run` on the result.
    """
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


def check_model(model: Any) -> None:
    """Raise ConfigError for a `ModelConfig` with wrong types, or sizes that contradict each other."""
    if not _deferred.get():
        _raise_any(
            list(type_problems("model", model)) or [*limit_problems("model", model), *model_rules.model_problems(model)]
        )


def check_run(run: Any) -> None:
    """Raise ConfigError for a `RunConfig` with wrong types, or parts that contradict each other, the model's too."""
    if not _deferred.get():
        _raise_any(
            list(type_problems("", run))
            or [*limit_problems("", run), *model_rules.model_problems(run.model), *rules.run_problems(run)]
        )


def check_devices(run: Any, device_count: int) -> None:
    """Raise ConfigError unless the mesh takes exactly `device_count` devices and the batches divide over it."""
    sizes = rules.axis_sizes(run.parallel)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    described = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "1"
    if free and device_count % fixed:
        raise ConfigError(
            f"parallel = {described}: the fixed axes take {fixed} devices, which does not divide the {device_count} "
            f"found here. Set them so that their product divides {device_count}."
        )
    if not free and fixed != device_count:
        raise ConfigError(
            f"parallel = {described}: the mesh takes {fixed} device{'s' * (fixed != 1)}, and {device_count} "
            f"{'are' if device_count != 1 else 'is'} found here. Set --parallel.fsdp=-1 to use what is there, "
            f"or sizes whose product is {device_count}."
        )
    _raise_any(list(rules.mesh_problems(run, rules.axis_sizes(run.parallel, device_count))))


def type_problems(name: str, config: Any) -> Iterator[str]:
    """Yield a sentence for every field under the dataclass `config` whose value is not of its annotated type."""
    for field, annotation in field_types(config).items():
        yield from _value_problems(f"{name}.{field}".lstrip("."), annotation, getattr(config, field))


def limit_problems(name: str, config: Any) -> Iterator[str]:
    """Yield a sentence for every field under the dataclass or tuple `config` whose value breaks its annotated limit."""
    limits, values = {}, dict(enumerate(config)) if isinstance(config, tuple) else {}
    if dataclasses.is_dataclass(config):
        limits, values = limits_of(config), {field: getattr(config, field) for field in field_types(config)}
    for field, value in values.items():
        dotted = f"{name}.{field}".lstrip(".")
        if field in limits and not limits[field].holds(value):
            yield problem(dotted, value, limits[field].rule, "")
        yield from limit_problems(dotted, value)


def expected(annotation: Any) -> str:
    """Describe the values that a field's type annotation allows: `one of 'mla', 'gqa'`, `a whole number`, ..."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return f"a tuple, each element {expected(get_args(annotation)[0])}"
    words = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text"}
    return words.get(annotation) or f"a {annotation.__name__}"


def _value_problems(name: str, annotation: Any, value: Any) -> Iterator[str]:
    if dataclasses.is_dataclass(annotation) and isinstance(value, annotation):
        yield from type_problems(name, value)
    elif get_origin(annotation) is tuple and isinstance(value, tuple):
        for index, element in enumerate(value):
            yield from _value_problems(f"{name}.{index}", get_args(annotation)[0], element)
    elif not _fits(annotation, value):
        given = "" if type(value) in (annotation, str) else f", not {type(value).__name__}"
        yield problem(name, value, f"must be {expected(annotation)}{given}", "")


def _fits(annotation: Any, value: Any) -> bool:
    if get_origin(annotation) is Literal:
        return isinstance(value, str) and value in get_args(annotation)
    if annotation is float:  # a whole number is a number, a truth value and an infinity are not
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is annotation


def _raise_any(problems: list[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n  ".join([f"{len(problems)} settings cannot work:", *problems]))
