"""What a run does when a step goes wrong: records it, goes back, passes over the batches that did it, or stops.

A batch that is passed over keeps its step: the step is counted and nothing is trained on it. So batches, schedules and
`opendeep data where` mean after a rollback what they meant before, and a run that is started again, or audited, needs
only passed_over.json beside its configuration:

    [{"first": 812, "last": 815, "to_step": 800, "reason": "…"}]
"""

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from opendeep_jax.config.exits import Stopped
from opendeep_jax.config.files import write_atomically
from opendeep_jax.config.operations import FaultsConfig
from opendeep_jax.data.passed_over import PASSED_OVER, is_passed_over, read_passed_over
from opendeep_jax.data.prepared import Prepared
from opendeep_jax.data.provenance import where
from opendeep_jax.train.events import record_event

DOCUMENTS = 8
"""Documents of a bad batch that an event names; `opendeep data where` names all."""
STEPS_NAMED = 4
"""Steps of one review whose documents are looked up."""


class GoBack(Exception):
    """Unwinds the loop to the newest sound checkpoint before step `first`, or to any where that is None.

    Steps first … last are passed over from then on. The message is the reason.
    """

    def __init__(self, reason: str, first: int | None = None, last: int | None = None):
        super().__init__(reason)
        self.first, self.last = first, last


@dataclass(frozen=True)
class Judged:
    """What the device said of a step, still on the device."""

    step: int
    skipped: jax.Array
    loss: jax.Array
    grad_norm: jax.Array
    loss_zscore: jax.Array


class Recovery:
    """Remembers what steps were judged, and decides what follows.

    Args:
        prepared: what batches are made of, to name documents.
        say: prints a paragraph.
        writes: whether this process writes files; one of a job does.
    """

    def __init__(
        self, workdir: Path, faults: FaultsConfig, prepared: Prepared, say: Callable[[str], None], writes: bool
    ):
        self.workdir, self.faults, self.prepared, self.say, self.writes = workdir, faults, prepared, say, writes
        self.windows = read_passed_over(workdir)
        self.went_back = False
        """Whether this start of the run has gone back already."""
        self._judged: deque[Judged] = deque()
        self._in_a_row = 0
        self._corruptions: dict[int, int] = {}  # how often a step's checkpoint was gone back to for corrupt memory

    def passes_over(self, step: int) -> bool:
        """Whether the batch of `step` is left out."""
        return is_passed_over(self.windows, step)

    def note(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Keeps what the device will say of a step; nothing is waited for."""
        self._judged.append(Judged(step, *(metrics[key] for key in ("skipped", "loss", "grad_norm", "loss_zscore"))))

    def review(self) -> int:
        """Looks at all steps noted since the last time, and returns how many updates were skipped.

        Raises:
            GoBack: where too many were skipped in a row, or the policy goes back after a spike.
        """
        judged, skipped, named = list(self._judged), 0, 0
        self._judged.clear()
        for entry in judged:
            values = jax.device_get((entry.skipped, entry.loss, entry.grad_norm, entry.loss_zscore))
            was_skipped, (loss, norm, zscore) = bool(values[0]), map(float, values[1:])
            spike = zscore > self.faults.spike_zscore and self.faults.spike_policy != "ignore"
            self._in_a_row = self._in_a_row + 1 if was_skipped else 0
            skipped += was_skipped
            if was_skipped or spike:
                named += 1
                self._record(entry.step, was_skipped, spike, loss, norm, zscore, documents=named <= STEPS_NAMED)
            if spike and self.faults.spike_policy == "rollback":
                raise GoBack(f"the loss of step {entry.step:,} is a spike, {loss:.4g}", entry.step, entry.step)
            if self.faults.rollback_after and self._in_a_row >= self.faults.rollback_after:
                first = entry.step - self._in_a_row + 1
                reason = f"{self._in_a_row} updates in a row, from step {first:,} on, had to be skipped"
                raise GoBack(reason, first, judged[-1].step)
        return skipped

    def _record(self, step, was_skipped, spike, loss, norm, zscore, documents: bool) -> None:
        kind = "spike" if spike else "non_finite"
        what = f"loss {loss:.4g}, gradient norm {norm:.4g}"
        if spike:
            what += f", {zscore:.1f} robust standard deviations above the last losses"
        text = f"step {step:,}: {what}. " + ("Its update was skipped." if was_skipped else "Its update was applied.")
        fields = {"skipped": was_skipped, "loss": repr(loss), "grad_norm": repr(norm), "loss_zscore": repr(zscore)}
        if documents:
            fields |= batch_documents(self.prepared, step)
            names = ", ".join(document["id"] for document in fields["documents"][:3])
            text += f" Its batch has {fields['documents_in_batch']:,} documents ({names}, …): opendeep data where "
            text += f"--workdir={self.workdir} --step={step - 1}"
        self.event(kind, step, text, **fields)

    def event(self, kind: str, step: int, text: str, **fields) -> None:
        """Prints what happened, and appends it to events.jsonl."""
        if self.writes:
            record_event(self.workdir, kind, step, text, **fields)
            self.say(f"{kind.replace('_', ' ')}: {text}")

    def go_back(self, fault: GoBack, at_step: int, to_step: int) -> None:
        """Settles a rollback from `at_step` to the state after `to_step`, before the loop goes on from there.

        Raises:
            Stopped: where the run has gone back to this place too often.
        """
        self._judged.clear()
        self._in_a_row, self.went_back = 0, True
        if fault.first is None:
            self._corruptions[to_step] = self._corruptions.get(to_step, 0) + 1
            before = self._corruptions[to_step] - 1
        else:
            before = sum(window["to_step"] == to_step for window in self.windows)
        if before >= self.faults.max_rollbacks:
            times = "once" if before == 1 else f"{before} times"
            diagnosis = (
                f"stopped at step {at_step:,}: {fault}. The run has gone back to step {to_step:,} {times} "
                f"without reaching a new checkpoint (faults.max_rollbacks = {self.faults.max_rollbacks}), so a further "
                f"attempt would end the same way. {self.workdir / 'events.jsonl'} names the steps, their "
                "documents and their devices; a lower learning rate, another seed's data order, or another machine may "
                "cure it."
            )
            if self.writes:
                record_event(self.workdir, "stopped", at_step, diagnosis)
            raise Stopped(diagnosis)
        text = f"{fault}. Going back from step {at_step:,} to the state after step {to_step:,}"
        if fault.first is not None:
            window = {"first": fault.first, "last": fault.last, "to_step": to_step, "reason": str(fault)}
            self.windows.append(window)
            if self.writes:
                write_atomically(self.workdir / PASSED_OVER, json.dumps(self.windows, indent=2) + "\n")
            several = f"batches of steps {fault.first:,} to {fault.last:,}"
            left_out = several if fault.last > fault.first else f"batch of step {fault.first:,}"
            text += f", and passing over the {left_out} from now on"
        self.event("rollback", at_step, text + ".", to_step=to_step, first=fault.first, last=fault.last)


def batch_documents(prepared: Prepared, step: int) -> dict:
    """Documents of the batch of `step` (from 1): the first few, and how many there are."""
    found: dict[str, dict] = {}
    for piece in where(prepared, step - 1):
        found.setdefault(piece["id"], {"source": piece["source"], "id": piece["id"], "row": piece["row"]})
    return {"documents": list(found.values())[:DOCUMENTS], "documents_in_batch": len(found)}
