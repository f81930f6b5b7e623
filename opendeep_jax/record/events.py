"""What happened to a run besides training: events.jsonl, a line for each, never rewound.

    {"time": "2026-11-22T12:00:00+00:00", "kind": "skipped", "step": 812, "text": "The update of step 812 was …"}

`text` is the paragraph that was printed; other fields are the event's own. `step` counts from 1, as in metrics.jsonl:
it is the training step that the event belongs to. docs/faults.md lists the kinds.
"""

import datetime
import json
from pathlib import Path
from typing import Any

from opendeep_jax.record.metrics import read_jsonl

EVENTS = "events.jsonl"


def record_event(workdir: str | Path, kind: str, step: int, text: str, **fields: Any) -> dict:
    """Appends an event to the work directory's events.jsonl, and returns it. Raises OSError where it cannot."""
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    event = {"time": time, "kind": kind, "step": int(step), "text": text, **fields}
    with open(Path(workdir) / EVENTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")
    return event


def read_events(workdir: str | Path, *kinds: str) -> list[dict]:
    """The events of a run, in the order they happened; of these kinds, if any are given."""
    events = read_jsonl(Path(workdir) / EVENTS)
    return [event for event in events if not kinds or event.get("kind") in kinds]
