"""The command line of a run: absl carries what belongs to the process, tyro every field of the configuration.

    opendeep train --config=quickstart --workdir=runs/a --optimizer.learning_rate=3e-4 --model.moe.experts_per_token=2

All overrides are applied together, and only their result is checked. tyro parses the values; names are looked up here
first, so that a wrong one is answered with the right one, and every error is one `ConfigError` without a box around it.
"""

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import tyro
from absl import flags

from opendeep_jax.config.checks import ConfigError, check_run, deferred, expected
from opendeep_jax.config.limits import field_types
from opendeep_jax.config.load import (
    CONFIG_FILE,
    did_you_mean,
    load_recipe,
    load_run_config,
    parent_of,
    recipe_names,
    recipe_title,
)
from opendeep_jax.config.schema import RunConfig, SourceConfig
from opendeep_jax.config.source_paths import same_text, source_name
from opendeep_jax.config.synonyms import SETTINGS, known_synonym

TYRO_MARKERS = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
_EPOCHS = " A run's length is counted in steps or, with --train.steps=0, in --train.total_tokens."


@dataclasses.dataclass(frozen=True)
class Launch:
    """Settings of the process rather than the run, for example
    `Launch(config_name="quickstart", workdir="runs/quickstart", verbosity=-1, recipe=RunConfig(...))`.
    """

    config_name: str
    """Title of the recipe: its file's name without `.py`, and its size where it has several."""
    workdir: str
    """Directory of the run."""
    verbosity: int
    """absl's log level: 1 debug, 0 info, -1 warnings, -2 errors."""
    recipe: RunConfig | None
    """The recipe's configuration (or the parent's, of a branch) before the command line changed it; None where the work
    directory's own was taken."""
    coordinator_address: str = ""
    """host:port of process 0, in a job of several processes; empty where the environment says."""
    num_processes: int = 0
    """Processes of the job; 0 where the environment says."""
    process_id: int = -1
    """Index of this process; -1 reads it from the environment."""
    config: str = ""
    """The recipe as it was named."""
    parent: str = ""
    """RUN or RUN@STEP, where the run is to be a branch of another."""


def resolve(argv: Sequence[str], program: str = "opendeep train", trains: bool = False) -> tuple[RunConfig, Launch]:
    """The configuration that the arguments after the program's name ask for, and what they say about the process.

    Prints help and raises SystemExit(0) for `--help`. Raises ConfigError for an unknown recipe or field, a value of
    the wrong type, and settings that cannot work together; every problem found is in its message.

    Args:
        trains: the program trains in --workdir: it may take the configuration of the run there, or of one to branch
            from, in place of a recipe.
    """
    process, rest = _parse_process_flags(argv, program)
    for name in ("config", "workdir", "from"):
        refuse_empty(name, process[name].value)
    parent = process["from"].value or ""
    if parent and not trains:
        raise ConfigError(f"--from={parent}: {program} has no use for it. Only `opendeep train` and `launch` branch.")
    if {"-h", "--help"} & set(rest):
        print_help(load_recipe(process.config) if process.config else RunConfig(), process, program)
    if parent and not process.workdir:
        raise ConfigError(f"--from={parent}: --workdir is missing: say where the branch is to be, in a new directory.")
    if process.config:
        base = recipe = load_recipe(process.config)
    else:
        try:
            base, recipe = _without_recipe(process.workdir if trains else None, parent)
        except ConfigError:
            _check_flags(rest)  # a misspelt --confg is the better answer
            raise
    name = recipe_title(process.config or "")
    job = process.coordinator_address, process.num_processes, process.process_id
    workdir, config = process.workdir or f"runs/{name}", apply(base, rest)
    named = any(argument.partition("=")[0] == "--name" for argument in rest)
    if process.workdir and recipe is not None and not named:
        family = recipe.name if process.config else recipe.name.partition("/")[0]  # a branch is no part of its parent
        title = run_title(family, process.workdir)
        recipe, config = (dataclasses.replace(c, name=title) for c in (recipe, config))
    launch = Launch(name, workdir, process.verbosity, recipe, *job, process.config or "", parent)
    return config, launch


def refuse_empty(name: str, value: str | None) -> None:
    """Raise ConfigError for a flag that is given without a value: a shell's variable that is not set, nearly always."""
    if value == "":
        raise ConfigError(f"--{name}=: it has no value. Give one (is a variable of the shell empty?), or leave it out.")


def run_title(name: str, workdir: str) -> str:
    """Return a run's title where `--name` gives none: the recipe's, and behind a slash the directory's if it differs.

    `run_title("quickstart", "runs/mine")` is `quickstart/mine`; in runs/quickstart it is `quickstart`.
    """
    directory = Path(workdir).resolve().name
    return name if not directory or directory == name.rpartition("/")[2] else f"{name}/{directory}"


