"""Events of a run besides training: events.jsonl, one line per event, never rewound.

    {"time": "2026-11-22T12:00:00+00:00", "kind": "spike", "step": 812, "text": "step 812: loss 7.5, gradient …"}

`text` is the paragraph that was printed; other fields are the event's own. `step` counts from 1, as in metrics.jsonl:
it is the training step that the event belongs to. docs/faults.md lists the kinds.
"""

from pathlib import Path
from typing import Any

from opendeep_jax.record.files import EVENTS, read_jsonl
from opendeep_jax.record.record import Record

OLD_KINDS = {"unsound_checkpoint": "corrupt_checkpoint"}
"""Kinds of events as older versions wrote them, each with its name now; readers give the latter."""


def record_event(workdir: str | Path, kind: str, step: int, text: str, **fields: Any) -> dict[str, Any]:
    """Append an event to the events.jsonl of a run that has no open `Record` here, and return it."""
    return Record(workdir).event(kind, step, text, **fields)


def with_new_kind(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event that an older version wrote with the name that its kind has now."""
    kind = event.get("kind")
    return event | {"kind": OLD_KINDS[kind]} if isinstance(kind, str) and kind in OLD_KINDS else event


def read_events(workdir: str | Path, *kinds: str) -> list[dict[str, Any]]:
    """Return the events of a run, in the order they happened; of these kinds, if any are given."""
    events = map(with_new_kind, read_jsonl(Path(workdir) / EVENTS))
    return [event for event in events if not kinds or event.get("kind") in kinds]
