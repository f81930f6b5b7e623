"""The one writer of a run's files: lines that are appended, lines that are cut after a step, whole files replaced.

    record = Record(workdir)
    record.append(METRICS, {"step": 3, "loss": 2.1})
    record.event("rollback", 812, "Going back from step 812 …", to_step=800)
    record.rewind(800)        # what lies after step 800 is cut, and an event says what it was
    record.write(SUMMARY, {"steps": 1000, …})

Every write passes `_written`, which tells `ledger` what was done to which file, and the bytes: each may be chained.
"""

import datetime
import hashlib
import json
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from opendeep_jax.config.files import write_atomically
from opendeep_jax.record.files import EVENTS, METRICS, REWOUND, parse

Ledger = Callable[[str, str, bytes], None]
"""Called with `append` or `write`, the name of a file, and the bytes appended to it or put in its place."""


class Record:
    """Writer of the files in a run directory.

    Lines are on disk when a method returns, so a run that dies loses at most the line it was writing. Raises OSError
    (no space, no permission, a directory that has gone) from every method.

    Args:
        workdir: the run directory; made when missing.
        writes: whether this process writes at all; of a job's processes, the first one does.
        ledger: receives every write.
    """

    def __init__(self, workdir: str | Path, writes: bool = True, ledger: Ledger | None = None):
        self.workdir, self.writes, self.ledger = Path(workdir), writes, ledger
        self._whole: set[str] = set()  # files whose last line is known to be whole
        if writes:
            self.workdir.mkdir(parents=True, exist_ok=True)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one line of strict JSON to a file (`to_json_line`)."""
        if not self.writes:
            return
        line = to_json_line(record).encode()
        with open(self.workdir / name, "ab") as file:
            # A start that died in the middle of a line must not spoil this one's first.
            torn = name not in self._whole and file.tell() and not _ends_a_line(self.workdir / name)
            data = b"\n" + line if torn else line
            file.write(data)
        self._whole.add(name)
        self._written("append", name, data)

    def event(self, kind: str, step: int, text: str, **fields: Any) -> dict[str, Any]:
        """Append an event to events.jsonl, which is never rewound, and return it (`record.events`)."""
        event = {"time": now(), "kind": kind, "step": int(step), "text": text, **fields}
        self.append(EVENTS, event)
        return event

    def write(self, name: str, value: Any) -> None:
        """Put a JSON value in a file's place, in one step."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Put a text in a file's place, in one step."""
        if self.writes:
            write_atomically(self.workdir / name, text)
            self._written("write", name, text.encode())

    def rewind(self, step: int, names: Iterable[str] = REWOUND) -> int:
        """Cut the lines after `step`, and broken ones, from JSON-lines files; return how many. Step 0 empties them.

        A file is replaced atomically, and only when a line has to go. Where metrics.jsonl is cut, an event says so
        first: `rewound`, with the number of lines that go and the SHA-256 of their bytes, one after the other.
        """
        cuts = {name: _cut(self.workdir / name, step) for name in names if self.writes}
        cuts = {name: (kept, dropped) for name, (kept, dropped) in cuts.items() if dropped}
        if METRICS in cuts:
            dropped = cuts[METRICS][1]
            digest, lines = hashlib.sha256(b"".join(dropped)).hexdigest(), len(dropped)
            text = f"{lines:,} lines after step {step:,} were cut from {METRICS} (SHA-256 {digest[:16]}...)."
            self.event("rewound", step, text, file=METRICS, lines=lines, sha256=digest)
        for name, (kept, _) in cuts.items():
            self.write_text(name, b"".join(kept).decode("utf-8", "replace"))
            self._whole.add(name)
        return sum(len(dropped) for _, dropped in cuts.values())

    def _written(self, kind: str, name: str, data: bytes) -> None:
        if self.ledger is not None:
            self.ledger(kind, name, data)


def now() -> str:
    """Return the time in whole seconds, as `2026-11-22T12:00:00+00:00`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _cut(path: Path, step: int) -> tuple[list[bytes], list[bytes]]:
    """Return the lines of a file that stay, and those that lie after `step` or are broken, each with its line end."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return [], []
    kept, dropped = [], []
    for line in lines:
        record = parse(line) if step > 0 and line.endswith(b"\n") else None
        (kept if record and record.get("step", 0) <= step else dropped).append(line)
    return kept, dropped


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def to_json_line(record: Mapping[str, Any]) -> str:
    """Return one line of strict JSON. Numbers JSON cannot hold become null, and `non_finite` names them:
    `{"step": 7, "loss": null, "non_finite": {"loss": "nan"}}`."""
    plain = {name: plain_number(value) if is_scalar(value) else value for name, value in record.items()}
    bad = {name: str(value) for name, value in plain.items() if not _is_finite(value)}
    if bad:
        plain = {name: _finite_or_none(value) for name, value in plain.items()} | {"non_finite": bad}
    return json.dumps(plain, allow_nan=False) + "\n"


def is_scalar(value: object) -> bool:
    """Return whether a value is a number, or an array of size 1."""
    if isinstance(value, bool | str) or value is None:
        return False
    return isinstance(value, numbers.Number) or getattr(value, "size", 0) == 1


def plain_number(value: Any) -> int | float:
    """Return Python's number for a number or an array of size 1."""
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _is_finite(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_finite_or_none(item) for item in value]
    return value if _is_finite(value) else None
