"""The state that a run began from: WORKDIR/origin.json, by which "no checkpoint" is never taken for "start anew".

    {"kind": "import", "step": 0, …}

`kind` is `random` (made from the seed), `import` (somebody else's weights) or `branch` (another run's checkpoint). The
state is that of `step`; unless it is random, it lies in the run's own checkpoint of that step. `saved` is the step of the
first checkpoint that was ever whole, in either tier. Other fields are those of whoever made the run.
"""

import json
from pathlib import Path
from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import write_atomically
from opendeep_jax.train.checkpoint_files import DIRECTORY, steps_in

ORIGIN = "origin.json"
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


def write_origin(workdir: str | Path, kind: str, step: int = 0, **fields: Any) -> dict[str, Any]:
    """Write what a run begins from, in one step, and return it. Raises OSError where the disk does not take it."""
    origin = {"kind": kind, "step": int(step), **fields}
    write_atomically(Path(workdir) / ORIGIN, json.dumps(origin, indent=2) + "\n")
    return origin


def _of_old_run(workdir: Path) -> dict[str, Any]:
    return {"kind": "import" if 0 in steps_in(workdir / DIRECTORY) else "random", "step": 0}
