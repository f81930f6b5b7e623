"""The numbers of a run while it goes: JSON lines, and TensorBoard scalars and trackers beside them.

The JSON lines in the work directory are the record of a run; `report.py` and the notebooks read nothing else.
`docs/metrics.md` says what each field means.
"""

import math
import os
import time
from typing import Any

from opendeep_jax.record.files import EVALUATION, EXPERTS, METRICS, SAMPLES, SAVES
from opendeep_jax.record.record import Record, is_scalar, plain_number


class MetricsWriter:
    """Append a run's numbers to its record, and show them in TensorBoard and the trackers.

    Args:
        record: of the run; cut back to `resume_step` already (`Record.rewind`).
        resume_step: the step of the checkpoint that training goes on from; 0 starts over.
        trackers: of `trackers.open_trackers`, which get the numbers too, and which whoever opened them closes.
    """

    def __init__(self, record: Record, resume_step: int = 0, trackers=None):
        self.record, self._resume_step, self._trackers = record, resume_step, trackers
        self._events = None

    def scalars(self, record: dict[str, Any]) -> None:
        """Append one logged step to metrics.jsonl. `record`: an int `step` and flat numbers, arrays of size 1 too."""
        self.record.append(METRICS, record)
        self._show("train", record)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Append one evaluation to evaluation.jsonl: `step`, `tokens`, `held_out_bits_per_byte`, `held_out_loss`.

        It takes the place of one that an earlier start made at the step it was stopped at.
        """
        if record["step"] == self._resume_step:
            self.record.rewind(record["step"] - 1, [EVALUATION])
        self.record.append(EVALUATION, record)
        self._show("evaluation", record)

    def experts(self, step: int, load, bias=None) -> None:
        """Append the routing of one step to experts.jsonl.

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
        self.record.append(EXPERTS, {"step": step, **rounded})

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Append a text the model wrote to samples.jsonl. `text` is the continuation of `prompt`."""
        self.record.append(SAMPLES, {"step": step, "prompt": prompt, "text": text})

    def checkpoint(self, record: dict[str, Any]) -> None:
        """Append a save to checkpoints.jsonl: `step`, `stall_seconds` (the loop's wait for it), `bytes`."""
        self.record.append(SAVES, record)
        self._show("checkpoint", record)

    def close(self) -> None:
        """Close TensorBoard's file; a second call does nothing."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _show(self, group: str, record: dict[str, Any]) -> None:
        if self.record.writes:
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
            directory = self.record.workdir / "tensorboard"
            directory.mkdir(exist_ok=True)
            # The suffix keeps two starts within one second apart: file names carry whole seconds.
            self._events = EventsWriter(str(directory / "events"), f".{os.getpid()}.{time.monotonic_ns()}")
            start = SessionLog(status=SessionLog.START)  # tells TensorBoard to hide what the lost part wrote
            self._events.write_event(Event(wall_time=time.time(), step=self._resume_step + 1, session_log=start))
        values = [
            Summary.Value(tag=f"{group}/{name}", simple_value=plain_number(value))
            for name, value in record.items()
            if name != "step" and is_scalar(value)
        ]
        event = Event(wall_time=time.time(), step=int(record["step"]), summary=Summary(value=values))
        self._events.write_event(event)
        self._events.flush()
