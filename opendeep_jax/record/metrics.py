"""What a run writes while it goes: JSON lines, and TensorBoard scalars beside them.

The JSON lines in the work directory are the record of a run; `report.py` and the notebooks read nothing else.
Every line is on disk before the next step starts, so a run that dies loses at most the line it was writing.
`docs/metrics.md` says what each field means.
"""

import json
import math
import numbers
import os
import time
from pathlib import Path

from opendeep_jax.config.files import write_atomically

SCALARS, EVALUATION, EXPERTS, SAMPLES = "metrics.jsonl", "evaluation.jsonl", "experts.jsonl", "samples.jsonl"
CHECKPOINTS = "checkpoints.jsonl"


def read_jsonl(path: str | Path, limit: int | None = None) -> list[dict]:
    """The objects of a JSON-lines file, in order; [] when there is no such file.

    With a `limit`, at most about so many lines, evenly spread with the first and the last among them, are parsed.
    Lines that are not a complete JSON object are passed over: a run that died, or is writing right now, leaves half a
    line behind, and a log is never a reason to refuse to go on.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = [line for line in text.split("\n") if line]
    if limit and len(lines) > limit:
        lines = [lines[round(i * (len(lines) - 1) / (limit - 1))] for i in range(limit)]
    return [record for line in lines if (record := _parse(line)) is not None]


def _parse(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def rewind(path: str | Path, step: int) -> int:
    """Drops the lines of a JSON-lines file that lie after `step`, and broken ones; returns how many.

    The file is replaced atomically and only when a line has to go. Step 0 empties it: such a run starts over.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    tail = lines.pop()  # empty, unless the last line was cut off
    kept = [line for line in lines if step > 0 and (record := _parse(line)) and record.get("step", 0) <= step]
    dropped = len(lines) - len(kept) + bool(tail)
    if dropped:
        write_atomically(path, "".join(line + "\n" for line in kept))
    return dropped


class MetricsWriter:
    """Appends a run's numbers to its work directory, and to TensorBoard event files beside them.

    Args:
        workdir: the run's directory; made when missing.
        resume_step: the step of the checkpoint that training goes on from; 0 starts over. Lines after it were written
            by a part of the run that is lost, and are dropped from every file.
        writes: whether anything is written: of a job's processes, the first one does.
        trackers: of `trackers.open_trackers`, which get the numbers too, and which whoever opened them closes.

    Writes are synchronous and flushed line by line; OSError (no space, no permission) reaches the caller.
    """

    def __init__(self, workdir: str | Path, resume_step: int = 0, writes: bool = True, trackers=None):
        self.workdir, self._writes = Path(workdir), writes
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._files = {}
        for name in (SCALARS, EVALUATION, EXPERTS, SAMPLES, CHECKPOINTS) if writes else ():
            rewind(self.workdir / name, resume_step)
        self._resume_step, self._trackers = resume_step, trackers
        self._events = None

    def scalars(self, record: dict) -> None:
        """Appends one logged step to metrics.jsonl. `record`: an int `step` and flat numbers, arrays of size 1 too."""
        self._append(SCALARS, record)
        self._show("train", record)

    def evaluation(self, record: dict) -> None:
        """Appends one evaluation to evaluation.jsonl: `step`, `tokens`, `held_out_bits_per_byte`, `held_out_loss`.

        It takes the place of one that an earlier start made at the step it was stopped at.
        """
        if record["step"] == self._resume_step and self._writes:
            rewind(self.workdir / EVALUATION, record["step"] - 1)
        self._append(EVALUATION, record)
        self._show("evaluation", record)

    def experts(self, step: int, load, bias=None) -> None:
        """Appends the routing of one step to experts.jsonl.

        Args:
            step: the step that produced it.
            load: [MoE layers, experts], tokens each expert received, in any unit; written over its layer's mean.
            bias: [MoE layers, experts], the router biases after the step; None where routing has none.
        """
        layers = [[float(value) for value in layer] for layer in load]
        means = [sum(layer) / len(layer) or 1.0 for layer in layers]
        tables = {"load": [[v / mean for v in layer] for layer, mean in zip(layers, means, strict=True)]}
        if bias is not None:
            tables["bias"] = [[float(value) for value in layer] for layer in bias]
        rounded = {
            name: [[round(v, 4) if math.isfinite(v) else None for v in layer] for layer in table]
            for name, table in tables.items()
        }
        self._append(EXPERTS, {"step": step, **rounded})

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Appends a text the model wrote to samples.jsonl. `text` is the continuation of `prompt`."""
        self._append(SAMPLES, {"step": step, "prompt": prompt, "text": text})

    def checkpoint(self, record: dict) -> None:
        """Appends a save to checkpoints.jsonl: `step`, `stall_seconds` (the loop's wait for it), `bytes`."""
        self._append(CHECKPOINTS, record)
        self._show("checkpoint", record)

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._events is not None:
            self._events.close()
            self._events = None

    def _append(self, name: str, record: dict) -> None:
        if not self._writes:
            return
        if name not in self._files:
            self._files[name] = open(self.workdir / name, "a", encoding="utf-8")
        self._files[name].write(to_json_line(record))
        self._files[name].flush()

    def _show(self, group: str, record: dict) -> None:
        if self._writes:
            self._tensorboard(group, record)
            if self._trackers is not None:
                self._trackers.log(record["step"], group, record)

    def _tensorboard(self, group: str, record: dict) -> None:
        # The library's SummaryWriter queues events for a thread, and a full disk leaves the run waiting on that queue
        # for ever; its synchronous writer raises instead.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        if self._events is None:
            directory = self.workdir / "tensorboard"
            directory.mkdir(exist_ok=True)
            # The suffix keeps two starts within one second apart: file names carry whole seconds.
            self._events = EventsWriter(str(directory / "events"), f".{os.getpid()}.{time.monotonic_ns()}")
            start = SessionLog(status=SessionLog.START)  # tells TensorBoard to hide what the lost part wrote
            self._events.write_event(Event(wall_time=time.time(), step=self._resume_step + 1, session_log=start))
        values = [
            Summary.Value(tag=f"{group}/{name}", simple_value=_plain_number(value))
            for name, value in record.items()
            if name != "step" and _is_number(value)
        ]
        event = Event(wall_time=time.time(), step=int(record["step"]), summary=Summary(value=values))
        self._events.write_event(event)
        self._events.flush()


def to_json_line(record: dict) -> str:
    """One line of strict JSON. Numbers JSON cannot hold become null, and `non_finite` names them:
    `{"step": 7, "loss": null, "non_finite": {"loss": "nan"}}`."""
    plain = {name: _plain_number(value) if _is_number(value) else value for name, value in record.items()}
    bad = {name: str(value) for name, value in plain.items() if not _is_finite(value)}
    if bad:
        plain = {name: _finite_or_none(value) for name, value in plain.items()} | {"non_finite": bad}
    return json.dumps(plain, allow_nan=False) + "\n"


def _is_finite(value) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _finite_or_none(value):
    if isinstance(value, list | tuple):
        return [_finite_or_none(item) for item in value]
    return value if _is_finite(value) else None


def _is_number(value) -> bool:
    if isinstance(value, bool | str) or value is None:
        return False
    return isinstance(value, numbers.Number) or getattr(value, "size", 0) == 1


def _plain_number(value) -> int | float:
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
