"""Heartbeat of a run: a small file, rewritten every few seconds, with its process and current activity.

    {"time": 1764536400.0, "doing": "compile", "step": 1, "ended": false}

A process that ends says so in it; one that is killed cannot, and its file grows old.
"""

import contextlib
import json
import time
from pathlib import Path

from opendeep_jax.record.files import HEARTBEAT

BEAT_SECONDS = 5.0


def beat(workdir: str | Path, doing: str, step: int, ended: bool = False) -> None:
    """Write the sign of life, which no ledger keeps. A disk that does not take it costs the sign, never the run."""
    sign = {"time": time.time(), "doing": doing, "step": step, "ended": ended}
    with contextlib.suppress(OSError):
        (Path(workdir) / HEARTBEAT).write_text(json.dumps(sign) + "\n", encoding="utf-8")
