"""Policy of the checkpoints to keep, and why."""

import math
from collections.abc import Mapping, Sequence

from opendeep_jax.config.operations import CheckpointConfig


def why_kept(
    measures: Mapping[int, float | None], config: CheckpointConfig, origin: int | None = None
) -> dict[int, str]:
    """The steps whose checkpoints are kept, each with the reasons in words; a step that is not there may go.

    Args:
        measures: for every step, the held-out bits per byte, where it was measured.
        origin: the step of the checkpoint that the run began from, which is always kept.
    """
    steps = sorted(measures)
    measured = [step for step in steps if (measures[step] is not None and math.isfinite(measures[step]))]
    best = sorted(measured, key=lambda step: (measures[step], -step))[: config.keep_best]
    newest = steps[-config.keep :] if config.keep else []
    reasons = {step: [] for step in steps}
    for rank, step in enumerate(reversed(newest), start=1):
        reasons[step].append("newest" if rank == 1 else f"newest {config.keep}")
    for step in steps:
        if config.keep_every and step % config.keep_every == 0:
            reasons[step].append(f"every {config.keep_every:,}")
        if step in best:
            reasons[step].append("best" if step == best[0] else f"best {config.keep_best}")
        if step == origin:
            reasons[step].append("the run began from it")
        if not config.keep:
            reasons[step].append("all are kept")
    return {step: ", ".join(words) for step, words in reasons.items() if words}


class KeepPolicy:
    """`why_kept` in the form that Orbax's manager asks for (a PreservationPolicy)."""

    def __init__(self, config: CheckpointConfig, measures: dict[int, float | None], origin: int | None = None):
        self.config, self.measures, self.origin = config, measures, origin

    def should_preserve(self, checkpoints: Sequence, *, context: object) -> list[bool]:
        """Return whether each of Orbax's checkpoint infos is kept."""
        measures = {info.step: self.measures.get(info.step) for info in checkpoints}
        kept = why_kept(measures, self.config, self.origin)
        return [info.step in kept for info in checkpoints]
