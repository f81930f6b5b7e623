"""Origin of a run: WORKDIR/origin.json, so that a missing checkpoint is never taken for a new run.

    {"kind": "import", "step": 0, "format": 1, …}

`kind` is `random` (made from the seed), `import` (somebody else's weights) or `branch` (another run's checkpoint). The
state is that of `step`; unless it is random, it lies in the run's own checkpoint of that step. `saved` is the step of
the first checkpoint that was ever whole, in either tier; `start` a digest of random weights; `format` the version of
the directory's layout (FORMAT). Other fields are those of whoever made the run.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import IMPORTED_RECIPE
from opendeep_jax.record.files import (
    CHECKPOINTS,
    ORIGIN,
    QUARANTINE,
    SAVES,
    SUMMARY,
    checkpoint_steps,
    number,
    quarantined,
    read_jsonl,
    read_object,
)
from opendeep_jax.record.record import Record

FORMAT = 1
"""Version of a run directory. 0: before versions were written; `events` and `files` have the names that it used."""
IMPORTED = "The recipe of this imported run"
"""First text of recipe.py as `opendeep import` writes it."""
IMPORTED_FROM = "imported.json"
"""Source of an imported run's weights (`pretrained.imported_from`)."""
KINDS = ("random", "import", "branch")


def read_origin(workdir: str | Path) -> dict[str, Any]:
    """Return what a run began from; of a run older than the file, as far as its other files tell.

    Raises:
        ConfigError: where the file is damaged, or a newer version of OpenDeep made the directory.
    """
    path = Path(workdir) / ORIGIN
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
        if origin["kind"] not in KINDS or not isinstance(origin["step"], int) or origin["step"] < 0:
            raise ValueError(f"kind {origin['kind']!r}, step {origin['step']!r}")
    except (FileNotFoundError, NotADirectoryError):
        return _of_old_run(Path(workdir))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}). It says what the run began from. Write it again: "
            '{"kind": "random", "step": 0}, or "import" or "branch" with the step of the checkpoint that it began from.'
        ) from error
    if (number(origin.get("format")) or 0) > FORMAT:
        raise ConfigError(
            f"{workdir}: is a run directory of format {origin['format']}, and this version of OpenDeep knows those up "
            f"to {FORMAT}: a newer one made it. Update OpenDeep (environment.json there names the version that ran "
            "it), or give another --workdir."
        )
    return origin


def write_origin(workdir: str | Path, kind: str, step: int = 0, **fields: Any) -> dict[str, Any]:
    """Write what a run begins from, in one step, and return it. Raises OSError where the disk does not take it."""
    origin = {"kind": kind, "step": int(step), **fields, "format": FORMAT}
    Record(workdir).write(ORIGIN, origin)
    return origin


def parent_directory(origin: dict[str, Any]) -> Path:
    """Return where a branch's parent lies, from wherever it is asked; an empty path where nothing says it."""
    return Path(str(origin.get("parent_absolute") or origin.get("parent") or ""))


def lineage(origin: dict[str, Any]) -> str:
    """Return a clause such as `branch of runs/trunk at step 500`; empty where a run began from its own seed."""
    kind, step = origin.get("kind"), origin.get("step")
    if kind == "branch":
        return f"branch of {origin.get('parent', 'another run')} at step {step}"
    return "imported weights" if kind == "import" else ""


def _ancestors(workdir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a run's directory and origin, its parent's, and so on, as far as they are there."""
    seen = {Path()}  # where nothing says who the parent is
    while workdir not in seen:
        seen.add(workdir)
        origin = read_object(workdir / ORIGIN)
        yield workdir, origin
        if origin.get("kind") != "branch":
            return
        workdir = parent_directory(origin)


def began_imported(workdir: str | Path) -> bool:
    """Return whether a run, or the one that it is a branch of, began with somebody else's weights."""
    return any(origin.get("kind") == "import" or _has_imported_recipe(run) for run, origin in _ancestors(Path(workdir)))


def read_imported_from(workdir: str | Path) -> dict[str, Any]:
    """Return the facts of an imported run, or of the one that a branch came from; empty where there are none."""
    found = (read_object(run / IMPORTED_FROM) for run, _ in _ancestors(Path(workdir)))
    return next(filter(None, found), {})


def write_imported_from(workdir: str | Path, facts: Mapping[str, Any]) -> None:
    """Write whose weights a run begins with. Raises OSError where the disk does not take it."""
    Record(workdir).write(IMPORTED_FROM, dict(facts))


def lost_state_error(
    workdir: Path, origin: dict[str, Any], before: int | None, notes: list[str], elsewhere: Path | None
) -> str | None:
    """Return a diagnosis with a fix where a run that has no state to go on from must not begin from its seed.

    Args:
        before: the state must have no update of this step or later; None takes any.
        notes: paragraphs on the corrupt checkpoints that were found.
        elsewhere: where checkpoints lie that were made for other processes than there are.
    """
    directory, saved = workdir / CHECKPOINTS, origin.get("saved")
    anew = "start anew in another --workdir"
    if notes:
        what, fix = "is sound", f"Bring one back from a copy to {directory}, or {anew}."
        if elsewhere:
            what, fix = "can be read here", f"Start as many processes as it had, or {anew}."
        return f"{workdir}: none of its checkpoints {what}. {' '.join(notes)} {fix}"
    if origin["kind"] == "random" and (saved is None or (before is not None and before <= saved)):
        return None
    if origin["kind"] == "random":
        has = "its run had checkpoints"
    else:
        whose = "imported weights" if origin["kind"] == "import" else "a checkpoint of another run"
        has = f"its run began from {whose}, the state of step {origin['step']:,}"
    what = "there is none now" if before is None else f"there is none from before step {before:,} now"
    moved = f" (quarantined, as not what was saved: {workdir / QUARANTINE})" if quarantined(workdir) else ""
    return (
        f"{workdir}: none of its checkpoints is sound: {has}, and {what} in {directory}{moved}. A run never begins "
        "anew from random weights by itself. Bring a checkpoint back, from a copy or the local tier that had it "
        f"(checkpoint.local_directory), or {anew}."
    )


def _of_old_run(workdir: Path) -> dict[str, Any]:
    there, moved = checkpoint_steps(workdir / CHECKPOINTS), [step for step, _ in quarantined(workdir)]
    imported = 0 in there or 0 in moved or _has_imported_recipe(workdir)
    origin = {"kind": "import" if imported else "random", "step": 0}
    logged = [line["step"] for line in read_jsonl(workdir / SAVES) if isinstance(line.get("step"), int)]
    if logged:
        return origin | {"saved": min(logged)}
    had = there or moved or (workdir / SUMMARY).exists()
    return origin | ({"saved": 1} if had else {})  # 1: earlier ones may have been pruned


def _has_imported_recipe(workdir: Path) -> bool:
    try:
        return IMPORTED in (workdir / IMPORTED_RECIPE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
