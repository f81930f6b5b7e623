"""A plan: the compiled training step of a run on a topology, with what it says of memory, time and cost."""

import math
from dataclasses import dataclass, field

from opendeep_jax.config.checks import ConfigError, check_devices
from opendeep_jax.config.rules import axis_sizes
from opendeep_jax.config.schedule import Stage, tokens_before, total_steps
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.display.numbers import human_bytes
from opendeep_jax.models.accounting import flops_per_token
from opendeep_jax.plan.batch import largest_stage
from opendeep_jax.plan.compile import MemoryUse, OutOfResource, compile_step
from opendeep_jax.plan.cost import Cost, cost_of
from opendeep_jax.plan.memory import memory_by_component, memory_fixes
from opendeep_jax.plan.program import Program, analyze
from opendeep_jax.plan.roofline import Roofline, Traffic, roofline, traffic
from opendeep_jax.plan.shortage import MEMORY, Shortage
from opendeep_jax.plan.topology import Topology


@dataclass(frozen=True)
class RunPlan:
    """What a step of a run would take on a topology. Bytes are of one device; FLOPs and tokens of all together.

    Where the program does not fit the device's memory there is none: `program` and all that follows from it is None.
    """

    config: RunConfig
    topology: Topology
    stage: Stage
    """The batch that was compiled."""
    total_tokens: float
    """The run's."""
    price: float
    """Dollars for a chip-hour."""
    axes: dict[str, int]
    """Sizes of the mesh axes."""
    components: dict[str, float]
    """Estimated bytes by what they are for."""
    compile_seconds: float
    memory: MemoryUse | None = None
    needed_bytes: float = math.nan
    """Where it does not fit: what the compiler says it would need, or, where weights and optimizer state alone are too
    much and nothing was compiled, what arithmetic says."""
    shortage: Shortage | None = None
    """What the compiler ran short of, where that is not the device's memory."""
    program: Program | None = None
    times: Roofline | None = None
    traffic: list[Traffic] = field(default_factory=list)
    text: str = field(default="", repr=False)
    """The optimized HLO."""

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.stage.batch_size * self.stage.length

    @property
    def limit_bytes(self) -> float:
        """What a program may fill of a device's memory."""
        return self.topology.chip.per_device().memory_bytes

    @property
    def total_bytes(self) -> float:
        """Bytes that the program takes, or would take."""
        return self.memory.total if self.memory else self.needed_bytes

    @property
    def fits(self) -> bool:
        """Whether the program fits."""
        return self.memory is not None and self.memory.total <= self.limit_bytes

    @property
    def model_flops(self) -> float:
        """FLOPs of the model's mathematics in a step, nothing counted twice."""
        return flops_per_token(self.config.model, self.stage.length).total * self.tokens

    @property
    def hardware_flops(self) -> float | None:
        """FLOPs that the chips carry out in a step: recomputation and padding are in it."""
        return self.program.flops * self.topology.device_count if self.program else None

    def mfu(self, seconds: float) -> float:
        """The share of the chips' bfloat16 peak that the model's FLOPs are, at so many seconds a step."""
        return self.model_flops / seconds / self.topology.chips / self.topology.chip.flops

    def cost(self, seconds: float) -> Cost:
        """The whole run at so many seconds a step."""
        return cost_of(self.total_tokens, self.tokens / seconds, self.topology.chips, self.price)

    def to_json(self) -> dict:
        """The plan as plain data; what a program that does not fit can't tell is None."""
        memory, times, step = self.memory, self.times, self.times.scheduled if self.times else None
        cost = self.cost(step) if step else None
        needed = None if math.isnan(self.total_bytes) else self.total_bytes
        by_kind: dict[str, float] = {}
        for row in self.traffic:
            by_kind[row.kind] = by_kind.get(row.kind, 0.0) + row.bytes
        return {
            "recipe": self.config.name,
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "devices": self.topology.device_count,
            "mesh": self.axes,
            "rows_per_step": self.stage.batch_size,
            "sequence_length": self.stage.length,
            "compile_seconds": self.compile_seconds,
            "memory": {
                "arguments_bytes": memory.arguments if memory else None,
                "temporaries_bytes": memory.temporaries if memory else None,
                "donated_bytes": memory.donated if memory else None,
                "total_bytes": needed,
                "limit_bytes": self.limit_bytes,
                "fits": self.fits,
                "estimate_bytes": self.components,
            },
            "shortage": self._shortage_json(),
            "flops": {
                "model_per_token": self.model_flops / self.tokens,
                "model_per_step": self.model_flops,
                "hardware_per_step": self.hardware_flops,
            },
            "collective_bytes": by_kind,
            "collectives": [row._asdict() for row in self.traffic],
            "roofline": {
                "compute_seconds": times.compute if times else None,
                "memory_seconds": times.memory if times else None,
                "collective_seconds": times.collective if times else None,
                "step_seconds": step,
                "fastest_seconds": times.fastest if times else None,
                "timeline_seconds": times.timeline if times else None,
                "slowest_seconds": times.slowest if times else None,
                "bound": times.bound if times else None,
            },
            "mfu": self.mfu(step) if step else None,
            "tokens_per_second": self.tokens / step if step else None,
            "total_tokens": self.total_tokens,
            "days": cost.days if cost else None,
            "chip_hours": cost.chip_hours if cost else None,
            "cost_usd": cost.dollars if cost else None,
            "price_per_chip_hour_usd": self.price,
            "warnings": self.warnings(),
        }

    def _shortage_json(self) -> dict | None:
        if self.shortage is None:
            return None
        return {name: None if value != value else value for name, value in self.shortage._asdict().items()}

    def warnings(self) -> list[str]:
        """What the figures leave out, in sentences."""
        if self.program is None:
            return []
        found = []
        if self.program.unknown_loops:
            found.append(f"{self.program.unknown_loops:.0f} loops of unknown length are counted once")
        if self.program.uncounted:
            names = ", ".join(sorted(self.program.uncounted)[:3])
            found.append(f"{len(self.program.uncounted)} kernels do not tell their FLOPs, which count as 0: {names}")
        return found

    @property
    def verdict(self) -> str:
        """In a few words, whether it fits."""
        if self.shortage is None:
            return "fits" if self.fits else "does not fit"
        return f"runs out of {self.shortage.resource}" if self.shortage.resource else "refused by the compiler"

    def why_not(self) -> str:
        """Why it does not fit, by how much, and what would help: the text of an error."""
        if self.shortage:
            return f"{self.config.name} does not compile for {self.topology.name}. {self.shortage.sentence()}"
        over = self.total_bytes - self.limit_bytes
        known = not math.isnan(over)
        amount = f"{human_bytes(over)} more than the" if known else "more than the"
        sentence = (
            f"{self.config.name} does not fit on {self.topology.name}: each device needs {amount} "
            f"{human_bytes(self.limit_bytes)} that it has."
        )
        helpful = memory_fixes(self.config, self.stage, self.axes)
        if not helpful:
            return f"{sentence} Use more chips, or a smaller batch (--rows_per_chip)."
        enough = [fix for fix in helpful if known and fix.saves >= over]
        shown = enough[:2] or helpful[:3]
        knobs = " or " if enough else " and "
        words = knobs.join(f"{fix.setting} (saves about {human_bytes(fix.saves)})" for fix in shown)
        more = "" if enough else " If that is not enough, use more chips or a smaller batch (--rows_per_chip)."
        return f"{sentence} By arithmetic, {words} would {'do' if enough else 'help'}.{more}"


