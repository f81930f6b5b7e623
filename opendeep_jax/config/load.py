"""Conversion of recipes to configurations and of configurations to and from JSON, and a run's saved configuration."""

import dataclasses
import difflib
import importlib.util
import json
import os
import re
import traceback
from pathlib import Path
from typing import Any, get_args, get_origin

import opendeep_jax
from opendeep_jax.config.checks import ConfigError, check_run, deferred
from opendeep_jax.config.files import write_atomically
from opendeep_jax.config.limits import field_types
from opendeep_jax.config.schema import RunConfig, to_dict

CONFIG_FILE = "config.json"
DIFF_FILE = "config_diff.txt"
SAME_AS_RECIPE = "No difference from the recipe.\n"

HARMLESS = (
    "name",
    "model.context_length",
    "train.log_every",
    "train.sample_every",
    "train.sample_prompts",
    "train.sample_tokens",
    "train.compilation_cache",
    "evaluation.",
    "checkpoint.",
    "faults.",
    "tracking.",
    "hardware.",
    "data.directory",
    "data.workers",
)
"""Fields, and groups of fields, that cannot change what a run computes: they may differ when it is resumed."""

ROUNDING = (
    "parallel.",
    "model.remat.",
    "model.execution.",
    "train.loss_chunk",
    "train.accumulation_steps",
    "train.compiler_options",
    "train.working_memory_gb",
)
"""Fields like the above that change only the order of sums: a resumed run may have other devices and memory."""

IMPORTED_RECIPE = "recipe.py"
"""The file that `opendeep import` leaves in a work directory."""


def shipped_directory(installed: str, source: str) -> Path:
    """Return a directory that ships with OpenDeep: inside the installed package, or beside it in a source tree."""
    package = Path(opendeep_jax.__file__).parent
    return package / installed if (package / installed).is_dir() else package.parent / source


def recipe_directory() -> Path:
    """Return the directory of the recipes."""
    return shipped_directory("recipes", "configs")


def recipe_names() -> list[str]:
    """Names of the recipes that ship with OpenDeep, for `--config=NAME`; corpora are `corpora/NAME`."""
    root = recipe_directory()
    found = [*root.glob("*.py"), *root.glob("corpora/*.py")]
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in found if not path.stem.startswith("_"))


def load_recipe(name_or_path: str) -> RunConfig:
    """The configuration of a recipe: the name of one that ships with OpenDeep, or the path of a .py file.

    A recipe of a family has a table SIZES, and get_config takes one of its keys: `llama3:70b`. Without one it takes its
    own default.

    Raises ConfigError for an unknown name or size, and for a file that fails or has no `get_config() -> RunConfig`.
    """
    path, size = _recipe_file(name_or_path)
    try:
        spec = importlib.util.spec_from_file_location(f"opendeep_recipe_{path.stem}", path)
        assert spec is not None and spec.loader is not None  # every .py file has both
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sizes = getattr(module, "SIZES", {})
        if size is not None and size not in sizes:
            raise ConfigError(_no_such_size(size, list(sizes)))
        config = module.get_config(*filter(None, (size,))) if hasattr(module, "get_config") else None
    except ConfigError as error:
        raise ConfigError(f"Recipe {path}: {error}") from error
    except Exception as error:  # a recipe is the user's own Python: whatever fails in it is theirs to read
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise ConfigError(f"Recipe {where}: {type(error).__name__}: {error}.") from error
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"Recipe {path}: it must define get_config() that returns a RunConfig. For an example, see "
            f"{recipe_directory() / 'quickstart.py'}."
        )
    return config


def recipe_title(name_or_path: str) -> str:
    """Return the directory name of a recipe's runs: `llama3:8b` is `llama3-8b`, `mine/run.py` is `run`."""
    path, colon, size = _parts(name_or_path)
    return Path(path).name.removesuffix(".py") + colon.replace(":", "-") + size


def _parts(name_or_path: str) -> tuple[str, str, str]:
    """A recipe's name or path, a colon, and a size; the latter two empty where there are none."""
    if Path(name_or_path).is_file() or ":" not in name_or_path:
        return name_or_path, "", ""
    name, colon, size = name_or_path.rpartition(":")
    return name, colon, size.lower()


def _recipe_file(name_or_path: str) -> tuple[Path, str | None]:
    """The file of a recipe, and the size that is asked of it."""
    name, colon, size = _parts(name_or_path)
    if name in recipe_names():
        return recipe_directory() / f"{name}.py", size if colon else None
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        hint = did_you_mean(path.stem, recipe_names())
        raise ConfigError(
            f"--config={name_or_path}: neither a recipe file nor the name of a recipe.{hint} "
            f"Recipes: {', '.join(recipe_names())}. Your own is the path of a .py file with get_config()."
        )
    return path, size if colon else None


def _no_such_size(size: str, sizes: list[str]) -> str:
    if not sizes:
        return f"it has no sizes, and {size!r} is asked for. Leave out what follows the colon."
    return f"it has no size {size!r}.{did_you_mean(size, sizes)} Sizes: {', '.join(sizes)}."


