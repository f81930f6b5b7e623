"""A plan as one page of HTML that needs nothing else: bars for memory and time, the messages, the layouts tried."""

import math

from opendeep_jax.config.schema import RunConfig
from opendeep_jax.display.numbers import human_bytes, human_count, human_dollars, human_time
from opendeep_jax.display.page import bars, details, header, page, section, table, text, tiles
from opendeep_jax.plan.estimate import RunPlan
from opendeep_jax.plan.search import Found


def plan_page(plan: RunPlan, found: list[Found] = (), recipe: RunConfig | None = None) -> str:
    """The page of a plan, and of the layouts that a search tried beside it."""
    title = f"{plan.config.name} on {plan.topology.name}"
    parts = [
        header("OpenDeep plan", title, _subtitle(plan)),
        f"<div class=hero><p>{text(_sentence(plan))}</p>{_headline(plan)}</div>",
        section(
            f"Memory of a device: {plan.verdict}",
            "The first bars are plain arithmetic, an estimate; the last is what the compiler allots. The red line is "
            "what a device has.",
            _memory_bars(plan),
        ),
        _time_section(plan),
        section("Messages", "What each device sends in a step.", _messages(plan)),
        section("Layouts tried", "Ranked by the time that their compiled programs allow.", _layouts(found, recipe)),
        section("What takes most", "On one device, in a step.", _most(plan)),
        "<footer>Nothing here was measured: times are bounds from data sheets, prices are assumptions.</footer>",
    ]
    return page(title, "".join(parts))


def _subtitle(plan: RunPlan) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.axes.items() if size > 1) or "one device"
    return (
        f"{plan.topology.chips:,} {plan.topology.chip.name}, mesh {axes}, {plan.stage.batch_size:,} rows of "
        f"{plan.stage.length:,} tokens a step, compiled in {human_time(plan.compile_seconds)}"
    )


def _sentence(plan: RunPlan) -> str:
    if not plan.fits:
        return plan.why_not()
    times = plan.times
    return (
        f"A step takes {human_time(times.fastest)} to {human_time(times.slowest)}, {human_time(times.scheduled)} as "
        f"the program is scheduled; its bound is {times.bound}."
    )


def _headline(plan: RunPlan) -> str:
    if plan.times is None:
        return ""
    step = plan.times.scheduled
    cost = plan.cost(step)
    return tiles(
        [
            ("Step", human_time(step), "as scheduled, an estimate"),
            ("MFU", f"{plan.mfu(step):.1%}", f"{plan.mfu(plan.times.fastest):.1%} if all is hidden"),
            ("Tokens/s", human_count(plan.tokens / step), f"{human_count(plan.total_tokens)} tokens in all"),
            ("Time", human_time(cost.days * 86_400), f"{human_count(cost.chip_hours)} chip-hours"),
            ("Cost", human_dollars(cost.dollars), f"at ${plan.price:.2f} a chip-hour"),
            ("Memory", human_bytes(plan.total_bytes), f"of {human_bytes(plan.limit_bytes)}"),
        ]
    )


def _memory_bars(plan: RunPlan) -> str:
    rows = [(name, size, human_bytes(size), False) for name, size in plan.components.items()]
    estimated = sum(plan.components.values())
    rows.append(("estimate", estimated, human_bytes(estimated), False))
    if plan.memory:
        rows.append(("arguments", plan.memory.arguments, human_bytes(plan.memory.arguments), False))
        rows.append(("temporaries", plan.memory.temporaries, human_bytes(plan.memory.temporaries), False))
    if not math.isnan(plan.total_bytes):
        rows.append(("compiled total", plan.total_bytes, human_bytes(plan.total_bytes), True))
    return bars(rows, plan.limit_bytes)


def _time_section(plan: RunPlan) -> str:
    times = plan.times
    if times is None:
        return ""
    terms = {
        "compute": times.compute,
        "memory": times.memory,
        "network": times.collective,
        "kernels in turn": times.kernels,
        "waiting for messages": times.waiting,
        "fastest": times.fastest,
        "as scheduled": times.scheduled,
        "timeline": times.timeline,
        "slowest": times.slowest,
    }
    introduction = "Estimates at data-sheet speeds: each term alone, then what the compiled program allows."
    rows = [(name, seconds, human_time(seconds), name == "as scheduled") for name, seconds in terms.items()]
    return section("Time of a step", introduction, bars(rows))


def _messages(plan: RunPlan) -> str:
    traffic = [
        (
            f"{row.kind}, {row.axes}{'' if row.is_async else ', waits'}",
            row.bytes,
            human_bytes(row.bytes),
            not row.is_async,
        )
        for row in plan.traffic[:12]
    ]
    return bars(traffic)


def _most(plan: RunPlan) -> str:
    if plan.program is None:
        return ""
    flops = [(name, f"{count:.3g} FLOPs") for name, count in plan.program.flops_by_name.most_common(12)]
    moved = [(name, human_bytes(size)) for name, size in plan.program.bytes_by_name.most_common(12)]
    return details("FLOPs", table(flops)) + details("HBM traffic", table(moved))


def _layouts(found: list[Found], recipe: RunConfig | None) -> str:
    if not found or recipe is None:
        return ""
    rows = []
    for one in found:
        settings = ", ".join(f"{name}={value}" for name, value in one.candidate.settings(recipe).items()) or "as it is"
        if one.plan is None:
            words = one.problem
        elif one.plan.fits:
            words = f"{human_time(one.plan.times.scheduled)} as scheduled, {human_bytes(one.plan.total_bytes)}"
        else:
            words = one.plan.verdict
        rows.append((settings, f"{words} (by arithmetic {human_time(one.candidate.estimate.seconds)})"))
    return table(rows)