def check_mesh(config: RunConfig, topology: Topology) -> None:
    """Raises ConfigError unless the mesh takes all devices of the topology and the batches divide over it."""
    try:
        check_devices(config, topology.device_count)
    except ConfigError as error:
        raise ConfigError(
            f"--topology={topology.name} has {topology.device_count} devices. {error} (--rows_per_chip sets the batch.)"
        ) from error


def make_plan(config: RunConfig, topology: Topology, price: float = 0.0, total_tokens: float = 0.0) -> RunPlan:
    """Compiles a run's training step for a topology and reads what it would take.

    Args:
        price: dollars for a chip-hour; 0 takes the chip's default, an assumption.
        total_tokens: tokens of the whole run; 0 takes the configuration's.
    Raises:
        ConfigError: for a mesh that does not fit the topology.
    """
    check_mesh(config, topology)
    stage, axes = largest_stage(config), axis_sizes(config.parallel, topology.device_count)
    given = dict(
        config=config,
        topology=topology,
        stage=stage,
        total_tokens=total_tokens or tokens_before(config, total_steps(config)),
        price=price or topology.chip.price,
        axes=axes,
        components=memory_by_component(config, stage, axes),
    )
    parts = given["components"]
    if parts["weights"] + parts["optimizer"] > topology.chip.per_device().memory_bytes:  # no compiler can mend that
        return RunPlan(**given, compile_seconds=0.0, needed_bytes=sum(parts.values()))
    try:
        compiled = compile_step(config, stage, topology)
    except OutOfResource as error:
        short = error.shortage
        if short.resource == MEMORY:
            return RunPlan(**given, compile_seconds=error.seconds, needed_bytes=short.needed)
        return RunPlan(**given, compile_seconds=error.seconds, shortage=short)
    program = analyze(compiled.text)
    return RunPlan(
        **given,
        compile_seconds=compiled.seconds,
        memory=compiled.memory,
        program=program,
        times=roofline(program, compiled.network),
        traffic=traffic(program, compiled.network),
        text=compiled.text,
    )
