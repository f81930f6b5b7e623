"""Batch size, row length, tokens and learning rate as functions of the step. Integers are exact at 14.8T tokens."""

import itertools
import math
import sys
from typing import NamedTuple

ENDLESS = sys.maxsize
"""Steps of the last stage."""


class Stage(NamedTuple):
    """Steps whose batches have one shape and one mixture: a phase of data.phases, or a stage of its batch ramp."""

    phase: int
    """Index into data.phases; 0 where there are none."""
    first_step: int
    steps: int
    """Its length; ENDLESS for the last."""
    batch_size: int
    """Rows in a global batch."""
    length: int
    """Tokens in a row."""


def stages(config) -> list[Stage]:
    """The run as stages, the last without end. A stage's tokens are rounded up to whole steps.

    train.batch_ramp comes first, inside the first phase.
    """
    data, train = config.data, config.train
    spans = [(phase.tokens, phase.batch_size, phase.sequence_length) for phase in data.phases] or [(0, 0, 0)]
    found: list[Stage] = []

    def add(phase: int, tokens: int | None, batch_size: int, length: int) -> None:
        steps = ENDLESS if tokens is None else max(math.ceil(tokens / (batch_size * length)), 0)
        found.append(Stage(phase, found[-1].first_step + found[-1].steps if found else 0, steps, batch_size, length))

    for index, (tokens, batch_size, length) in enumerate(spans):
        length = length or data.sequence_length
        left = tokens
        for ramp in train.batch_ramp if index == 0 else ():
            add(index, ramp.tokens, ramp.batch_size, length)
            left -= found[-1].steps * ramp.batch_size * length
        add(index, left if index < len(spans) - 1 else None, batch_size or train.batch_size, length)
    return found


def stage_at(config, step: int) -> Stage:
    """The stage that `step` (from 0) belongs to."""
    return next(stage for stage in reversed(stages(config)) if stage.first_step <= step and stage.steps > 0)


def micro_batches(train, rows: int, shards: int = 1) -> int:
    """Return how many micro-batches a batch of so many rows, with or without padding, is cut into on `shards` devices
    that divide rows, by a TrainConfig."""
    if train.rows_per_device:
        return math.ceil(rows / (train.rows_per_device * shards))
    for stage in train.batch_ramp:
        if stage.accumulation_steps and rows in (
            stage.batch_size,
            _rounded_up(stage.batch_size, stage.accumulation_steps * shards),
        ):
            return stage.accumulation_steps
    return train.accumulation_steps


def padded_rows(train, batch_size: int, shards: int) -> int:
    """Rows of a batch with those of padding that let its micro-batches divide over `shards` devices."""
    return _rounded_up(batch_size, micro_batches(train, batch_size, shards) * shards * (train.rows_per_device or 1))


def _rounded_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def length_at(config, step: int) -> int:
    """Tokens in a row of `step` (from 0)."""
    return stage_at(config, step).length


def rows_before(config, step: int, phase: int) -> int:
    """Rows of `phase` that the steps 0 … step - 1 take."""
    return sum(
        min(max(step - stage.first_step, 0), stage.steps) * stage.batch_size
        for stage in stages(config)
        if stage.phase == phase
    )


def step_of_row(config, phase: int, row: int) -> tuple[int, int] | None:
    """(step, row of its batch) of the `row`-th row of `phase`, both from 0; None if the phase ends before it.

    The inverse of `rows_before`.
    """
    for stage in stages(config):
        if stage.phase == phase:
            if row < stage.steps * stage.batch_size:
                step, in_batch = divmod(row, stage.batch_size)
                return stage.first_step + step, in_batch
            row -= stage.steps * stage.batch_size
    return None


def tokens_before(config, step: int) -> int:
    """Tokens that a run has trained on before `step`, padding included."""
    return sum(
        min(max(step - stage.first_step, 0), stage.steps) * stage.batch_size * stage.length for stage in stages(config)
    )


