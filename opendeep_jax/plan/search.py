"""Ranking of a run's possible layouts on a topology: all of them by arithmetic, the best by their programs."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from opendeep_jax.config.checks import ConfigError, deferred
from opendeep_jax.config.load import diff
from opendeep_jax.config.rules import axis_sizes, mesh_problems
from opendeep_jax.config.schema import ParallelConfig, RunConfig
from opendeep_jax.plan.arithmetic import Estimate, estimate
from opendeep_jax.plan.batch import largest_stage
from opendeep_jax.plan.estimate import RunPlan, make_plan
from opendeep_jax.plan.topology import Topology

LARGEST_TENSOR = 16
STAGES = (1, 2, 4, 8, 16)
CONTEXTS = (1, 2, 4, 8)
ACCUMULATIONS = (1, 2, 4, 8)
ROOM = 1.1
"""Allowed ratio of an estimate to the memory limit for a layout to be compiled: the compiler is often thriftier than
arithmetic."""


class Candidate(NamedTuple):
    """A layout, and what arithmetic says of it."""

    config: RunConfig
    estimate: Estimate

    def settings(self, recipe: RunConfig) -> dict[str, str]:
        """Settings that differ from the recipe, as `{"parallel.expert": "8"}`."""
        changes = diff(recipe, self.config)
        return {name: str(value) for name, _, value in changes if not isinstance(value, tuple)}


class Found(NamedTuple):
    """A layout that was compiled."""

    candidate: Candidate
    plan: RunPlan | None
    """None where it could not be compiled."""
    problem: str
    """Reason why the layout does not work."""

    @property
    def rank(self) -> tuple[bool, float]:
        """Fitting ones first, then the quickest."""
        fits = self.plan is not None and self.plan.fits
        return not fits, self.plan.times.scheduled if fits else self.candidate.estimate.seconds


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def layouts(config: RunConfig, topology: Topology) -> Iterator[ParallelConfig]:
    """Sizes of the mesh axes that the topology allows; replicas are what lies across slices."""
    devices, model = topology.device_count, config.model
    experts = divisors(model.moe.num_experts) if model.moe.num_experts else [1]
    tensors = [size for size in divisors(model.attention.num_heads) if size <= LARGEST_TENSOR]
    replicas = [topology.slices] if topology.chip.platform == "tpu" else [1]
    for stage, expert, context, tensor, data in itertools.product(STAGES, experts, CONTEXTS, tensors, replicas):
        fixed = data * stage * expert * context * tensor
        if devices % fixed == 0 and stage <= model.num_layers:
            sizes = dict(data=data, stage=stage, expert=expert, context=context, tensor=tensor)
            yield dataclasses.replace(config.parallel, **sizes, fsdp=devices // fixed)


def candidates(config: RunConfig, topology: Topology) -> list[Candidate]:
    """All layouts that keep the rules and might fit, the quickest by arithmetic first.

    Tried are axis sizes, full and named rematerialization, micro-batches, and one or two batch parts.
    """
    found: dict[RunConfig, Candidate] = {}
    remats = [config.model.remat, *(dataclasses.replace(config.model.remat, dense=p, moe=p) for p in ("full", "named"))]
    stage = largest_stage(config)
    limit = topology.chip.per_device().memory_bytes * ROOM
    for parallel, remat, micros in itertools.product(layouts(config, topology), dict.fromkeys(remats), ACCUMULATIONS):
        with deferred():  # all together are checked below
            parts = 2 if parallel.expert > 1 else 1
            execution = dataclasses.replace(config.model.execution, batch_parts=parts)
            model = dataclasses.replace(config.model, remat=remat, execution=execution)
            train = dataclasses.replace(config.train, accumulation_steps=micros * parallel.stage)
            changed = dataclasses.replace(config, model=model, parallel=parallel, train=train)
        axes = axis_sizes(changed.parallel, topology.device_count)
        if next(mesh_problems(changed, axes), None) is None:
            guess = estimate(changed, stage, topology, axes)
            if guess.bytes <= limit:
                found[changed] = Candidate(changed, guess)
    return sorted(found.values(), key=lambda candidate: candidate.estimate.seconds)


def search(
    config: RunConfig, topology: Topology, count: int, price: float, total_tokens: float, tell=print
) -> list[Found]:
    """Compile the `count` best layouts by arithmetic, and return them ranked, the best first.

    Layouts that differ in rematerialization or micro-batches alone count as one until others have had their turn.

    Args:
        tell: is called with a line of text as each is compiled.
    Raises:
        ConfigError: where no layout keeps the rules and fits by arithmetic.
    """
    ranked = candidates(config, topology)
    if not ranked:
        raise ConfigError(
            f"--search: no layout of {config.name} fits on {topology.name} by arithmetic. Use more chips, or a smaller "
            "batch (--rows_per_chip)."
        )
    first_of_mesh = list({candidate.config.parallel: candidate for candidate in reversed(ranked)}.values())[::-1]
    chosen = list(dict.fromkeys([*first_of_mesh, *ranked]))[:count]
    tell(f"{len(ranked):,} layouts might fit; compiling the best {len(chosen)} by arithmetic")
    found = []
    for number, candidate in enumerate(chosen, 1):
        try:
            plan, problem = make_plan(candidate.config, topology, price, total_tokens), ""
        except (ConfigError, NotImplementedError, ValueError) as error:
            plan, problem = None, str(error).splitlines()[0]
        found.append(Found(candidate, plan, problem))
        words = problem or (f"{plan.times.scheduled:.3g} s as scheduled" if plan.times else plan.verdict)
        settings = " ".join(f"--{name}={value}" for name, value in candidate.settings(config).items()) or "as it is"
        tell(f"{number}/{len(chosen)}  {words}  (by arithmetic {candidate.estimate.seconds:.3g} s)  {settings}")
    return sorted(found, key=lambda one: one.rank)


def flag_file(candidate: Candidate, recipe: RunConfig, recipe_name: str, topology: Topology) -> str:
    """A layout's settings as a file that `opendeep train --config=RECIPE --flagfile=FILE` takes."""
    stage = largest_stage(candidate.config)
    lines = [
        f"# Layout of {recipe_name} on {topology.name}, as `opendeep plan --search` found it",
        f"# for batches of {stage.batch_size} rows of {stage.length} tokens.",
    ]
    lines += [f"--{name}={value}" for name, value in candidate.settings(recipe).items()]
    return "\n".join(lines) + "\n"
