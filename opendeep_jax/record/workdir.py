"""Lock of a run directory: one process writes in it, and only a run of the same configuration."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import (
    CONFIG_FILE,
    HARMLESS,
    IMPORTED_RECIPE,
    ROUNDING,
    diff,
    format_diff,
    is_among,
    load_run_config,
)
from opendeep_jax.config.locks import Held, locked
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.record.files import DATA, METRICS, ORIGIN, read_object

OPEN_UNTIL_TRAINED = ("seed", "data.", "optimizer.", "train.")
KEPT_FROM_IMPORT = (
    "data.tokenizer",
    "optimizer.kind",
    "optimizer.first_moment_dtype",
    "optimizer.second_moment_dtype",
)
"""Fields of an untrained imported run: the former may differ but for the latter, which say what its
tokens mean and what its checkpoint holds."""

SMALLEST_FREE_BYTES = 256 * 2**20
"""A run is not started on a disk with less free space than this."""


@contextlib.contextmanager
def only_writer(workdir: str | Path) -> Iterator[None]:
    """Keep other processes from training in `workdir`, which is made if it is missing, until the block ends.

    Raises:
        ConfigError: where another process trains there; or in place of what the block raises, where its directory has
            gone meanwhile.
    """
    Path(workdir).mkdir(parents=True, exist_ok=True)
    directory = os.open(workdir, os.O_RDONLY)
    try:
        try:
            with locked(directory, Path(workdir, ".owner"), None):
                yield
        except Held as error:
            raise ConfigError(
                f"--workdir={workdir}: another process is training there, and two would overwrite each other's files. "
                "Wait for its end or stop it, or give another --workdir."
            ) from error
        except Exception as error:
            if _is_there(workdir, directory):
                raise
            raise ConfigError(
                f"--workdir={workdir}: is gone: it was deleted or moved, or its disk was taken away, while it was in "
                "use. Bring it back and give the same command, which goes on from the newest checkpoint in it."
            ) from error
    finally:
        os.close(directory)  # which gives the lock back, as does the process's death


def _is_there(workdir: str | Path, directory: int) -> bool:
    """Return whether a path still leads to an open directory, not to nothing or to one made in its place."""
    try:
        return os.path.samestat(os.stat(workdir), os.fstat(directory))
    except OSError:
        return False


def check_workdir(config: RunConfig, workdir: str | os.PathLike, branches: bool = False) -> None:
    """Make `workdir`, and raise ConfigError unless `config` can be run or resumed in it.

    Refused are a path that is no directory or cannot be written, a nearly full disk, and the directory of a run that
    computes something else. Fields in HARMLESS may differ, those in ROUNDING too with a printed line that says what
    follows, and a constant schedule may be made longer.

    Args:
        branches: what begins here begins from a checkpoint, and not from its seed.
    """
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        reason = "it is a file" if workdir.is_file() else error.strerror
        raise ConfigError(
            f"--workdir={workdir}: cannot write there ({reason}). Choose a directory that you may write to."
        ) from error
    free = shutil.disk_usage(workdir).free
    if free < SMALLEST_FREE_BYTES:
        raise ConfigError(
            f"--workdir={workdir}: {free / 2**20:.0f} MiB are free on this disk, and a run needs "
            f"{SMALLEST_FREE_BYTES / 2**20:.0f} MiB or more. Free some space, or choose a directory on another disk."
        )
    if not (workdir / CONFIG_FILE).exists():
        if not branches:
            _check_own_weights(config, workdir)
        return
    changes = diff(load_run_config(workdir), config)
    rounding = [entry for entry in changes if is_among(entry[0], ROUNDING)]
    differences = [entry for entry in changes if entry not in rounding and not _may_differ(entry, config)]
    if (workdir / IMPORTED_RECIPE).exists() and not any((workdir / name).exists() for name in (DATA, METRICS)):
        differences = [entry for entry in differences if not _is_open(entry[0])]
    if differences:
        lines = format_diff(differences).strip().replace("\n", "\n  ")
        raise ConfigError(
            f"--workdir={workdir}: it holds a run with another configuration (there -> here):\n  {lines}\n"
            f"Give that run's settings to resume it (`opendeep train --workdir={workdir}` has them all), or another "
            f"--workdir to start anew. `--from={workdir}@STEP --workdir=NEW` goes on from one of its checkpoints with "
            "other settings."
        )
    if rounding:
        lines = "; ".join(f"{name} {there!r} -> {here!r}" for name, there, here in rounding)
        print(f"--workdir={workdir}: from here on numbers may differ in rounding, as the run began with {lines}.")


def _is_open(name: str) -> bool:
    return is_among(name, OPEN_UNTIL_TRAINED) and not is_among(name, KEPT_FROM_IMPORT)


def _check_own_weights(config: RunConfig, workdir: Path) -> None:
    """Raise ConfigError where a new run would train the model of an imported run, whose tokenizer it has, from random
    weights: nearly always it is the imported ones that are meant.
    """
    home = Path(config.data.tokenizer).parent
    if read_object(home / ORIGIN).get("kind") != "import":
        return
    try:
        imported = load_run_config(home).model == config.model
    except ConfigError:
        return
    if imported and workdir.resolve() != home.resolve():
        raise ConfigError(
            f"--workdir={workdir}: this is the configuration of the run imported into {home}, and its weights are "
            f"there: a new directory would begin from random ones. Give --workdir={home}, or branch off with "
            f"--from={home}@0 --workdir={workdir}. To train such a model from nothing, copy {config.data.tokenizer} to "
            "another directory and give --data.tokenizer."
        )


def _may_differ(difference: tuple[str, Any, Any], config: RunConfig) -> bool:
    name, there, here = difference
    if re.fullmatch(r"data\.sources\.\d+\.epochs", name):
        return here > there  # which permits more, and changes no batch
    if name in ("train.steps", "train.total_tokens") and config.optimizer.schedule == "constant":
        return 0 < there < here and not config.data.phases  # which divide the text by the length of the whole run
    return is_among(name, HARMLESS)
