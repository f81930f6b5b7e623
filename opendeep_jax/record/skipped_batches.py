"""Batches that a run leaves out since it went back before them: passed_over.json in its work directory.

    [{"first": 812, "last": 815, "to_step": 800, "reason": "…"}]

Steps count from 1, as in metrics.jsonl. Where the file is missing, nothing is left out.
"""

import json
from pathlib import Path

from opendeep_jax.config.checks import ConfigError

PASSED_OVER = "passed_over.json"


def read_passed_over(workdir: str | Path) -> list[dict]:
    """The windows of steps whose batches a run leaves out. Raises ConfigError where the file is damaged."""
    path = Path(workdir) / PASSED_OVER
    try:
        windows = json.loads(path.read_text("utf-8"))
        return [{**w, "first": int(w["first"]), "last": int(w["last"]), "to_step": int(w["to_step"])} for w in windows]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}): it says which batches this run leaves out. Copy it back; or write it anew "
            "from the rollback events in events.jsonl, as a list of objects with first, last and to_step."
        ) from error


def is_passed_over(windows: list[dict], step: int) -> bool:
    """Whether the batch of `step` (from 1) is left out."""
    return any(window["first"] <= step <= window["last"] for window in windows)
