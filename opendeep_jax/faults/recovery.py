"""Recovery from a bad step: record it, roll back, skip the batches that caused it, or stop.

A batch that is skipped keeps its step: the step is counted and nothing is trained on it. So batches, schedules and
`opendeep data where` mean after a rollback what they meant before, and a run that is started again, or audited, needs
only skipped_batches.json beside its configuration:

    [{"first": 812, "last": 815, "to_step": 800, "reason": "…", "last_update": 800, "taken_in": [[812, 7.5, 0.31]]}]

`last_update` is the step of the last update in the state that was rolled back to. `taken_in` are steps with their loss
and gradient norm, which later ones are compared with as if the device had skipped them.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import jax

from opendeep_jax.checkpoint.checkpoints import Checkpoints, NoSoundCheckpoint
from opendeep_jax.config.exits import Stopped
from opendeep_jax.config.operations import FaultsConfig
from opendeep_jax.faults.health import UpdateCheck
from opendeep_jax.record.files import CHECKPOINTS, EVENTS, SKIPPED_BATCHES, checkpoint_steps
from opendeep_jax.record.record import Record
from opendeep_jax.record.skipped_batches import is_skipped, read_skipped_batches

DOCUMENTS = 8
"""Documents of a bad batch that an event names; `opendeep data where` names all."""
STEPS_NAMED = 4
"""Steps of one review whose documents are looked up."""


class Rollback(Exception):
    """Rollback of the loop to the newest sound checkpoint without an update of step `first` or later, or to any where
    that is None.

    The batches of steps first … last are skipped from then on. The message is the reason.
    """

    def __init__(self, reason: str, first: int | None = None, last: int | None = None):
        super().__init__(reason)
        self.first, self.last = first, last


class Recovery:
    """Memory of how steps' updates were checked, and the decision on what follows.

    Args:
        record: of the run; one process of a job writes it.
        documents: names the documents in the batch of a step (from 0), as objects with `source`, `id` and `row`.
        say: prints a paragraph.
    """

    def __init__(
        self,
        record: Record,
        faults: FaultsConfig,
        documents: Callable[[int], list[dict[str, Any]]],
        say: Callable[[str], None],
    ):
        self.record, self.faults, self.documents, self.say = record, faults, documents, say
        self.windows = read_skipped_batches(record.workdir)
        self.rolled_back = False
        """True after this start of the run has rolled back."""
        self._checks: deque[tuple[int, UpdateCheck]] = deque()
        self._skipped: list[int] = []  # steps since the last update that was applied, but for skipped batches
        self._finite: list[list] = []  # [step, loss, gradient norm] of what was skipped or a spike
        self._corruptions: dict[int, int] = {}  # how often a step's checkpoint was restored for corrupt memory

    def restore(self, checkpoints: Checkpoints, template: Any, before: int | None = None) -> Any | None:
        """Return the newest sound state, of the form of `template`; None where the run may begin from its seed.

        Args:
            before: only states without an update of this step (from 1) or later.
        Raises:
            NoSoundCheckpoint: where there is none to go on from, and the run must not begin anew.
        """
        try:
            restored = checkpoints.restore(template, before)
        except NoSoundCheckpoint as error:
            self.record.event("corrupt_checkpoint", 0, str(error))
            raise
        if restored is None:
            return None
        state, notes = restored
        for note in notes:
            self.say(note)
            self.record.event("corrupt_checkpoint", int(state.step), note)
        return state

    def begin_again(self, checkpoints: Checkpoints, state: Any) -> None:
        """Write down the first state of a run; say so where it began once before, and whether with these weights."""
        if again := checkpoints.begin(state):
            self.say(again)
            self.record.event("begun_again", 0, again)

    def skips(self, step: int) -> bool:
        """Return whether the batch of `step` (from 1) is skipped."""
        return is_skipped(self.windows, step)

    def begin(self, step: int, last_update: int) -> None:
        """Go on from the state after `step`, whose last update is that of step `last_update`."""
        self._checks.clear()
        self._skipped = [skipped for skipped in range(last_update + 1, step + 1) if not self.skips(skipped)]

    def taken_in(self, step: int) -> tuple[float, float]:
        """Return loss and gradient norm of a skipped batch as they were checked before; NaN where they were not."""
        known = (entry for window in self.windows for entry in window.get("taken_in", ()))
        return next(((loss, norm) for at, loss, norm in known if at == step), (math.nan, math.nan))

    def note(self, step: int, check: UpdateCheck) -> None:
        """Queue a step's update check, without waiting for the device."""
        self._checks.append((step, check))

    def review(self) -> int:
        """Review the steps queued since the last time, and return how many updates were skipped.

        Raises:
            Rollback: where too many were skipped in a row, or the policy rolls back after a spike.
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
                raise Rollback(what, step, step)
            if self.faults.rollback_after and len(self._skipped) >= self.faults.rollback_after:
                first = self._skipped[0]
                reason = f"{len(self._skipped)} updates in a row, from step {first:,} on, had to be skipped"
                raise Rollback(reason, first, checks[-1][0])
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
        found = self.documents(step - 1) if documents else []
        if found:
            fields |= {"documents": found[:DOCUMENTS], "documents_in_batch": len(found)}
            names = ", ".join(document["id"] for document in found[:3])
            text += f" Its batch has {len(found):,} documents ({names}, …): opendeep data where "
            text += f"--workdir={self.record.workdir} --step={step - 1}"
        self.event(kind, step, text, **fields)

    def event(self, kind: str, step: int, text: str, **fields: Any) -> None:
        """Print what happened, and append it to events.jsonl."""
        if self.record.writes:
            self.record.event(kind, step, text, **fields)
            self.say(f"{kind.replace('_', ' ')}: {text}")

    def rollback(self, fault: Rollback, at_step: int, to_step: int, last_update: int | None = None) -> None:
        """Complete a rollback from `at_step` to the state after `to_step`, before the loop continues from there.

        Args:
            last_update: the step of the last update in that state; None says `to_step` itself.
        Raises:
            Stopped: where the run was rolled back to these weights too often.
        """
        last_update = to_step if last_update is None else last_update
        self.rolled_back = True
        if fault.first is None:
            self._corruptions[to_step] = self._corruptions.get(to_step, 0) + 1
            before = self._corruptions[to_step] - 1
        else:
            before = sum(window.get("last_update", window["to_step"]) == last_update for window in self.windows)
        if before >= self.faults.max_rollbacks:
            times = "once" if before == 1 else f"{before} times"
            diagnosis = (
                f"stopped at step {at_step:,}: {fault}. The run was rolled back to the weights of step {last_update:,} "
                f"{times} without reaching a checkpoint of later ones (faults.max_rollbacks = "
                f"{self.faults.max_rollbacks}), so a further attempt would end the same way. "
                f"{self.record.workdir / EVENTS} names the steps, their documents and their devices. "
                f"{self._cure(fault, to_step, before)}"
            )
            self.record.event("stopped", at_step, diagnosis)
            raise Stopped(diagnosis)
        text = f"{fault}. Rolling back from step {at_step:,} to the state after step {to_step:,}"
        if fault.first is not None:
            window = {"first": fault.first, "last": fault.last, "to_step": to_step, "reason": str(fault)}
            taken_in = [entry for entry in self._finite if fault.first <= entry[0] <= fault.last]
            self.windows.append({**window, "last_update": last_update, "taken_in": taken_in})
            self.record.write(SKIPPED_BATCHES, self.windows)
            several = f"batches of steps {fault.first:,} to {fault.last:,}"
            skipped = several if fault.last > fault.first else f"batch of step {fault.first:,}"
            text += f", and skipping the {skipped} from now on"
        self.event("rollback", at_step, text + ".", to_step=to_step, first=fault.first, last=fault.last)
        self._finite.clear()
        self.begin(to_step, last_update)

    def _cure(self, fault: Rollback, to_step: int, before: int) -> str:
        """Return what can be done in this very directory, where only settings of faults may change, and beside it."""
        more = f"--faults.max_rollbacks={before + self.faults.max_rollbacks + 1}"
        if fault.first is None:
            return f"Give the same command on other machines, with {more} so that it goes on."
        here = f"the same command with {more} skips further batches"
        if self.faults.spike_policy == "rollback":
            here += ", one with --faults.spike_policy=record or a higher --faults.spike_zscore trains on them"
        saved = [step for step in checkpoint_steps(self.record.workdir / CHECKPOINTS) if step <= to_step]
        begin = f"branch off: opendeep train --from={self.record.workdir}@{saved[-1]}" if saved else "begin anew with"
        rate = f"{begin} --workdir=NEW --optimizer.learning_rate=…"
        return f"In this directory {here}. With other settings, such as a lower learning rate, {rate}"