def _without_recipe(workdir: str | None, parent: str) -> tuple[RunConfig, RunConfig | None]:
    """The configuration of the run in `workdir`, or of the one that it is to branch from; and which it is compared to.

    Raises ConfigError where there is neither.
    """
    if workdir and Path(workdir, CONFIG_FILE).exists():
        return load_run_config(workdir), None
    if parent:
        config = load_run_config(parent_of(parent)[0], f"--from={parent}")
        return config, config
    others = Path(workdir).parent.glob(f"*/{CONFIG_FILE}") if workdir else ()
    there = did_you_mean(Path(workdir or "").name, sorted(path.parent.name for path in others))
    missing = f", and --workdir={workdir} holds no run to go on with.{there} To start one, say" if workdir else ": say"
    raise ConfigError(
        f"--config is missing{missing} what to run, as in --config=quickstart. "
        f"Recipes: {', '.join(recipe_names())}. Your own is the path of a .py file."
    )


def apply(recipe: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """`recipe` with the overrides `--dotted.name=value` (or `--dotted.name value ...`) applied, then checked.

    Raises ConfigError as `resolve` does.
    """
    recipe = _with_sources(recipe, arguments)
    fields = dict(_leaves(RunConfig, recipe))
    overrides = _group(arguments, fields)
    for name, values in overrides.items():
        if fields[name] is bool and values[0] in ("true", "false"):
            overrides[name] = [values[0].capitalize()]
    config = _parse(recipe, overrides)
    if config is None:
        wrong = [
            f"--{name}={' '.join(values)}: expected {expected(fields[name])}."
            for name, values in overrides.items()
            if _parse(recipe, {name: values}) is None
        ]
        raise ConfigError("\n".join(wrong))
    with deferred():
        if any(name.startswith("model.attention.rope.yarn_") for name in overrides):
            # YaRN is added to have a longer context, which a recipe or an imported model may have set.
            if "model.context_length" not in overrides:
                config = dataclasses.replace(config, model=config.model.reaching())
    check_run(config)
    return config


_SOURCE_PATH = re.compile(r"--data\.sources\.(\d+)\.path(?:=(.*))?", re.DOTALL)


def _with_sources(recipe: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """`recipe` with new sources where the arguments give a path: behind the last one, or in the place of another text.

    A source that gets another text keeps its weight and epochs. Its name, license, citation and fields belonged to the
    old one; the path gives it a name.
    """
    sources = list(recipe.data.sources)
    paths = {}
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=False):
        if match := _SOURCE_PATH.fullmatch(argument):
            paths[int(match[1])] = after if match[2] is None else match[2]
    for number, path in sorted(paths.items()):
        if number < len(sources) and path and not same_text(sources[number].path, path):
            old = sources[number]
            others = [source.name for source in sources if source is not old]
            sources[number] = SourceConfig(source_name(path, others), path, weight=old.weight, epochs=old.epochs)
        elif number == len(sources) and path:
            sources.append(SourceConfig(source_name(path, [source.name for source in sources]), path))
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sources=tuple(sources)))


def print_help(recipe: RunConfig, process: flags.FlagValues, program: str) -> NoReturn:
    """Print every field with its meaning and its value in `recipe`, then raise SystemExit(0)."""
    own = "\n".join(f"--{name:<21}{process[name].help}" for name in process)
    tyro.cli(
        RunConfig,
        args=["--help"],
        prog=f"{program} --config=RECIPE [--workdir=DIRECTORY]",
        description=f"{own}\n\nEvery setting of the run, with the recipe's value (or the default if none is given):",
        default=recipe,
        use_underscores=True,
        config=TYRO_MARKERS,
    )
    raise SystemExit(0)  # tyro has exited already; this is for the type checker


def _parse_process_flags(argv: Sequence[str], program: str) -> tuple[flags.FlagValues, list[str]]:
    """absl's flags, in a registry of their own so that nothing global remembers them, and the other arguments."""
    process = flags.FlagValues()
    flags.DEFINE_string("config", None, "Recipe: a name, NAME:SIZE, or the path of a .py file.", flag_values=process)
    flags.DEFINE_string("workdir", None, "Directory of the run; runs/NAME if not given.", flag_values=process)
    text = "Begin as a branch: with the checkpoint of another RUN (or RUN@STEP), weights and moments."
    flags.DEFINE_string("from", None, text, flag_values=process)
    flags.DEFINE_integer("verbosity", -1, "Log level: 1 debug, 0 info, -1 warnings.", flag_values=process)
    text = "Of a job of several processes that no environment describes: host:port of process 0."
    flags.DEFINE_string("coordinator_address", "", text, flag_values=process)
    flags.DEFINE_integer("num_processes", 0, "How many processes that job has.", flag_values=process)
    flags.DEFINE_integer("process_id", -1, "Which of them this one is, from 0.", flag_values=process)
    process.set_gnu_getopt(True)  # `--seed 3 --config=x`: go on behind the 3
    try:
        return process, process([program, *argv], known_only=True)[1:]
    except flags.Error as error:
        raise ConfigError(f"{error}. See {program} --help.") from error