def step_at_tokens(config, tokens: int) -> float:
    """The (fractional) step at which `tokens` tokens are consumed: the inverse of `tokens_before`."""
    for stage in stages(config):
        per_step = stage.batch_size * stage.length
        if tokens <= stage.steps * per_step:
            return stage.first_step + tokens / per_step
        tokens -= stage.steps * per_step
    raise AssertionError("the last stage has no end")


class RatePiece(NamedTuple):
    """Piece of the schedule: the rate, a fraction of its peak, goes from `begin` to `end` and stays there."""

    name: str
    """Name for people: `warm-up`, `cosine`, `stable`, `decay`, `linear (phase 2 of 5)`."""
    shape: str
    """`constant`, `linear` or `cosine`."""
    begin: float
    end: float
    first_step: int
    steps: int
    """Number of steps from `begin` to `end`, 1 or more. The next piece may start before they are over."""


def rate_pieces(config) -> list[RatePiece]:
    """Return the learning rate's schedule, in order. The first piece is the warm-up, also where it has no steps."""
    optimizer, total = config.optimizer, total_steps(config)
    warmup, final = optimizer.warmup_steps, optimizer.final_fraction
    left = max(total - warmup, 1)
    # Step 0 already learns: its rate is the first stair of the warm-up, not 0.
    pieces = [RatePiece("warm-up", "linear", 1.0 / max(warmup, 1), 1.0, 0, max(warmup - 1, 1))]
    if optimizer.schedule == "phases":  # V3's, which follow the warm-up: token counts become steps
        tokens, start, rate = tokens_before(config, warmup), warmup, 1.0
        for place, phase in enumerate(optimizer.phases, 1):
            tokens += phase.tokens
            end, begin = round(step_at_tokens(config, tokens)), phase.to if phase.shape == "constant" else rate
            name = f"{phase.shape} (phase {place} of {len(optimizer.phases)})"
            pieces.append(RatePiece(name, phase.shape, begin, phase.to, start, max(end - start, 1)))
            start, rate = end, phase.to
    elif optimizer.schedule == "cosine":
        pieces.append(RatePiece("cosine", "cosine", 1.0, final, warmup, left))
    elif optimizer.schedule == "wsd":
        decay = min(max(round(total * optimizer.decay_fraction), 1), left)
        pieces.append(RatePiece("stable", "constant", 1.0, 1.0, warmup, left))
        pieces.append(RatePiece("decay", "linear", 1.0, final, total - decay, decay))
    else:
        pieces.append(RatePiece("constant", "constant", 1.0, 1.0, warmup, left))
    return pieces


def rate_piece_at(config, step: int) -> RatePiece:
    """Return the piece of the learning rate's schedule that `step` (from 0) belongs to."""
    warmup, *pieces = rate_pieces(config)
    return next((piece for piece in reversed(pieces) if piece.first_step <= step), warmup)


def borders(config) -> tuple[int, ...]:
    """Return the steps (from 0, the first left out) from which on losses or gradients may lie elsewhere by the
    configuration's own doing, in order.

    They are those of another mixture, row length, packing or batch size, of a rate that jumps, and of another weight
    of multi-token prediction.
    """
    mtp = config.model.mtp
    found = {stage.first_step for stage in stages(config) if stage.steps > 0}
    if config.optimizer.schedule == "phases":
        pairs = itertools.pairwise(rate_pieces(config))
        found |= {after.first_step for before, after in pairs if after.begin != before.end}
    if mtp.depth and mtp.final_from_tokens and mtp.final_loss_weight != mtp.loss_weight:
        found.add(math.ceil(step_at_tokens(config, mtp.final_from_tokens)))
    return tuple(sorted(found - {0}))


def total_steps(config) -> int:
    """Optimizer steps of the whole run."""
    return config.train.steps or math.ceil(step_at_tokens(config, config.train.total_tokens))
