"""Mixing sources by weight: the n-th row of training comes from which source, and is which of that source's rows."""

import dataclasses
import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from opendeep_jax.config.checks import ConfigError

# Longest pattern that is laid out in memory. Weights that need a longer one are rounded to parts of it.
LONGEST_PERIOD = 1 << 16


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A pattern of sources that repeats, and at whose every prefix each source is less than one row off its share.

    For example weights (2, 1): sources [0, 1, 0], ranks [0, 0, 1], counts [2, 1].
    """

    sources: np.ndarray
    """int32 [period]: the source of each row of the pattern."""
    ranks: np.ndarray
    """int32 [period]: how many rows of the same source come before it in the pattern."""
    counts: np.ndarray
    """int64 [sources]: rows of each source in the pattern."""

    def locate(self, index: int) -> tuple[int, int]:
        """(source, row of that source) of the global row `index`."""
        period, n = divmod(index, len(self.sources))
        source = int(self.sources[n])
        return source, period * int(self.counts[source]) + int(self.ranks[n])


def make_mixture(weights: Sequence[float]) -> Mixture:
    """The Mixture of sources with these weights, which need not add up to 1. Raises ConfigError unless all are > 0."""
    if not all(weight > 0 for weight in weights):
        raise ConfigError(f"The weights of data.sources are {list(weights)}, but each must be above 0.")
    counts = _whole_numbers(weights)
    period = sum(counts)
    # Row j of a source with share s = count / period may come from slot floor(j / s) on and must come before slot
    # ceil((j + 1) / s), or its source is a whole row ahead or behind. Taking the row with the earliest deadline keeps
    # all deadlines if that can be done at all (Horn 1974), and it can when shares add up to 1 (Baruah et al. 1996).
    rows = sorted(
        (j * period // count, -(-(j + 1) * period // count), source)
        for source, count in enumerate(counts)
        for j in range(count)
    )
    waiting: list[tuple[int, int]] = []
    sources, ranks, taken, released = [], [], [0] * len(counts), 0
    for slot in range(period):
        while released < period and rows[released][0] <= slot:
            heapq.heappush(waiting, rows[released][1:])
            released += 1
        _, source = heapq.heappop(waiting)
        sources.append(source)
        ranks.append(taken[source])
        taken[source] += 1
    return Mixture(np.array(sources, np.int32), np.array(ranks, np.int32), np.array(counts, np.int64))


def _whole_numbers(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the proportion of the weights, as their decimals read, or rounded to the limit."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * scale) for weight in exact]
    divisor = gcd(*counts)
    counts = [count // divisor for count in counts]
    if sum(counts) > LONGEST_PERIOD:
        total = sum(counts)
        counts = [max(1, round(count * LONGEST_PERIOD / total)) for count in counts]
    return counts
