"""Flags of the commands that work on a finished run: absl's, in a registry of their own for each call."""

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence

from absl import flags

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import did_you_mean
from opendeep_jax.config.synonyms import SETTINGS, known_synonym

RECIPES_OWN = {"config", "workdir", "verbosity", "coordinator_address", "num_processes", "process_id", "name", "seed"}
"""Undotted settings that belong to the recipe and the process, however near to a command's own their names are."""


def run_action(actions: Mapping[str, Callable[[Sequence[str]], int | None]], argv: Sequence[str], text: str) -> int:
    """Run the action that `argv[1]` names of the command `argv[0]` on the rest, and return its exit status.

    Print `text` where none or --help is given; raise ConfigError for an action that there is not.
    """
    command, *rest = argv
    if not rest or rest[0] in ("-h", "--help"):
        print(text, end="")
        return 0
    if rest[0] not in actions:
        hint = did_you_mean(rest[0], list(actions))
        raise ConfigError(
            f"opendeep {command} {rest[0]}: there is no such action.{hint} Actions: {', '.join(actions)}."
        )
    return actions[rest[0]](rest[1:]) or 0


def run_flags(**more: tuple[str | int | float | None, str]) -> flags.FlagValues:
    """A registry with `--workdir` and the flags in `more`, each `name=(default, help)`, of its default's type."""
    values = make_flags(**more)
    flags.DEFINE_string("workdir", None, "Directory of the run, as `opendeep train` wrote it.", flag_values=values)
    return values


def make_flags(**more: tuple[str | int | float | bool | None, str]) -> flags.FlagValues:
    """Return a registry with the flags in `more`, each `name=(default, help)`, of its default's type."""
    values = flags.FlagValues()
    define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for name, (default, text) in more.items():
        define[type(default)](name, default, text, flag_values=values)
    return values


def parse(
    values: flags.FlagValues,
    argv: Sequence[str],
    program: str,
    purpose: str,
    usage: str = "--workdir=DIRECTORY [--name=value ...]",
) -> flags.FlagValues:
    """Parse `argv` into `values`. Prints help and raises SystemExit(0) for --help; ConfigError for wrong arguments."""
    if {"-h", "--help"} & set(argv):
        width = max(14, *(len(name) + 2 for name in values))
        lines = "".join(f"  --{name:<{width}}{values[name].help}{_default(values[name])}\n" for name in values)
        print(f"{purpose}\n\nusage: {program} {usage}\n\n{lines}", end="")
        sys.exit(0)
    try:
        rest = values([program, *argv], known_only=True)[1:]
    except flags.Error as error:
        raise ConfigError(f"{error}. See {program} --help.") from error
    if rest:
        word = rest[0].partition("=")[0]
        elsewhere = word.startswith("-") and known_synonym(word, SETTINGS, list(values))
        hint = f" Did you mean --{elsewhere}?" if elsewhere else did_you_mean(word, [f"--{name}" for name in values])
        raise ConfigError(f"{rest[0]}: {program} has no such setting.{hint} See {program} --help.")
    if "workdir" in values and values["workdir"].default is None and not values.workdir:
        raise ConfigError("--workdir is missing: give the directory of a run, such as --workdir=runs/quickstart.")
    return values


def parse_own(values: flags.FlagValues, argv: Sequence[str], program: str, text: str) -> list[str]:
    """Parse a command's own flags into `values`, and return the other arguments, which belong to the recipe.

    Print `text` and raise SystemExit(0) for --help; raise ConfigError for values that flags cannot have.
    """
    if {"-h", "--help"} & set(argv):
        print(text, end="")
        sys.exit(0)
    values.set_gnu_getopt(True)
    try:
        rest = values([program, *argv], known_only=True)[1:]
    except flags.Error as error:
        raise ConfigError(f"{error}. See {program} --help.") from error
    check_misspelt(values, rest)
    return rest


def check_misspelt(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Raise ConfigError for an argument, of those left to the recipe, that is nearly one of the command's flags."""
    for argument in rest:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if not argument.startswith("--") or "." in name or name in RECIPES_OWN:
            continue
        if close := difflib.get_close_matches(name, [own for own in values if own not in RECIPES_OWN], 1, cutoff=0.75):
            raise ConfigError(f"--{name}: there is no such setting. Did you mean --{close[0]}?")


def _default(flag: flags.Flag) -> str:
    return "" if flag.default in (None, "") else f" (default: {flag.default!r})"
