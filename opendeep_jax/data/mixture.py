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

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int32 and int64: the source of each of the rows `indices`, and which of that source's rows it is."""
        periods, n = np.divmod(np.asarray(indices, np.int64), len(self.sources))
        sources = self.sources[n]
        return sources, periods * self.counts[sources] + self.ranks[n]

    def index_of(self, source: int, row: int) -> int:
        """The place of a source's `row`: the inverse of `locate`. The source's weight must not be 0."""
        period, rank = divmod(row, int(self.counts[source]))
        return period * len(self.sources) + int(np.flatnonzero(self.sources == source)[rank])

    def taken(self, rows: int) -> np.ndarray:
        """int64 [sources]: how many of the first `rows` rows come from each source."""
        periods, n = divmod(rows, len(self.sources))
        return periods * self.counts + np.bincount(self.sources[:n], minlength=len(self.counts))


def make_mixture(weights: Sequence[float]) -> Mixture:
    """The Mixture of sources with these weights, which need not add up to 1; one of weight 0 gives no row.

    Raises ConfigError for weights below 0, and unless one is above.
    """
    if not (all(weight >= 0 for weight in weights) and any(weight > 0 for weight in weights)):
        raise ConfigError(f"The weights of the sources are {list(weights)}: each must be 0 or more, and one above 0.")
    counts = _whole_numbers(weights)
    period = sum(counts)
    # Row j of a source with share s = count / period may come from slot floor(j / s) on and must come before slot
    # ceil((j + 1) / s), or its source is a whole row ahead or behind. Taking the row with the earliest deadline keeps
    # all deadlines if that can be done at all (Horn 1974), and it can when shares add up to 1 (Baruah et al. 1996).
    rows = sorted(
        (j * period // count, -(-(j + 1) * period // count), source)
        for source, count in enumerate(counts)
        for j in range(count)  # none of a source without weight
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
        counts = [count and max(1, round(count * LONGEST_PERIOD / total)) for count in counts]
    return counts
