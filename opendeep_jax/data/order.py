"""The order of training: which row of which packing plan is the n-th row of which step, and the way back.

All of it is arithmetic on the configuration and the number of rows in each plan. A phase of data.phases has a mixture;
its rows of one source come from that source's plan for the phase's length and packing, in a shuffle of their own for
each epoch. Phases that share a plan go on in it where the one before stopped. Where a source is packed for several
lengths, its documents are divided between the plans in proportion to the tokens that each gives, so that no document
is met again in another length before the source is repeated.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schedule import rows_before, stage_at, stages, step_of_row, tokens_before, total_steps
from opendeep_jax.config.schema import DataPhase, RunConfig
from opendeep_jax.data.mixture import ExactMixture, Mixture, make_mixture
from opendeep_jax.data.plan import PlanKind
from opendeep_jax.data.shuffle import shuffled, unshuffled

PlanKey = tuple[int, PlanKind]
"""A source, by its index in data.sources, and the kind of its plan."""


@dataclasses.dataclass(frozen=True)
class PhaseOrder:
    """The rows that a phase of data.phases takes, and the plans it takes them from."""

    phase: DataPhase
    length: int
    packing: str
    mixture: Mixture | ExactMixture
    rows: int
    """Rows that the run trains on in this phase."""
    first: dict[int, int]
    """Rows that earlier phases have taken from the same plan, for each source with weight."""
    kinds: dict[int, PlanKind]
    """Plan of each source with weight."""


class Located(NamedTuple):
    """The origin of rows of one step: rows of the batch [n], and the plan's rows [n] that they are."""

    source: int
    kind: PlanKind
    in_batch: np.ndarray
    in_plan: np.ndarray


