"""A configuration as a recipe: Python that a person reads, changes, and gives to `opendeep train --config=`."""

import dataclasses
import json
from collections.abc import Collection
from typing import Any

from opendeep_jax.config.schema import RunConfig

WIDTH = 100


def recipe_source(config: RunConfig, documentation: str, named: Collection[str] = ()) -> str:
    """Return the text of a recipe file whose get_config() gives `config`; fields at their defaults are left out.

    Args:
        documentation: the file's docstring.
        named: dotted names of fields that are written even at their defaults.
    """
    modules: dict[str, set[str]] = {}
    body = _expression(config, "", named, "    ", modules)
    imports = "".join(f"from {module} import {_listed(sorted(names))}\n" for module, names in sorted(modules.items()))
    quoted = documentation.strip().replace("\\", "\\\\").replace('"""', "'''")
    return f'"""{quoted}\n"""\n\n{imports}\n\ndef get_config() -> RunConfig:\n    """The run."""\n    return {body}\n'


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 4 else "(\n" + "".join(f"    {name},\n" for name in names) + ")"


def _expression(value: Any, name: str, named: Collection[str], indent: str, modules: dict[str, set[str]]) -> str:
    if dataclasses.is_dataclass(value):
        kind = type(value)
        modules.setdefault(kind.__module__, set()).add(kind.__name__)
        parts = []
        for field in dataclasses.fields(value):
            mine, dotted = getattr(value, field.name), f"{name}.{field.name}".lstrip(".")
            if mine != _default(field) or any(f"{one}.".startswith(f"{dotted}.") for one in named):
                parts.append(f"{field.name}={_expression(mine, dotted, named, indent + '    ', modules)}")
        return _call(kind.__name__, parts, indent)
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        deeper = indent + "    "
        parts = [_expression(part, f"{name}.{index}", named, deeper, modules) for index, part in enumerate(value)]
        return _call("", parts, indent, trailing=len(parts) == 1)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _call(name: str, parts: list[str], indent: str, trailing: bool = False) -> str:
    line = f"{name}({', '.join(parts)}{',' * trailing})"
    if "\n" not in line and len(indent) + len(line) < WIDTH:
        return line
    return f"{name}(\n" + "".join(f"{indent}    {part},\n" for part in parts) + f"{indent})"
