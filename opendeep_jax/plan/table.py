"""A plan as text for a terminal."""

import math

from opendeep_jax.display.numbers import human_bytes, human_count, human_dollars, human_time
from opendeep_jax.display.tables import key_value_table
from opendeep_jax.plan.estimate import RunPlan


def plan_table(plan: RunPlan) -> str:
    """Return the plan in aligned columns; estimates are labeled."""
    return key_value_table([*_what(plan), *_memory(plan), *_work(plan), *_time(plan)])


def _what(plan: RunPlan) -> list[tuple[str, str]]:
    topology, chip = plan.topology, plan.topology.chip
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.axes.items() if size > 1) or "one device"
    devices = f", {topology.device_count} devices" if chip.cores > 1 else ""
    return [
        ("Plan", ""),
        ("recipe", plan.config.name),
        ("chips", f"{topology.chips:,} {chip.name} ({topology.name}{devices}), {chip.flops / 1e12:,.0f} TFLOP/s each"),
        ("mesh", axes),
        ("batch", f"{plan.stage.batch_size:,} rows of {plan.stage.length:,}: {human_count(plan.tokens)} tokens a step"),
        ("compiled in", human_time(plan.compile_seconds) if plan.compile_seconds else "nothing: it cannot fit"),
    ]


def _memory(plan: RunPlan) -> list[tuple[str, str]]:
    rows = [("Memory of each device, by arithmetic (an estimate)", "")]
    rows += [(name, f"{human_bytes(size):>12}") for name, size in plan.components.items()]
    rows.append(("sum", f"{human_bytes(sum(plan.components.values())):>12}"))
    rows.append(("Memory of each device, as compiled", ""))
    if memory := plan.memory:
        rows += [
            (
                "arguments",
                f"{human_bytes(memory.arguments):>12}  of it donated {human_bytes(memory.donated)}",
            ),
            ("temporaries", f"{human_bytes(memory.temporaries):>12}"),
        ]
    if plan.shortage:
        return [*rows, ("total", f"unknown: {plan.verdict}")]
    total = "does not fit" if math.isnan(plan.total_bytes) else f"{human_bytes(plan.total_bytes):>12}"
    spare = plan.limit_bytes - plan.total_bytes
    verdict = f"{human_bytes(spare)} to spare" if plan.fits else "does not fit"
    return [*rows, ("total", total), ("limit", f"{human_bytes(plan.limit_bytes):>12}  {verdict}")]


def _work(plan: RunPlan) -> list[tuple[str, str]]:
    per_token = plan.model_flops / plan.tokens
    rows = [("Work of a step", ""), ("model FLOPs", f"{plan.model_flops:.4g}, {per_token:.4g} per token")]
    if plan.program is None:
        return rows
    ratio = plan.hardware_flops / plan.model_flops
    rows += [
        ("hardware FLOPs", f"{plan.hardware_flops:.4g}, {ratio * per_token:.4g} per token ({ratio:.2f}x)"),
        ("HBM traffic", f"{human_bytes(plan.program.hbm_bytes)} on each device, a lower bound"),
    ]
    for row in plan.traffic:
        way = "async" if row.is_async else "sync"
        sent = f"{human_bytes(row.bytes):>12} sent over {row.axes}, {way}"
        rows.append((row.kind, f"{sent}, {row.count:,.0f} times, {human_time(row.seconds)}"))
    return rows + [("note", warning) for warning in plan.warnings()]


def _time(plan: RunPlan) -> list[tuple[str, str]]:
    times = plan.times
    if times is None:
        return []
    rows = [("Time of a step, at data-sheet speeds (an estimate)", "")]
    for label, seconds in (("compute", times.compute), ("memory", times.memory), ("network", times.collective)):
        rows.append((label, f"{human_time(seconds):>8}{'  the bound' if label == times.bound else ''}"))
    for label, seconds, words in (
        ("fastest", times.fastest, "all else hidden behind the bound"),
        ("as scheduled", times.scheduled, "kernels in turn, waiting where the program waits"),
        ("timeline", times.timeline, "the same, waiting for hidden messages that come too late"),
        ("slowest", times.slowest, "nothing hidden"),
    ):
        rows.append((label, f"{human_time(seconds):>8}  MFU {plan.mfu(seconds):5.1%}  {words}"))
    cost = plan.cost(times.scheduled)
    price = f"{human_count(cost.chip_hours)} chip-hours at ${plan.price:.2f} (assumed)"
    rows += [
        ("The run, as scheduled (an estimate)", ""),
        ("tokens/s", f"{plan.tokens / times.scheduled:,.0f}"),
        ("tokens", human_count(plan.total_tokens)),
        ("time", human_time(cost.days * 86_400)),
        ("cost", f"{human_dollars(cost.dollars)}: {price}"),
    ]
    return rows
