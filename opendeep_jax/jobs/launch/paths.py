"""Every path of a run against what the machines of its job will see: one shared directory."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import parent_of
from opendeep_jax.config.paths import paths
from opendeep_jax.config.schema import RunConfig, TrainConfig

COMMAND_PATHS = ("config", "from", "workdir")
"""Flags of `opendeep train` that may be paths."""


def check_paths(config: RunConfig, command: Sequence[str], workdir: str, shared: str) -> list[str]:
    """Return what `opendeep train` needs besides, so that all machines see every path.

    Args:
        command: what each process executes.
        shared: the directory that every machine has under the same path.
    Raises:
        ConfigError: for each path that they would not see, and, where `shared` is here too, that is not there.
    """
    problems, extra = [], []
    wanted = [(f"--{name}", path, "read") for name, path in _given(command)]
    wanted += [("--workdir", workdir, "write")] if "--workdir" not in [flag for flag, *_ in wanted] else []
    wanted += [(f"--{name}", path, kind) for name, path, kind in paths(config)]
    for flag, path, kind in wanted:
        if kind == "cache" and path == TrainConfig().compilation_cache:  # nobody's choice: where it is kept from now on
            extra.append(f"{flag}={Path(workdir).parent / 'xla_cache'}")
        elif kind == "local":
            if not re.fullmatch(r"/[\w@%+=./-]+", path, flags=re.ASCII) or ".." in Path(path).parts:
                problems.append(
                    f"{flag}={path}: is a directory on each machine's own disk, and so must be an absolute path there, "
                    "of letters, digits and @%+=._-."
                )
        elif not _inside(path, shared):
            problems.append(
                f"{flag}={path}: every machine of the job has to see it, so it must be an absolute path under the file "
                f"system that they share, {shared}. Give {flag}={shared}/..., or name another one with --shared."
            )
        elif kind == "read" and flag != "--workdir" and Path(shared).is_dir() and not glob.glob(path, recursive=True):
            problems.append(f"{flag}={path}: there is nothing at that place. Put it there, or give the right one.")
        elif not _inside(str(Path(path).resolve()), str(Path(shared).resolve())):
            problems.append(
                f"{flag}={path}: leads out of {shared} by a link, to {Path(path).resolve()}, which the machines do not "
                f"see. Give a path whose files lie under {shared}."
            )
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return extra


def _inside(path: str, shared: str) -> bool:
    return Path(path).is_absolute() and Path(path).is_relative_to(shared) and ".." not in Path(path).parts


def _given(command: Sequence[str]) -> list[tuple[str, str]]:
    """Flags of the process that name a path, and the path: recipes by file, the run that is branched from."""
    found = {}
    for word, after in zip(command, (*command[1:], ""), strict=True):
        flag, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and flag in COMMAND_PATHS:
            found[flag] = value if equals else after
    if "config" in found:
        path, colon, size = found["config"].rpartition(":")
        found["config"] = path if colon and path.endswith(".py") and "/" not in size else found["config"]
        if not found["config"].endswith(".py"):
            del found["config"]  # a recipe that ships with OpenDeep
    if "from" in found:
        found["from"] = str(parent_of(found["from"])[0])
    return list(found.items())
