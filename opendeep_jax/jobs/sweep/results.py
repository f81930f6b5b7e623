"""Results of a sweep: one result a run, one row a combination, as a table for people and for programs."""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from opendeep_jax.config.files import write_atomically
from opendeep_jax.config.schedule import stages, total_steps
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.display.numbers import human_count
from opendeep_jax.display.tables import latex_table, markdown_table
from opendeep_jax.jobs.sweep.axes import format_value, value_of
from opendeep_jax.jobs.sweep.plan import Sweep, SweepRun
from opendeep_jax.models.accounting import flops_per_token
from opendeep_jax.record.files import finished_summary, number

State = Literal["finished", "failed", "handed over", "begun", "waiting"]
TITLES = {
    "held_out_bits_per_byte": "held-out bits/byte",
    "final_loss": "final loss, nats/token",
    "seconds": "seconds",
}


@dataclasses.dataclass(frozen=True)
class RunResult:
    """State of a run, read from its files alone."""

    run: SweepRun
    state: State
    summary: dict
    """summary.json of a finished run, {} of any other."""
    reason: str = ""
    """Reason that a failed run has no result: its ending, and the last lines of its output."""

    def number(self, name: str) -> float:
        """Return a field of the summary; NaN where there is none, or the run has diverged."""
        value, loss = number(self.summary.get(name)), number(self.summary.get("final_loss"))
        return math.nan if value is None or loss is None else float(value)

    def described(self) -> str:
        """Return the result in a few words."""
        bits, loss = self.number("held_out_bits_per_byte"), self.number("final_loss")
        if math.isnan(loss):
            return "diverged"
        return f"loss {loss:.4g}" + ("" if math.isnan(bits) else f", held-out {bits:.4g} bits/byte")


@dataclasses.dataclass(frozen=True)
class Row:
    """One combination, over its seeds."""

    results: list[RunResult]
    numbers: list[float]
    """The metric of the runs that have one."""
    mean: float
    """NaN unless every run has one: the mean of those that survived would flatter a combination that diverges."""
    spread: float
    """Sample standard deviation; NaN for fewer than two."""
    flops: float
    """FLOPs of one run's training."""

    @property
    def config(self) -> RunConfig:
        """The configuration of its first seed."""
        return self.results[0].run.config

    @property
    def complete(self) -> bool:
        """True where every run has the metric."""
        return not math.isnan(self.mean)


def read_result(run: SweepRun) -> RunResult:
    """Return what the files of a run say of it."""
    if summary := finished_summary(run.workdir, total_steps(run.config)):
        return RunResult(run, "finished", summary)
    failed = run.sibling_file(".failed")
    if failed.exists():
        return RunResult(run, "failed", {}, failed.read_text(encoding="utf-8", errors="replace").strip())
    if run.sibling_file(".job").exists():
        return RunResult(run, "handed over", {})
    return RunResult(run, "begun" if (run.workdir / "config.json").exists() else "waiting", {})


def training_flops(config: RunConfig) -> float:
    """FLOPs of all training steps: the model's own matmuls, forward and backward."""
    left, total = total_steps(config), 0.0
    for stage in stages(config):
        steps = min(stage.steps, left)
        left -= steps
        per_token = flops_per_token(config.model, stage.length).total
        total += steps * stage.batch_size * stage.length * per_token
    return total


def rows(runs: Sequence[SweepRun], metric: str) -> list[Row]:
    """One row for each combination, in the order of the sweep."""
    trials: dict[int, list[RunResult]] = {}
    for run in runs:
        trials.setdefault(run.trial, []).append(read_result(run))
    return [_row(results, metric) for results in trials.values()]


def _row(results: list[RunResult], metric: str) -> Row:
    numbers = [number for result in results if not math.isnan(number := result.number(metric))]
    mean = statistics.fmean(numbers) if len(numbers) == len(results) else math.nan
    spread = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
    return Row(results, numbers, mean, spread, training_flops(results[0].run.config))


def ranked(table: Sequence[Row]) -> list[Row]:
    """Return the rows, the best first; those without a mean at the end, in the order of the sweep."""
    return sorted(table, key=lambda row: (not row.complete, row.mean if row.complete else 0.0))


