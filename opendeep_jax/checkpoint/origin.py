"""The state that a run began from: WORKDIR/origin.json, by which "no checkpoint" is never taken for "start anew".

    {"kind": "import", "step": 0, …}

`kind` is `random` (made from the seed), `import` (somebody else's weights) or `branch` (another run's checkpoint). The
state is that of `step`; unless it is random, it lies in the run's own checkpoint of that step. `saved` is the step of
the first checkpoint that was ever whole, in either tier; `start` a digest of random weights. Other fields are those of
whoever made the run.
"""

import json
import re
from pathlib import Path
from typing import Any

from opendeep_jax.checkpoint.files import DIRECTORY, UNSOUND, steps_in
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import write_atomically
from opendeep_jax.record.metrics import CHECKPOINTS, read_jsonl

ORIGIN = "origin.json"
IMPORTED = "The recipe of this imported run"
"""What `opendeep import` writes into the directory's recipe.py."""
KINDS = ("random", "import", "branch")


def read_origin(workdir: str | Path) -> dict[str, Any]:
    """Return what a run began from; of a run older than the file, as far as its other files tell.

    Raises:
        ConfigError: where the file is damaged.
    """
    path = Path(workdir) / ORIGIN
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
        if origin["kind"] not in KINDS or not isinstance(origin["step"], int) or origin["step"] < 0:
            raise ValueError(f"kind {origin['kind']!r}, step {origin['step']!r}")
        return origin
    except (FileNotFoundError, NotADirectoryError):
        return _of_old_run(Path(workdir))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}). It says what the run began from. Write it again: "
            '{"kind": "random", "step": 0}, or "import" or "branch" with the step of the checkpoint that it began from.'
        ) from error


def parent_directory(origin: dict[str, Any]) -> Path:
    """Return where a branch's parent lies, from wherever it is asked; an empty path where nothing says it."""
    return Path(str(origin.get("parent_absolute") or origin.get("parent") or ""))


def write_origin(workdir: str | Path, kind: str, step: int = 0, **fields: Any) -> dict[str, Any]:
    """Write what a run begins from, in one step, and return it. Raises OSError where the disk does not take it."""
    origin = {"kind": kind, "step": int(step), **fields}
    write_atomically(Path(workdir) / ORIGIN, json.dumps(origin, indent=2) + "\n")
    return origin


def lost(
    workdir: Path, origin: dict[str, Any], before: int | None, notes: list[str], elsewhere: Path | None
) -> str | None:
    """Return a diagnosis with a cure where a run that has no state to go on from must not begin from its seed.

    Args:
        before: the state must have no update of this step or later; None takes any.
        notes: paragraphs on the checkpoints that were found and not sound.
        elsewhere: where checkpoints lie that were made for other processes than there are.
    """
    directory, saved = workdir / DIRECTORY, origin.get("saved")
    anew = "start anew in another --workdir"
    if notes:
        what, cure = "is sound", f"Bring one back from a copy to {directory}, or {anew}."
        if elsewhere:
            what, cure = "can be read here", f"Start as many processes as it had, or {anew}."
        return f"{workdir}: none of its checkpoints {what}. {' '.join(notes)} {cure}"
    if origin["kind"] == "random" and (saved is None or (before is not None and before <= saved)):
        return None
    if origin["kind"] == "random":
        has = "its run had checkpoints"
    else:
        whose = "imported weights" if origin["kind"] == "import" else "a checkpoint of another run"
        has = f"its run began from {whose}, the state of step {origin['step']:,}"
    what = "there is none now" if before is None else f"there is none from before step {before:,} now"
    moved = workdir / UNSOUND
    aside = f" (moved aside, as not what was saved: {moved})" if moved.is_dir() and any(moved.iterdir()) else ""
    return (
        f"{workdir}: none of its checkpoints is sound: {has}, and {what} in {directory}{aside}. A run never begins "
        "anew from random weights by itself. Bring a checkpoint back, from a copy or the local tier that had it "
        f"(checkpoint.local_directory), or {anew}."
    )


def _of_old_run(workdir: Path) -> dict[str, Any]:
    there = steps_in(workdir / DIRECTORY)
    aside = [int(name[0]) for path in (workdir / UNSOUND).glob("*") if (name := re.match(r"\d+(?=-)", path.name))]
    imported = 0 in there or 0 in aside or IMPORTED in _text(workdir / "recipe.py")
    origin = {"kind": "import" if imported else "random", "step": 0}
    logged = [line["step"] for line in read_jsonl(workdir / CHECKPOINTS) if isinstance(line.get("step"), int)]
    if logged:
        return origin | {"saved": min(logged)}
    had = there or aside or (workdir / "summary.json").exists()
    return origin | ({"saved": 1} if had else {})  # 1: earlier ones may have been pruned


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
