"""Batches that a run skips since it was rolled back to before them: skipped_batches.json in its work directory.

    [{"first": 812, "last": 815, "to_step": 800, "reason": "…"}]

Steps count from 1, as in metrics.jsonl. Where the file is missing, nothing is skipped.
"""

import json
from pathlib import Path
from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.record.files import SKIPPED_BATCHES, find


def read_skipped_batches(workdir: str | Path) -> list[dict[str, Any]]:
    """Return the windows of steps whose batches a run skips. Raises ConfigError where the file is damaged."""
    path = find(workdir, SKIPPED_BATCHES)
    try:
        windows = json.loads(path.read_text("utf-8"))
        return [{**w, "first": int(w["first"]), "last": int(w["last"]), "to_step": int(w["to_step"])} for w in windows]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}): it says which batches this run skips. Copy it back; or write it anew "
            "from the rollback events in events.jsonl, as a list of objects with first, last and to_step."
        ) from error


def is_skipped(windows: list[dict[str, Any]], step: int) -> bool:
    """Return whether the batch of `step` (from 1) is skipped."""
    return any(window["first"] <= step <= window["last"] for window in windows)