class Order:
    """The order of a run's rows. `rows` (of each plan's epoch) must be known before rows are located.

    Without `exact`, it is that of runs which began when weights with long patterns were rounded.
    """

    def __init__(self, config: RunConfig, exact: bool = True):
        self.config, self.exact = config, exact
        self.steps = total_steps(config)
        self.phases = _phases(config, self.steps, exact)
        self.rows: dict[PlanKey, int] = {}

    @property
    def demand(self) -> dict[PlanKey, int]:
        """Rows that the whole run takes from each plan."""
        demand: dict[PlanKey, int] = {}
        for phase in self.phases:
            for source, kind in phase.kinds.items():
                demand[source, kind] = phase.first[source] + int(phase.mixture.taken(phase.rows)[source])
        return demand

    def supply(self, rows: dict[PlanKey, int]) -> None:
        """Take the number of rows in each plan. Raises ConfigError if the run needs more epochs than it may take."""
        self.rows = rows
        for (source, kind), needed in self.demand.items():
            config, there = self.config.data.sources[source], rows[source, kind]
            if needed > there * config.epochs:
                again = math.ceil(100 * needed / max(there, 1)) / 100
                raise ConfigError(
                    f"Source {config.name!r} is exhausted before the run ends: {self.steps:,} steps take {needed:,} "
                    f"rows of {kind.length} tokens from it, and it has {there:,} ({kind.packing}); "
                    f"data.sources.{source}.epochs = {config.epochs:g} lets each be used that often. Train for fewer "
                    f"steps, lower the source's weight, or repeat it on purpose with "
                    f"--data.sources.{source}.epochs={again:g}."
                    if there
                    else f"Source {config.name!r} has no text for rows of {kind.length} tokens ({kind.packing}): its "
                    f"documents are divided between its plans, and {kind.share[1] - kind.share[0]:.2%} of them are "
                    "none. Add documents, lower data.held_out_fraction, or leave the source out of that phase."
                )

    def epochs(self) -> list[float]:
        """Return how often the run goes through each source, in rows taken over rows there."""
        taken, there = np.zeros(len(self.config.data.sources)), np.zeros(len(self.config.data.sources))
        for (source, kind), needed in self.demand.items():
            taken[source] += needed * kind.length
            there[source] += self.rows[source, kind] * kind.length
        return [float(a / b) if b else 0.0 for a, b in zip(taken, there, strict=True)]

    def rows_of_step(self, step: int, rows: Sequence[int] | None = None) -> list[Located]:
        """Return where the rows of `step` (or only `rows` of it) come from, by source."""
        stage = stage_at(self.config, step)
        phase = self.phases[stage.phase]
        in_batch = np.arange(stage.batch_size) if rows is None else np.asarray(rows, np.int64)
        before = rows_before(self.config, step, stage.phase)
        sources, ranks = phase.mixture.locate(before + in_batch)
        located = []
        for source in np.unique(sources).tolist():
            mine = sources == source
            kind = phase.kinds[source]
            in_plan = self._shuffled(source, kind, phase.first[source] + ranks[mine])
            located.append(Located(source, kind, in_batch[mine], in_plan))
        return located

    def _shuffled(self, source: int, kind: PlanKind, taken: np.ndarray) -> np.ndarray:
        size = self.rows[source, kind]
        epochs, places = np.divmod(taken, size)
        in_plan = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            in_plan[mine] = shuffled(places[mine], size, self.config.seed, source, kind.length, epoch)
        return in_plan

    def steps_of_row(self, source: int, kind: PlanKind, row: int) -> list[tuple[int, int]]:
        """Every (step, row of the batch) of the run that trains on a plan's `row`, in order."""
        size, needed = self.rows[source, kind], self.demand[source, kind]
        found = []
        for epoch in range(-(-needed // size)):
            place = unshuffled(np.array([row]), size, self.config.seed, source, kind.length, epoch)
            taken = epoch * size + int(place[0])
            for index, phase in enumerate(self.phases):
                if phase.kinds.get(source) == kind and taken >= phase.first[source]:
                    place_in_phase = phase.mixture.index_of(source, taken - phase.first[source])
                    step = step_of_row(self.config, index, place_in_phase)
                    if step is not None and step[0] < self.steps:
                        found.append(step)
        return sorted(found)


def _phases(config: RunConfig, steps: int, exact: bool) -> list[PhaseOrder]:
    data = config.data
    plain = []
    for index, phase in enumerate(data.phases or (DataPhase(),)):
        weights = phase.weights or [source.weight for source in data.sources]
        length = next(stage.length for stage in stages(config) if stage.phase == index)
        plain.append((phase, make_mixture(weights, exact), length, rows_before(config, steps, index)))

    first: dict[tuple, int] = {}  # rows taken so far, by (source, length, packing)
    begun = []
    for phase, mixture, length, rows in plain:
        packing = phase.packing or data.packing
        mine = {}
        for source, taken in enumerate(mixture.taken(rows).tolist()):
            if mixture.counts[source]:
                mine[source] = first.get((source, length, packing), 0)
                first[source, length, packing] = mine[source] + taken
        begun.append(mine)

    shares = _shares(first)
    orders = []
    for (phase, mixture, length, rows), mine in zip(plain, begun, strict=True):
        packing = phase.packing or data.packing
        kinds = {source: PlanKind("train", length, packing, shares[source, length, packing]) for source in mine}
        orders.append(PhaseOrder(phase, length, packing, mixture, rows, mine, kinds))
    return orders


def _shares(rows: dict[tuple, int]) -> dict[tuple, tuple[float, float]]:
    """The part of its source's documents that each plan gets: in proportion to its tokens; all for one of no row."""
    shares = {}
    for source in {source for source, _, _ in rows}:
        tokens = {key: taken * key[1] for key, taken in rows.items() if key[0] == source}
        total, at = sum(tokens.values()), 0
        for key, taken in tokens.items():
            shares[key] = (at / total, (at + taken) / total) if taken else (0.0, 1.0)
            at += taken
    return shares


def describe_phases(order: Order) -> list[dict]:
    """Return the phases of a run for people and data.json: name, steps, tokens, batch, length, weights."""
    config = order.config
    described = []
    for index, phase in enumerate(order.phases):
        mine = [stage for stage in stages(config) if stage.phase == index]
        begin = min(mine[0].first_step, order.steps)
        end = int(min(mine[-1].first_step + mine[-1].steps, order.steps))
        described.append(
            {
                "name": phase.phase.name,
                "first_step": begin,
                "steps": end - begin,
                "tokens": tokens_before(config, end) - tokens_before(config, begin),
                "sequence_length": phase.length,
                "packing": phase.packing,
                "batch_size": mine[-1].batch_size,
                "weights": (phase.mixture.counts / phase.mixture.counts.sum()).tolist(),
            }
        )
    return described
