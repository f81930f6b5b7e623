"""What a run does when a step goes wrong: records it, goes back, passes over the batches that did it, or stops.

A batch that is passed over keeps its step: the step is counted and nothing is trained on it. So batches, schedules and
`opendeep data where` mean after a rollback what they meant before, and a run that is started again, or audited, needs
only passed_over.json beside its configuration:

    [{"first": 812, "last": 815, "to_step": 800, "reason": "…", "last_update": 800, "taken_in": [[812, 7.5, 0.31]]}]

`last_update` is the step of the last update in the state that was gone back to. `taken_in` are steps with their loss
and gradient norm, which later ones are compared with as if the device had skipped them.
"""

import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path

import jax

from opendeep_jax.checkpoint.files import DIRECTORY, steps_in
from opendeep_jax.config.exits import Stopped
from opendeep_jax.config.files import write_atomically
from opendeep_jax.config.operations import FaultsConfig
from opendeep_jax.data.prepared import Prepared
from opendeep_jax.data.provenance import where
from opendeep_jax.faults.health import UpdateCheck
from opendeep_jax.record.events import record_event
from opendeep_jax.record.skipped_batches import PASSED_OVER, is_passed_over, read_passed_over

DOCUMENTS = 8
"""Documents of a bad batch that an event names; `opendeep data where` names all."""
STEPS_NAMED = 4
"""Steps of one review whose documents are looked up."""


class GoBack(Exception):
    """Unwinds the loop to the newest sound checkpoint without an update of step `first` or later, or to any where that
    is None.

    Steps first … last are passed over from then on. The message is the reason.
    """

    def __init__(self, reason: str, first: int | None = None, last: int | None = None):
        super().__init__(reason)
        self.first, self.last = first, last