def best_summary(table: Sequence[Row], sweep: Sweep) -> str:
    """Return a sentence on the best combination and whether the spread over seeds supports it."""
    order = [row for row in ranked(table) if row.complete]
    if not order:
        return "No combination has all its results yet."
    best = order[0]
    text = f"Best: {settings(best, sweep)}, {TITLES[sweep.metric]} {mean_text(best)}."
    if len(order) == 1:
        return text
    gap, second = order[1].mean - best.mean, settings(order[1], sweep)
    spreads = [row.spread for row in order[:2] if not math.isnan(row.spread)]
    if not spreads:
        return (
            f"{text} The next, {second}, is behind by {gap:.3g}; one seed each says nothing of the spread (--seeds=3)."
        )
    where = "only {}, within" if gap <= max(spreads) else "{}, more than"
    return (
        f"{text} The next, {second}, is behind by {where.format(f'{gap:.3g}')} the seeds' spread of {max(spreads):.2g}."
    )


def settings(row: Row, sweep: Sweep) -> str:
    """`learning_rate=0.0003, experts_per_token=2`."""
    return ", ".join(f"{axis.alias}={format_value(value_of(row.config, axis.field))}" for axis in sweep.axes)


def mean_text(row: Row) -> str:
    """`1.7312 ± 0.0041 (n=3)`; as far as there is something to say."""
    if not row.numbers:
        return "-"
    mean = statistics.fmean(row.numbers)
    spread = "" if math.isnan(row.spread) else f" ± {row.spread:.2g}"
    short = "" if row.complete else f" of {len(row.results)}"
    return f"{mean:.4f}{spread} (n={len(row.numbers)}{short})"


def table_lines(table: Sequence[Row], sweep: Sweep) -> list[list[str]]:
    """Return the table as texts, headings first, the best combination first."""
    lines = [["rank", *(axis.alias for axis in sweep.axes), TITLES[sweep.metric], "FLOPs", "parameters", "runs"]]
    for rank, row in enumerate(ranked(table), 1):
        values = [format_value(value_of(row.config, axis.field)) for axis in sweep.axes]
        parameters = next((r.summary["parameters"] for r in row.results if "parameters" in r.summary), None)
        count = "-" if parameters is None else human_count(parameters)
        place = str(rank) if row.complete else "-"
        lines.append([place, *values, mean_text(row), f"{row.flops:.3g}", count, _states(row)])
    return lines


def _states(row: Row) -> str:
    states = ["diverged" if r.summary and math.isnan(r.number("final_loss")) else r.state for r in row.results]
    if set(states) == {"finished"}:
        return "finished"
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def write_tables(sweep: Sweep, table: Sequence[Row], pictures: Sequence[str] = ()) -> None:
    """Write results.csv, a line for each run; results.md and results.tex, a line for each combination.

    results.md has the pictures too.
    """
    numbers = ("held_out_bits_per_byte", "final_loss", "tokens", "seconds", "tokens_per_second", "parameters",
               "active_parameters")  # fmt: skip
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["run", *(axis.field for axis in sweep.axes), "seed", "state", *numbers, "training_flops"])
    for row in table:
        for result in row.results:
            config = result.run.config
            values = [format_value(value_of(config, axis.field)) for axis in sweep.axes]
            cells = ["" if (cell := result.summary.get(name)) is None else cell for name in numbers]
            writer.writerow([result.run.name, *values, config.seed, result.state, *cells, f"{row.flops:.6g}"])
    write_atomically(sweep.directory / "results.csv", stream.getvalue())
    lines = table_lines(table, sweep)
    write_atomically(sweep.directory / "results.tex", latex_table(lines, f"Sweep of {sweep.base.name}"))
    parts = [f"# Sweep of {sweep.base.name}\n", best_summary(table, sweep) + "\n", markdown_table(lines)]
    parts += [f"![{Path(picture).stem}]({picture})\n" for picture in pictures]
    failed = [result for row in table for result in row.results if result.state == "failed"]
    if failed:
        parts.append("## Failed runs\n")
        parts += [f"{result.run.name}\n\n```text\n{result.reason}\n```\n" for result in failed]
    write_atomically(sweep.directory / "results.md", "\n".join(parts))
