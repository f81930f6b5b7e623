"""Batch size and tokens as functions of the step. Plain integers, exact at 14.8 trillion tokens."""

import math


def _stages(train, sequence_length: int):
    """Yields (steps, batch_size) of each ramp stage; a stage's tokens are rounded up to whole steps."""
    for stage in train.batch_ramp:
        yield math.ceil(stage.tokens / (stage.batch_size * sequence_length)), stage.batch_size


def batch_size_at(train, sequence_length: int, step: int) -> int:
    """Rows in the global batch of `step` (from 0)."""
    for steps, batch_size in _stages(train, sequence_length):
        if step < steps:
            return batch_size
        step -= steps
    return train.batch_size


def rows_before(train, sequence_length: int, step: int) -> int:
    """Rows that the steps 0 … step - 1 consume."""
    rows = 0
    for steps, batch_size in _stages(train, sequence_length):
        taken = min(step, steps)
        rows += taken * batch_size
        step -= taken
    return rows + step * train.batch_size


def tokens_before(config, step: int) -> int:
    """Tokens that a run has trained on before `step`, padding included."""
    return rows_before(config.train, config.data.sequence_length, step) * config.data.sequence_length


def step_at_tokens(config, tokens: int) -> float:
    """The (fractional) step at which `tokens` tokens are consumed: the inverse of `tokens_before`."""
    length = config.data.sequence_length
    step, rows = 0, tokens / length
    for steps, batch_size in _stages(config.train, length):
        if rows <= steps * batch_size:
            return step + rows / batch_size
        step, rows = step + steps, rows - steps * batch_size
    return step + rows / config.train.batch_size


def total_steps(config) -> int:
    """Optimizer steps of the whole run."""
    return config.train.steps or math.ceil(step_at_tokens(config, config.train.total_tokens))
