"""Names and readers of the files in a run directory; `record.Record` is their one writer.

config.json config_diff.txt           the configuration, and how it differs from its recipe (config.load)
origin.json                           what the run began from, and the version of the directory (record.origin)
data.json tokenizer.json              what its batches are made of
environment.json                      versions and hardware of the last start
metrics.jsonl evaluation.jsonl experts.jsonl samples.jsonl checkpoints.jsonl
                                      one line for each logged step, cut back when the run goes back (REWOUND)
events.jsonl goodput.jsonl            what happened, and where time went; they only grow
heartbeat.json                        what the process does, every few seconds
skipped_batches.json                  steps whose batches are skipped since a rollback
summary.json                          results, when all steps are done
checkpoints/STEP/ quarantine/         whole checkpoints; corrupt ones that were moved away
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

METRICS, EVALUATION, EXPERTS, SAMPLES = "metrics.jsonl", "evaluation.jsonl", "experts.jsonl", "samples.jsonl"
SAVES, EVENTS, GOODPUT = "checkpoints.jsonl", "events.jsonl", "goodput.jsonl"
ORIGIN, DATA, SUMMARY, ENVIRONMENT = "origin.json", "data.json", "summary.json", "environment.json"
HEARTBEAT, SKIPPED_BATCHES, TOKENIZER = "heartbeat.json", "skipped_batches.json", "tokenizer.json"
CHECKPOINTS, QUARANTINE = "checkpoints", "quarantine"
OLD_NAMES = {SKIPPED_BATCHES: "passed_over.json", QUARANTINE: "unsound"}
"""Names of files in runs of older versions; it is read where the new one is missing."""
REWOUND = (METRICS, EVALUATION, EXPERTS, SAMPLES, SAVES)
"""Files whose lines after the step that a run goes back to are cut."""


def find(workdir: str | Path, name: str) -> Path:
    """Return the path of a run's file: under its old name where only that is there."""
    path = Path(workdir, name)
    older = Path(workdir, OLD_NAMES.get(name, name))
    return older if older.exists() and not path.exists() else path


def checkpoint_steps(directory: str | Path) -> list[int]:
    """Return the steps that have a whole checkpoint in a directory of checkpoints, in order."""
    try:
        names = (path.name for path in Path(directory).iterdir() if path.is_dir())
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def quarantined(workdir: str | Path) -> list[tuple[int, Path]]:
    """Return (step, directory) of every corrupt checkpoint that was moved away."""
    places = [*Path(workdir, QUARANTINE).glob("*"), *Path(workdir, OLD_NAMES[QUARANTINE]).glob("*")]
    return [(int(step[0]), path) for path in places if (step := re.match(r"\d+(?=-)", path.name))]


def parse(line: bytes | str) -> dict | None:
    """Return the object that a line of JSON holds, or None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_object(path: str | Path) -> dict:
    """Return the object in a JSON file; {} where there is none that can be read."""
    try:
        return parse(Path(path).read_text(encoding="utf-8", errors="replace")) or {}
    except OSError:
        return {}


def read_jsonl(path: str | Path, limit: int | None = None) -> list[dict]:
    """Return the objects of a JSON-lines file, in order; [] when there is no such file.

    With a `limit`, at most about so many lines, evenly spread with the first and the last among them, are parsed.
    Lines that are not a complete JSON object are skipped: a run that died, or is writing right now, leaves half a
    line behind, and a log is never a reason to refuse to go on.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = [line for line in text.split("\n") if line]
    if limit and len(lines) > limit:
        lines = [lines[round(i * (len(lines) - 1) / (limit - 1))] for i in range(limit)]
    return [record for line in lines if (record := parse(line)) is not None]


def last_record(path: str | Path, longest: int = 64 * 2**20) -> dict | None:
    """Return the last whole object of a JSON-lines file, read from its end; None where there is none."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            size = 64 * 2**10
            while True:
                file.seek(max(end - size, 0))
                lines = file.read(size).split(b"\n")
                whole = lines[:-1] if end <= size else lines[1:-1]
                for line in reversed(whole):
                    if record := parse(line):
                        return record
                if end <= size or size >= longest:
                    return None
                size *= 4
    except OSError:
        return None


def finished_summary(workdir: str | Path, steps: int) -> dict | None:
    """Return summary.json of a run that has done all its `steps`; None while there are some left."""
    summary = read_object(Path(workdir, SUMMARY))
    done = number(summary.get("steps"))
    return summary if done is not None and done >= steps else None


def steps_done(workdir: str | Path) -> int:
    """Return how many steps the run in `workdir` has logged so far."""
    step = number((last_record(Path(workdir, METRICS)) or {}).get("step"))
    return int(step or 0)


def dotted(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the values in nested objects, each with its dotted name."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def number(value: object) -> float | None:
    """Return a finite number as it is, else None."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return value if plain and math.isfinite(value) else None
    except OverflowError:
        return None


CHUNK = 4 * 2**20
WHOLE, LAST = 16 * 2**20, 2**20
"""A long history that is to be drawn is read in part: of more bytes than WHOLE, some lines and the LAST bytes."""


class Tail:
    """Reader of what was added to a JSON-lines file since the last look.

    A run that goes on from a checkpoint replaces such a file by a shorter one; then it is read again.

    Args:
        path: of the file, which need not be there.
        samples: of a backlog beyond WHOLE bytes, so many evenly spread lines will do, and the last ones; 0 reads all.
    """

    def __init__(self, path: Path, samples: int = 0):
        self.path, self.samples, self._offset = path, samples, 0
        self._file: tuple[int, int] | None = None

    def restarted(self) -> bool:
        """Return whether the file was replaced or cut, so that what was read of it is void. Ask before `read`."""
        try:
            found = os.stat(self.path)
        except OSError:
            found = None
        identity = (found.st_dev, found.st_ino) if found else None
        gone = self._offset > 0 and (found is None or identity != self._file or found.st_size < self._offset)
        if gone or identity != self._file:
            self._file, self._offset = identity, 0
        return gone

    def read(self) -> Iterator[dict]:
        """Yield the objects of the new whole lines; half a line is left for the next look, a broken one skipped."""
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                if self.samples and size - self._offset > WHOLE:
                    yield from filter(None, map(parse, self._sampled(file, size - LAST)))
                while lines := self._lines(file):
                    yield from filter(None, map(parse, lines))
        except OSError:
            return

    def _sampled(self, file, end: int) -> Iterator[bytes]:
        begin = self._offset
        for place in range(self.samples):
            file.seek(begin + place * (end - begin) // self.samples)
            if place:
                file.readline()  # the rest of a line
            yield file.readline()
        file.seek(end)
        file.readline()
        self._offset = file.tell()

    def _lines(self, file) -> list[bytes]:
        file.seek(self._offset)
        piece = file.read(CHUNK)
        while piece and b"\n" not in piece:
            more = file.read(CHUNK)
            if not more:
                return []
            piece += more
        end = piece.rfind(b"\n") + 1
        self._offset += end
        return piece[:end].split(b"\n")[:-1]