def did_you_mean(word: str, known: list[str], prefix: str = "") -> str:
    """` Did you mean X?` for the known word that is most like `word`, or nothing when none is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def to_json(config: RunConfig) -> str:
    """The whole configuration as indented JSON; `from_json` gives back an equal one."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str, origin: str = "configuration") -> RunConfig:
    """The configuration that `to_json` wrote. Fields that are missing take their defaults.

    Raises ConfigError, naming `origin`, for text that is not JSON, unknown fields, and values that break a rule.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{origin}: not JSON ({error}). Restore the file, or start in a new directory.") from error
    with deferred():
        config = _with_context(_build(RunConfig, values, "", origin))
    check_run(config)
    return config


def _with_context(config: RunConfig) -> RunConfig:
    """A run that was started before its rows had to fit its model's context says what it was trained on."""
    context, rows = config.model.context_length, [config.data.sequence_length]
    rows += [phase.sequence_length for phase in config.data.phases]
    if not all(type(number) is int for number in (context, *rows)) or not 0 < context < config.data.longest_row:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, context_length=config.data.longest_row))


REMOVED = ("data.curation.minhash_engine",)
"""Fields that runs of earlier versions have, and that decide nothing about a run that has begun."""


def _build(annotation: Any, value: Any, name: str, origin: str) -> Any:
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, dict):
            raise ConfigError(f"{origin}: {name or 'the top'} = {value!r} must be an object of named fields.")
        fields = field_types(annotation)
        value = {key: v for key, v in value.items() if f"{name}.{key}" not in REMOVED}
        for key in value:
            if key not in fields:
                dotted = f"{name}.{key}".lstrip(".")
                raise ConfigError(f"{origin}: there is no field {dotted}.{did_you_mean(key, list(fields))}")
        return annotation(
            **{key: _build(fields[key], v, f"{name}.{key}".lstrip("."), origin) for key, v in value.items()}
        )
    if get_origin(annotation) is tuple and isinstance(value, list):
        element = get_args(annotation)[0]
        return tuple(_build(element, v, f"{name}.{index}", origin) for index, v in enumerate(value))
    return value


def record_context_length(config: RunConfig, recipe_config: RunConfig | None, workdir: str | os.PathLike) -> None:
    """Write `config`'s context length into a run that has ended, of which it is the one setting still in use."""
    there, wanted = load_run_config(workdir), config.model.context_length
    if there.model.context_length != wanted:
        there = dataclasses.replace(there, model=dataclasses.replace(there.model, context_length=wanted))
        save_run_config(there, recipe_config, workdir)


def diff(a: Any, b: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Fields in which two configurations differ: (dotted name, value in `a`, value in `b`), in schema order."""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        fields = [(field.name, getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a)]
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and any(map(dataclasses.is_dataclass, a)):
        fields = [(str(index), *pair) for index, pair in enumerate(zip(a, b, strict=True))]
    else:
        return [] if a == b else [(name, a, b)]
    return [entry for key, x, y in fields for entry in diff(x, y, f"{name}.{key}".lstrip("."))]


def format_diff(differences: list[tuple[str, Any, Any]]) -> str:
    """One aligned line for each difference: `optimizer.learning_rate  0.0003 -> 0.001`."""
    width = max((len(name) for name, _, _ in differences), default=0)
    return "".join(f"{name:<{width}}  {a!r} -> {b!r}\n" for name, a, b in differences)


def save_run_config(config: RunConfig, recipe_config: RunConfig | None, workdir: str | os.PathLike) -> None:
    """Write `config.json`, and in `config_diff.txt` how `config` differs from its recipe, into `workdir`.

    Without a recipe, the difference that is there already is brought up to date.
    """
    workdir = Path(workdir)
    if recipe_config is not None:
        changes = format_diff(diff(recipe_config, config))
    elif (workdir / CONFIG_FILE).exists() and (workdir / DIFF_FILE).exists():
        before = (workdir / DIFF_FILE).read_text(encoding="utf-8")
        changes = _updated(before, diff(load_run_config(workdir), config))
    else:
        changes = ""
    write_atomically(workdir / CONFIG_FILE, to_json(config))
    write_atomically(workdir / DIFF_FILE, changes or SAME_AS_RECIPE)


def _updated(text: str, changes: list[tuple[str, Any, Any]]) -> str:
    """Lines of `format_diff` after further changes."""
    pairs = dict(line.split(maxsplit=1) for line in text.splitlines() if " -> " in line)
    for name, there, here in changes:
        first = pairs.pop(name, f"{there!r} -> ").partition(" -> ")[0]
        if first != repr(here):
            pairs[name] = f"{first} -> {here!r}"
    width = max(map(len, pairs), default=0)
    return "".join(f"{name:<{width}}  {pair}\n" for name, pair in pairs.items())


def load_run_config(workdir: str | os.PathLike, given: str = "") -> RunConfig:
    """The configuration of the run in `workdir`. Raises ConfigError when there is none, or it cannot be read.

    Args:
        given: the setting that named the directory, for the error; empty says --workdir.
    """
    path = Path(workdir) / CONFIG_FILE
    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{given or f'--workdir={workdir}'}: no run can be read there, as {path.name} is missing or unreadable "
            f"({error}). Give the directory that `opendeep train --workdir=...` wrote."
        ) from error


def parent_of(text: str) -> tuple[Path, int | None]:
    """The directory and the step that `--from=RUN@STEP` names; no step where it is RUN alone. Raises ConfigError."""
    run, at, step = text.rpartition("@")
    if not at or Path(text).is_dir():
        return Path(text), None
    if not re.fullmatch(r"[0-9]+", step, flags=re.ASCII) or not run:
        raise ConfigError(
            f"--from={text}: after the @ comes the step of a checkpoint, a whole number, as in --from=runs/trunk@500. "
            "Leave it out for the newest."
        )
    return Path(run), int(step)


def is_among(name: str, fields: tuple[str, ...]) -> bool:
    """Return whether a dotted name is among `fields` or in one of their groups (names that end in a dot)."""
    return any(name == field or (field.endswith(".") and name.startswith(field)) for field in fields)