def _leaves(annotation: Any, value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and types of everything that can be set; entries of a tuple of dataclasses by their index."""
    if dataclasses.is_dataclass(annotation):
        for field, kind in field_types(annotation).items():
            yield from _leaves(kind, getattr(value, field), f"{name}.{field}".lstrip("."))
    elif _holds_dataclasses(annotation):
        for index, element in enumerate(value):
            yield from _leaves(get_args(annotation)[0], element, f"{name}.{index}")
    else:
        yield name, annotation


def _holds_dataclasses(annotation: Any) -> bool:
    return get_origin(annotation) is tuple and dataclasses.is_dataclass(get_args(annotation)[0])


def _group(arguments: Sequence[str], fields: dict[str, Any]) -> dict[str, list[str]]:
    """Arguments as {field: its values}, the last occurrence winning. Raises ConfigError for what is no field."""
    overrides: dict[str, list[str]] = {}
    problems = []
    name = None
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            overrides[name] = [value] if equals else []
            if name not in fields:
                problems.append(f"--{name}: {_why_unknown(name, fields)}")
        elif name is not None and (get_origin(fields.get(name)) is tuple or not overrides[name]):
            overrides[name].append(argument)
        else:
            hint = f" Did you mean --config={argument}?" if argument.partition(":")[0] in recipe_names() else ""
            problems.append(f"{argument}: settings are written --name=value.{hint}")
    problems += [
        f"--{name}: a value is missing; expected {expected(fields[name])}."
        for name, values in overrides.items()
        if name in fields and not values and get_origin(fields[name]) is not tuple
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return overrides


def _check_flags(arguments: Sequence[str]) -> None:
    """Raise ConfigError for the first argument that is no setting by its name; what a recipe decides is left out."""
    fields = dict(_leaves(RunConfig, RunConfig()))
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and "." not in name and name not in fields:
            raise ConfigError(f"--{name}: {_why_unknown(name, fields)}")


def _why_unknown(name: str, fields: dict[str, Any]) -> str:
    group, _, last = name.rpartition(".")
    siblings = [field.rpartition(".")[2] for field in fields if field.rpartition(".")[0] == group]
    inside = [field for field in fields if field.startswith(f"{name}.")]
    if inside and not known_synonym(name, SETTINGS, fields):
        return f"is a group of settings; set one of them, such as --{inside[0]}."
    for entries in _tuples_of_dataclasses(RunConfig):
        if name == entries or (name.startswith(f"{entries}.") and not siblings):
            if entries == "data.sources":
                new = 1 + max(int(field.split(".")[2]) for field in fields if field.startswith("data.sources."))
                return f"there is no such source. A further one begins with its path: --data.sources.{new}.path=FILE."
            return f"the recipe has no such entry. Entries of {entries} are added in a recipe file, not here."
    if elsewhere := known_synonym(name, SETTINGS, [*fields, "config", "workdir"]):
        return f"there is no such setting. Did you mean --{elsewhere}?{_EPOCHS if 'epoch' in name else ''} See --help."
    known = [*fields, "config", "workdir", "from", "verbosity", "coordinator_address", "num_processes", "process_id"]
    same_ending = [field for field in known if field.rpartition(".")[2] == last]
    in_group = [f"{group}.{sibling}".lstrip(".") for sibling in difflib.get_close_matches(last, siblings, n=1)]
    hint = did_you_mean(name, same_ending or in_group or ([] if group and siblings else known), prefix="--")
    if not hint and group:
        hint = f" {group} has {', '.join(siblings)}." if siblings else ""
    return f"there is no such setting.{hint} See --help for all of them."


def _tuples_of_dataclasses(annotation: Any, name: str = "") -> Iterator[str]:
    for field, kind in field_types(annotation).items():
        dotted = f"{name}.{field}".lstrip(".")
        if _holds_dataclasses(kind):
            yield dotted
        elif dataclasses.is_dataclass(kind):
            yield from _tuples_of_dataclasses(kind, dotted)


def _parse(recipe: RunConfig, overrides: dict[str, list[str]]) -> RunConfig | None:
    """`recipe` with the overrides, not yet checked; None if tyro finds a value of the wrong type."""
    arguments = []
    for name, values in overrides.items():
        arguments += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
    try:
        # Nothing between the recipe and the result is checked, so that fields which belong together can change in any
        # order; and tyro draws its own error message before it exits, which nobody is to see.
        with deferred(), contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(RunConfig, args=arguments, default=recipe, use_underscores=True, config=TYRO_MARKERS)
    except SystemExit:
        return None
