"""Mixing sources by weight: the n-th row of training comes from which source, and is which of that source's rows."""

import dataclasses
import functools
import heapq
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from opendeep_jax.config.checks import ConfigError

# Longest pattern that is laid out in memory.
LONGEST_PERIOD = 1 << 16
# Trees that are gone on with while the next source is added.
TREES_KEPT = 8


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
        """Return the place of a source's `row`: the inverse of `locate`. The source's weight must not be 0."""
        period, rank = divmod(row, int(self.counts[source]))
        return period * len(self.sources) + int(np.flatnonzero(self.sources == source)[rank])

    def taken(self, rows: int) -> np.ndarray:
        """int64 [sources]: how many of the first `rows` rows come from each source."""
        periods, n = divmod(rows, len(self.sources))
        return periods * self.counts + np.bincount(self.sources[:n], minlength=len(self.counts))


@dataclasses.dataclass(frozen=True)
class ExactMixture:
    """The mixture of weights without a short pattern, such as counts of tokens: exact, however long it goes on.

    A binary tree with the sources at its leaves. Each node gives every row that comes to it to one of its two sides, so
    that of the first n rows the left one has n times its share, rounded. Of two sources none is ever more than half a
    row off; further down, errors add up in proportion to weight, which `_flat_tree` keeps below one row.
    """

    counts: np.ndarray
    """float64 [sources]: the weights, as shares of their sum."""
    splits: tuple[tuple[tuple[int, int, bool], ...], ...]
    """Nodes of each source from the root to it: (weight of the left side, of both, whether it goes left)."""

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Implement Mixture.locate."""
        rows = np.asarray(indices, np.int64)
        sources, ranks = np.zeros(rows.shape, np.int32), np.zeros(rows.shape, np.int64)
        for source, path in enumerate(self.splits):
            if not self.counts[source]:
                continue
            there, mine = rows.astype(object), np.ones(rows.shape, bool)
            for left, both, goes_left in path:
                before, after = _left(there, left, both), _left(there + 1, left, both)
                mine &= (after > before) == goes_left
                there = before if goes_left else there - before
            sources[mine], ranks[mine] = source, there[mine].astype(np.int64)
        return sources, ranks

    def index_of(self, source: int, row: int) -> int:
        """Implement Mixture.index_of."""
        rows = int(row) + 1  # so many rows of the source are there with it
        for left, both, goes_left in reversed(self.splits[source]):
            if goes_left:  # the fewest n with (2 n left + both) // (2 both) = rows
                rows = -(-(2 * rows - 1) * both // (2 * left))
            else:  # the fewest n with n - (2 n left + both) // (2 both) = rows
                rows = (2 * rows - 1) * both // (2 * (both - left)) + 1
        return rows - 1

    def taken(self, rows: int) -> np.ndarray:
        """Implement Mixture.taken."""
        found = np.zeros(len(self.splits), np.int64)
        for source, path in enumerate(self.splits):
            there = int(rows) if self.counts[source] else 0
            for left, both, goes_left in path:
                before = _left(there, left, both)
                there = before if goes_left else there - before
            found[source] = there
        return found


def _left(rows, left: int, both: int):
    """Return how many of the first rows that come to a node its left side has; whole numbers of any size."""
    return (2 * rows * left + both) // (2 * both)


@functools.lru_cache
def _exact_mixture(weights: tuple[int, ...]) -> ExactMixture:
    splits: list[tuple] = [()] * len(weights)

    def walk(node, path) -> None:
        if isinstance(node, int):
            splits[node] = path
            return
        left, both = _weight(node[0], weights), _weight(node, weights)
        walk(node[0], (*path, (left, both, True)))
        walk(node[1], (*path, (left, both, False)))

    walk(_flat_tree(weights), ())
    return ExactMixture(np.array([weight / sum(weights) for weight in weights]), tuple(splits))


def _weight(node, weights: Sequence[int]) -> int:
    return weights[node] if isinstance(node, int) else _weight(node[0], weights) + _weight(node[1], weights)


def _flat_tree(weights: Sequence[int]):
    """The tree of sources with weight, nested pairs, in which no source can be a row off, or as good as is found.

    Sources are added from the heaviest on, where they do least harm; the best few trees are kept on the way. Up to six
    sources there is always one below a row; of many, all tried bounds are below 1.2.
    """
    order = sorted((source for source, weight in enumerate(weights) if weight), key=lambda source: -weights[source])
    trees: list = [order[0]]
    for source in order[1:]:
        wider = dict.fromkeys(tree for old in trees for tree in _insertions(old, source))
        trees = sorted(wider, key=lambda tree: max(_errors(tree, weights, True)[1].values()))[:TREES_KEPT]
    return trees[0]


def _insertions(tree, source: int) -> Iterator[tuple]:
    """Yield the trees with one more leaf."""
    yield (source, tree)
    if not isinstance(tree, int):
        left, right = tree
        yield from ((inner, right) for inner in _insertions(left, source))
        yield from ((left, inner) for inner in _insertions(right, source))


def _errors(tree, weights: Sequence[int], root: bool = False) -> tuple[int, dict[int, float]]:
    """(weight of a tree; how many rows each of its sources can be off): half a row for each node, in its proportion."""
    if isinstance(tree, int):
        return weights[tree], {tree: 0.0 if root else 0.5}
    (a, left), (b, right) = (_errors(side, weights) for side in tree)
    errors = left | right
    return a + b, errors if root else {i: error + 0.5 * weights[i] / (a + b) for i, error in errors.items()}


def make_mixture(weights: Sequence[float], exact: bool = True) -> Mixture | ExactMixture:
    """Return the mixture of sources with these weights, which need not add up to 1; one of weight 0 gives no row.

    Without `exact`, weights whose pattern is long are rounded to a shorter one, as runs that began before there was
    ExactMixture have it. Raises ConfigError for weights below 0, and unless one is above.
    """
    if not (all(weight >= 0 for weight in weights) and any(weight > 0 for weight in weights)):
        raise ConfigError(f"The weights of the sources are {list(weights)}: each must be 0 or more, and one above 0.")
    counts = _whole_numbers(weights)
    if exact and sum(counts) > LONGEST_PERIOD:
        return _exact_mixture(tuple(counts))
    counts = _rounded(counts)
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
    """Return the smallest whole numbers in the proportion of the weights, as their decimals read."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * scale) for weight in exact]
    divisor = gcd(*counts)
    return [count // divisor for count in counts]


def _rounded(counts: list[int]) -> list[int]:
    """Return the numbers, or near ones in about their proportion whose sum is LONGEST_PERIOD, about."""
    total = sum(counts)
    if total <= LONGEST_PERIOD:
        return counts
    return [count and max(1, round(count * LONGEST_PERIOD / total)) for count in counts]
