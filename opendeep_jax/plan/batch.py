"""The batch that a plan is made for. Standard library only."""

import dataclasses

from opendeep_jax.config.schedule import Stage, stages
from opendeep_jax.config.schema import RunConfig


def largest_stage(config: RunConfig) -> Stage:
    """The stage of a run whose batch has the most tokens."""
    return max((s for s in stages(config) if s.steps > 0), key=lambda s: s.batch_size * s.length)


def with_batch(config: RunConfig, rows: int) -> RunConfig:
    """`config` with a batch of so many rows throughout: no ramp, and in one piece unless a pipeline needs several.

    Raises ConfigError as a configuration does.
    """
    phases = tuple(dataclasses.replace(phase, batch_size=0) for phase in config.data.phases)
    micros = config.train.accumulation_steps if config.parallel.stage > 1 else 1
    shape = {"batch_size": rows, "batch_ramp": (), "accumulation_steps": micros, "rows_per_device": 0}
    train = dataclasses.replace(config.train, **shape)
    evaluation = dataclasses.replace(config.evaluation, batch_size=0)
    data = dataclasses.replace(config.data, phases=phases)
    return dataclasses.replace(config, train=train, evaluation=evaluation, data=data)
