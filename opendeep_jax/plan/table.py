"""A plan as text for a terminal."""

import math

from opendeep_jax.display.progress import human_count, human_time, startup_summary
from opendeep_jax.plan.estimate import Plan


def gigabytes(size: float) -> str:
    """Bytes as `47.12 GB` (10^9), small sizes in MB."""
    return f"{size / 1e9:.2f} GB" if size >= 0.1e9 else f"{size / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """A step's time: `12.4 s`, `381 ms`, `74 µs`."""
    for unit, scale in (("s", 1), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def dollars(amount: float) -> str:
    """`$5.58M`, `$12,300` or `$0.42`."""
    if amount >= 1e6:
        return f"${amount / 1e6:.2f}M"
    return f"${amount:,.0f}" if amount >= 100 else f"${amount:.2g}"


def plan_table(plan: Plan) -> str:
    """The whole plan in aligned columns; estimates are called so."""
    return startup_summary([*_what(plan), *_memory(plan), *_work(plan), *_time(plan)])


def _what(plan: Plan) -> list[tuple[str, str]]:
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


def _memory(plan: Plan) -> list[tuple[str, str]]:
    rows = [("Memory of each device, by arithmetic (an estimate)", "")]
    rows += [(name, f"{gigabytes(size):>12}") for name, size in plan.components.items()]
    rows.append(("sum", f"{gigabytes(sum(plan.components.values())):>12}"))
    rows.append(("Memory of each device, as compiled", ""))
    if plan.memory:
        rows += [
            ("arguments", f"{gigabytes(plan.memory.arguments):>12}  of it donated {gigabytes(plan.memory.donated)}"),
            ("temporaries", f"{gigabytes(plan.memory.temporaries):>12}"),
        ]
    if plan.shortage:
        return [*rows, ("total", f"unknown: {plan.verdict}")]
    total = "does not fit" if math.isnan(plan.total_bytes) else f"{gigabytes(plan.total_bytes):>12}"
    spare = plan.limit_bytes - plan.total_bytes
    verdict = f"{gigabytes(spare)} to spare" if plan.fits else "does not fit"
    return [*rows, ("total", total), ("limit", f"{gigabytes(plan.limit_bytes):>12}  {verdict}")]


def _work(plan: Plan) -> list[tuple[str, str]]:
    per_token = plan.model_flops / plan.tokens
    rows = [("Work of a step", ""), ("model FLOPs", f"{plan.model_flops:.4g}, {per_token:.4g} per token")]
    if plan.program is None:
        return rows
    ratio = plan.hardware_flops / plan.model_flops
    rows += [
        ("hardware FLOPs", f"{plan.hardware_flops:.4g}, {ratio * per_token:.4g} per token ({ratio:.2f}x)"),
        ("HBM traffic", f"{gigabytes(plan.program.hbm_bytes)} on each device, a lower bound"),
    ]
    for row in plan.traffic:
        way = "async" if row.is_async else "sync"
        sent = f"{gigabytes(row.bytes):>12} sent over {row.axes}, {way}"
        rows.append((row.kind, f"{sent}, {row.count:,.0f} times, {duration(row.seconds)}"))
    return rows + [("note", warning) for warning in plan.warnings()]


def _time(plan: Plan) -> list[tuple[str, str]]:
    times = plan.times
    if times is None:
        return []
    rows = [("Time of a step, at data-sheet speeds (an estimate)", "")]
    for label, seconds in (("compute", times.compute), ("memory", times.memory), ("network", times.collective)):
        rows.append((label, f"{duration(seconds):>8}{'  the bound' if label == times.bound else ''}"))
    for label, seconds, words in (
        ("fastest", times.fastest, "all else hidden behind the bound"),
        ("as scheduled", times.scheduled, "kernels in turn, waiting where the program waits"),
        ("timeline", times.timeline, "the same, waiting for hidden messages that come too late"),
        ("slowest", times.slowest, "nothing hidden"),
    ):
        rows.append((label, f"{duration(seconds):>8}  MFU {plan.mfu(seconds):5.1%}  {words}"))
    cost = plan.cost(times.scheduled)
    rows += [
        ("The run, as scheduled (an estimate)", ""),
        ("tokens/s", f"{plan.tokens / times.scheduled:,.0f}"),
        ("tokens", human_count(plan.total_tokens)),
        ("time", human_time(cost.days * 86_400)),
        ("cost", f"{dollars(cost.dollars)}: {human_count(cost.chip_hours)} chip-hours at ${plan.price:.2f} (assumed)"),
    ]
    return rows
