"""Time and money for a whole run."""

from typing import NamedTuple

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
