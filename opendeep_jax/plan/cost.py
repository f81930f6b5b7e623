"""Time and money for a whole run, and the check of this arithmetic against DeepSeek-V3's published GPU hours."""

from typing import NamedTuple

from opendeep_jax.models.accounting import flops_per_token
from opendeep_jax.parallel.chips import CHIPS

SECONDS_PER_DAY = 86_400


class Cost(NamedTuple):
    """Cost of a run."""

    days: float
    chip_hours: float
    dollars: float


def cost_of(tokens: float, tokens_per_second: float, chips: int, dollars_per_chip_hour: float) -> Cost:
    """Days, chip-hours and dollars for so many tokens at a speed of all chips together."""
    seconds = tokens / tokens_per_second
    hours = chips * seconds / 3600
    return Cost(seconds / SECONDS_PER_DAY, hours, hours * dollars_per_chip_hour)


V3_TOKENS = 14.8e12
V3_LENGTH = 4096
V3_GPUS = 2048
V3_MFU = 0.3894
"""MFU of bfloat16's peak, causal attention counted once, which DeepSeek measured on its 2048 H800 ("Insights into
DeepSeek-V3", arXiv:2505.09343, table 4). It is an input here: nothing in this file predicts it."""
V3_OTHER_GPU_HOURS = 119e3 + 5e3
"""Extending the context and post-training (V3's report, table 1); no arithmetic here covers them."""
V3_PUBLISHED_GPU_HOURS = 2.788e6
V3_PUBLISHED_DOLLARS = 5.576e6


def v3_reproduced(model) -> Cost:
    """DeepSeek-V3's training by this package's arithmetic: our FLOPs per token, an H800's data sheet, V3_MFU.

    It checks the FLOPs that a token is said to take and the way from them to hours and dollars, not a prediction of
    speed: how well the chips were used is DeepSeek's own measurement.

    Args:
        model: the `ModelConfig` of DeepSeek-V3.
    """
    chip = CHIPS["h800"]
    speed = V3_GPUS * chip.flops * V3_MFU / flops_per_token(model, V3_LENGTH).total
    pretraining = cost_of(V3_TOKENS, speed, V3_GPUS, chip.price)
    hours = pretraining.chip_hours + V3_OTHER_GPU_HOURS
    return Cost(hours / V3_GPUS / 24, hours, hours * chip.price)