class Recovery:
    """Remembers how steps' updates were checked, and decides what follows.

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
        self._checks: deque[tuple[int, UpdateCheck]] = deque()
        self._skipped: list[int] = []  # steps since the last update that was applied, but for those passed over
        self._finite: list[list] = []  # [step, loss, gradient norm] of what was skipped or a spike
        self._corruptions: dict[int, int] = {}  # how often a step's checkpoint was gone back to for corrupt memory

    def passes_over(self, step: int) -> bool:
        """Whether the batch of `step` is left out."""
        return is_passed_over(self.windows, step)

    def begin(self, step: int, last_update: int) -> None:
        """Goes on from the state after `step`, whose last update is that of step `last_update`."""
        self._checks.clear()
        self._skipped = [skipped for skipped in range(last_update + 1, step + 1) if not self.passes_over(skipped)]

    def taken_in(self, step: int) -> tuple[float, float]:
        """Loss and gradient norm of a step that is passed over, as it was checked before; NaN where it was not."""
        known = (entry for window in self.windows for entry in window.get("taken_in", ()))
        return next(((loss, norm) for at, loss, norm in known if at == step), (math.nan, math.nan))

    def note(self, step: int, check: UpdateCheck) -> None:
        """Keeps what the device will say of a step's update; nothing is waited for."""
        self._checks.append((step, check))

    def review(self) -> int:
        """Looks at all steps noted since the last time, and returns how many updates were skipped.

        Raises:
            GoBack: where too many were skipped in a row, or the policy goes back after a spike.
        """
        checks, skipped, named = list(self._checks), 0, 0
        self._checks.clear()
        for step, check in checks:
            said = jax.device_get(check)
            was_skipped, spike = bool(said.skipped), bool(said.spike) and self.faults.spike_policy != "ignore"
            self._skipped = [*self._skipped, step] if was_skipped else []
            skipped += was_skipped
            if was_skipped or spike:
                named += 1
                self._record(step, said, was_skipped, spike, documents=named <= STEPS_NAMED)
            finite = math.isfinite(said.loss) and math.isfinite(said.grad_norm)
            if not (was_skipped or spike):
                self._finite.clear()
            elif finite:
                self._finite.append([step, float(said.loss), float(said.grad_norm)])
            if spike and self.faults.spike_policy == "rollback":
                what = f"step {step:,} is a spike (loss {said.loss:.4g}, gradient norm {said.grad_norm:.4g})"
                raise GoBack(what, step, step)
            if self.faults.rollback_after and len(self._skipped) >= self.faults.rollback_after:
                first = self._skipped[0]
                reason = f"{len(self._skipped)} updates in a row, from step {first:,} on, had to be skipped"
                raise GoBack(reason, first, checks[-1][0])
        return skipped

    def _record(self, step: int, said: UpdateCheck, was_skipped: bool, spike: bool, documents: bool) -> None:
        kind = "spike" if spike else "non_finite"
        what = f"loss {said.loss:.4g}, gradient norm {said.grad_norm:.4g}"
        if spike:
            zscores = {"loss": said.loss_zscore, "norm": said.grad_norm_zscore}
            name = max(zscores, key=zscores.get)
            what += f", its {name} {zscores[name]:.1f} robust standard deviations above the last ones' median"
        text = f"step {step:,}: {what}. " + ("Its update was skipped." if was_skipped else "Its update was applied.")
        numbers = ("loss", "grad_norm", "loss_zscore", "grad_norm_zscore")
        fields = {"skipped": was_skipped} | {name: repr(float(getattr(said, name))) for name in numbers}
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

    def go_back(self, fault: GoBack, at_step: int, to_step: int, last_update: int | None = None) -> None:
        """Settles a rollback from `at_step` to the state after `to_step`, before the loop goes on from there.

        Args:
            last_update: the step of the last update in that state; None says `to_step` itself.
        Raises:
            Stopped: where the run has gone back to these weights too often.
        """
        last_update = to_step if last_update is None else last_update
        self.went_back = True
        if fault.first is None:
            self._corruptions[to_step] = self._corruptions.get(to_step, 0) + 1
            before = self._corruptions[to_step] - 1
        else:
            before = sum(window.get("last_update", window["to_step"]) == last_update for window in self.windows)
        if before >= self.faults.max_rollbacks:
            times = "once" if before == 1 else f"{before} times"
            diagnosis = (
                f"stopped at step {at_step:,}: {fault}. The run has gone back to the weights of step {last_update:,} "
                f"{times} without reaching a checkpoint of later ones (faults.max_rollbacks = "
                f"{self.faults.max_rollbacks}), so a further attempt would end the same way. "
                f"{self.workdir / 'events.jsonl'} names the steps, their documents and their devices. "
                f"{self._cure(fault, to_step, before)}"
            )
            if self.writes:
                record_event(self.workdir, "stopped", at_step, diagnosis)
            raise Stopped(diagnosis)
        text = f"{fault}. Going back from step {at_step:,} to the state after step {to_step:,}"
        if fault.first is not None:
            window = {"first": fault.first, "last": fault.last, "to_step": to_step, "reason": str(fault)}
            taken_in = [entry for entry in self._finite if fault.first <= entry[0] <= fault.last]
            self.windows.append({**window, "last_update": last_update, "taken_in": taken_in})
            if self.writes:
                write_atomically(self.workdir / PASSED_OVER, json.dumps(self.windows, indent=2) + "\n")
            several = f"batches of steps {fault.first:,} to {fault.last:,}"
            left_out = several if fault.last > fault.first else f"batch of step {fault.first:,}"
            text += f", and passing over the {left_out} from now on"
        self.event("rollback", at_step, text + ".", to_step=to_step, first=fault.first, last=fault.last)
        self._finite.clear()
        self.begin(to_step, last_update)

    def _cure(self, fault: GoBack, to_step: int, before: int) -> str:
        """Say what can be done in this very directory, where only settings of faults may change, and beside it."""
        more = f"--faults.max_rollbacks={before + self.faults.max_rollbacks + 1}"
        if fault.first is None:
            return f"Give the same command on other machines, with {more} so that it goes on."
        here = f"the same command with {more} passes over further batches"
        if self.faults.spike_policy == "rollback":
            here += ", one with --faults.spike_policy=record or a higher --faults.spike_zscore trains on them"
        saved = [step for step in steps_in(self.workdir / DIRECTORY) if step <= to_step]
        begin = f"branch off: opendeep train --from={self.workdir}@{saved[-1]}" if saved else "begin anew with"
        rate = f"{begin} --workdir=NEW --optimizer.learning_rate=…"
        return f"In this directory {here}. With other settings, such as a lower learning rate, {rate}"


def batch_documents(prepared: Prepared, step: int) -> dict:
    """Documents of the batch of `step` (from 1): the first few, and how many there are."""
    found: dict[str, dict] = {}
    for piece in where(prepared, step - 1):
        found.setdefault(piece["id"], {"source": piece["source"], "id": piece["id"], "row": piece["row"]})
    return {"documents": list(found.values())[:DOCUMENTS], "documents_in_batch": len(found)}
