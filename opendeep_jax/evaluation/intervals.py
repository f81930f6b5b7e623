"""95% confidence intervals: what a number measured on some examples says about all there could be."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Z = 1.959963984540054
"""Standard errors on either side of a normal mean that hold 95%."""

OF_LIKELIHOODS = (lambda mean: np.exp(-mean), lambda mean: -mean / np.log(2))
"""Perplexity, and bits, of a mean log-likelihood."""


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Interval of a share of successes (Wilson 1927): within [0, 1], and not empty where all or none succeed."""
    share, spread = successes / count, Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(
    rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], draws: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval (Efron 1979) of a statistic of sums over rows drawn with replacement; None for one row.

    Args:
        rows: float [count, columns].
        statistic: Takes sums, [draws, columns], and gives [draws].
    """
    if len(rows) < 2:
        return None
    draw = np.random.default_rng(seed)
    sums = np.stack([draw.multinomial(len(rows), np.full(len(rows), 1 / len(rows))) @ rows for _ in range(draws)])
    low, high = np.percentile(statistic(sums), [2.5, 97.5])
    return float(low), float(high)


def interval_of(value: float, standard_error: float | None, scores: Sequence) -> tuple[float, float] | None:
    """Interval of a metric; None if it has no standard error.

    Wilson's for a mean of zeros and ones, the bootstrap's for a perplexity or bits per unit, else the normal one.

    Args:
        scores: Of the examples: numbers, pairs of a log-likelihood and the units that it is for, or anything else.
    """
    rows = np.array([_row(score) for score in scores if _row(score)], np.float64)
    if len(rows) and len(rows) == len(scores):
        mean = rows[:, 0].sum() / rows[:, 1].sum()
        if math.isclose(value, mean, abs_tol=1e-9) and all(score in (0, 1) for score in scores):
            return wilson(rows[:, 0].sum(), len(rows))
        for transform in OF_LIKELIHOODS:
            with np.errstate(over="ignore"):
                if math.isclose(value, transform(mean), rel_tol=1e-6):
                    return bootstrap(rows, lambda sums, transform=transform: transform(sums[:, 0] / sums[:, 1]))
    if standard_error is None or not math.isfinite(standard_error):
        return None
    return value - Z * standard_error, value + Z * standard_error


def _row(score: Any) -> tuple[float, float] | None:
    """Return an example's contribution to the numerator and the denominator of a ratio."""
    if isinstance(score, int | float):
        return score, 1.0
    if isinstance(score, list | tuple) and len(score) == 2 and all(isinstance(part, int | float) for part in score):
        return score[0], score[1]
    return None
