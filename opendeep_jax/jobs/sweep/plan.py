"""The runs of a sweep, checked before the first one starts, and what its directory remembers of them.

SWEEP/recipe.py       the recipe with the settings that all runs share; every run is this and its own settings
SWEEP/sweep.json      what was asked for, and the list of runs
SWEEP/runs/NAME/      a run's work directory; NAME.log is what it printed, NAME.failed why it has no result,
                      NAME.job what `opendeep launch` said of it
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import write_atomically
from opendeep_jax.config.load import HARMLESS, diff, format_diff, load_recipe, parent_of
from opendeep_jax.config.overrides import apply
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.jobs.sweep.axes import Axis, Combination, combinations, parse_axes, run_name
from opendeep_jax.jobs.sweep.recipe import recipe_source

SPEC, RECIPE, RUNS = "sweep.json", "recipe.py", "runs"
SPEC_FIELDS = {
    "method": str, "axes": dict, "trials": int, "seeds": int, "metric": str, "draw_seed": int, "combinations": list,
    "runs": list,
}  # fmt: skip
"""Fields of sweep.json and their types."""
METRICS = ("held_out_bits_per_byte", "final_loss", "seconds")
"""Fields of summary.json that runs can be compared by; less is better in each."""


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    trial: int
    """Index of its combination."""
    combination: Combination
    config: RunConfig
    workdir: Path
    arguments: tuple[str, ...]
    """Its own settings, as its command line gives them."""

    def sibling_file(self, suffix: str) -> Path:
        """Return the file of that suffix beside its work directory, such as NAME.log."""
        return self.workdir.with_name(self.workdir.name + suffix)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Question that a sweep answers: which settings, which values, by which metric."""

    directory: Path
    base: RunConfig
    """The recipe with the settings that all runs share."""
    axes: tuple[Axis, ...]
    method: str
    trials: int
    """Number of combinations that a random search or optuna tries."""
    seeds: int
    """Runs of each combination; their seeds are the recipe's and those after it."""
    metric: str
    draw_seed: int = 0
    """Seed of a random search."""
    parent: str = ""
    """RUN@STEP where all runs are branches of one checkpoint."""
    resolved: dict[tuple[str, ...], RunConfig] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """Combinations whose configuration is known; to work one out takes 30 ms."""

    @property
    def shared(self) -> list[str]:
        """Beginning of every run's command line: the sweep's recipe, and the checkpoint to branch from."""
        return [f"--config={self.directory / RECIPE}", *([f"--from={self.parent}"] if self.parent else [])]

    def runs_of(self, trial: int, combination: Combination) -> list[SweepRun]:
        """Return the runs of one combination, one for each seed. Raises ConfigError for settings that cannot work."""
        own = [argument for axis in self.axes for argument in axis.arguments(combination[axis.field])]
        key = tuple(combination[axis.field] for axis in self.axes)
        if key not in self.resolved:
            self.resolved[key] = apply(self.base, own)
        config = self.resolved[key]
        runs = []
        for seed in range(self.base.seed, self.base.seed + self.seeds):
            seeded = dataclasses.replace(config, seed=seed)
            name = run_name(seeded, self.axes)
            title = f"{self.base.name}/{name}"
            arguments = (*own, f"--seed={seed}", f"--name={title}")
            seeded = dataclasses.replace(seeded, name=title)
            runs.append(SweepRun(name, trial, combination, seeded, self.directory / RUNS / name, arguments))
        return runs

    def all_runs(self, tried: Sequence[Combination]) -> list[SweepRun]:
        """Return the runs of all combinations, in order.

        Raises ConfigError, with every problem, for combinations that cannot work, and for two that are the same.
        """
        runs: dict[str, SweepRun] = {}
        problems = []
        for trial, combination in enumerate(tried):
            settings = " ".join(f"--{field}={value}" for field, value in combination.items())
            try:
                added = self.runs_of(trial, combination)
            except ConfigError as error:
                problems.append(f"{settings}: {error}")
                continue
            if added[0].name in runs:
                problems.append(f"{settings}: the same run as {added[0].name}. Leave one of the equal values out.")
            runs |= {run.name: run for run in added}
        if problems:
            more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
            lines = "\n  ".join(problems[:8])
            raise ConfigError(f"{len(problems)} of {len(tried)} combinations cannot be run:\n  {lines}{more}")
        return list(runs.values())


def plan_sweep(
    directory: str | Path,
    base: RunConfig,
    settings: dict[str, str],
    method: str = "grid",
    trials: int = 0,
    seeds: int = 1,
    metric: str = "",
    draw_seed: int = 0,
    parent: str = "",
) -> Sweep:
    """Return a sweep over `settings`, {dotted name of a field: its values as text}. Nothing is written.

    Args:
        directory: where it will be.
        metric: one of METRICS; empty takes held-out bits per byte, or the loss where no text is held out.
        parent: RUN@STEP to branch all runs from.
    Raises:
        ConfigError: for what cannot be swept so.
    """
    metric = metric or ("held_out_bits_per_byte" if base.data.held_out_fraction else "final_loss")
    if metric not in METRICS:
        raise ConfigError(f"--metric={metric}: must be one of {', '.join(METRICS)}; less is better in each.")
    if metric == "held_out_bits_per_byte" and not base.data.held_out_fraction:
        raise ConfigError(
            "--metric=held_out_bits_per_byte: this recipe holds no text out. Set --data.held_out_fraction=0.05, or "
            "--metric=final_loss."
        )
    if seeds < 1:
        raise ConfigError(f"--seeds={seeds}: must be 1 or more, the runs of each combination.")
    searches = method in ("random", "optuna")
    if searches and trials < 1:
        raise ConfigError(f"--trials={trials}: --method={method} must be told how many combinations to try.")
    if trials and not searches:
        raise ConfigError(f"--trials={trials}: --method={method} runs every combination. Leave it out.")
    axes = parse_axes(base, settings, method)
    return Sweep(Path(directory), base, axes, method, trials, seeds, metric, draw_seed, parent)


def one_checkpoint(parent: str, directory: str | Path) -> str:
    """RUN@STEP for the RUN or RUN@STEP of `--from`: a trunk may go on while its branches begin one after the other.

    Without a step it is that of the sweep in `directory`, or else the newest. Raises ConfigError where there is none.
    """
    run, step = parent_of(parent)
    if (Path(directory) / SPEC).exists():
        before = read_spec(directory).get("from", "")
        return before if step is None and before.rpartition("@")[0] == str(run) else parent
    steps = sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal())
    if not steps:
        raise ConfigError(f"--from={parent}: {run} has no checkpoint yet. Let `opendeep train` reach its first one.")
    if step not in (None, *steps):
        there = ", ".join(map(str, steps))
        raise ConfigError(f"--from={parent}: {run} has no checkpoint of step {step}; there are: {there}.")
    return f"{run}@{steps[-1]}" if step is None else parent


def check(sweep: Sweep) -> tuple[list[Combination], list[SweepRun]]:
    """The combinations that are known by now, and their runs, all of them checked. Nothing is written.

    A sweep that is in the directory already goes on, and may have grown: more seeds, values or trials. Raises
    ConfigError where the directory holds another sweep, or a combination cannot work.
    """
    before = read_spec(sweep.directory) if (sweep.directory / SPEC).exists() else None
    if before:
        _check_same(sweep, before)
    tried = before["combinations"] if before else []
    if sweep.method == "random":
        from opendeep_jax.jobs.sweep.search import drawn  # Optuna takes a while

        tried = drawn(sweep.axes, sweep.trials, sweep.draw_seed, tried)
    elif sweep.method != "optuna":
        tried = combinations(sweep.axes, sweep.method)
    runs = sweep.all_runs(tried)
    if before:
        gone = sorted(set(before["runs"]) - {run.name for run in runs})
        if gone:
            raise ConfigError(
                f"--workdir={sweep.directory}: it holds a sweep with runs that this one has not, such as {gone[0]} "
                f"({len(gone)} of {len(before['runs'])}).{_changes(sweep, before)} A sweep may grow; to leave runs "
                "out, give another --workdir."
            )
    return tried, runs


def save(sweep: Sweep, tried: Sequence[Combination], runs: Sequence[SweepRun]) -> None:
    """Write recipe.py and sweep.json."""
    (sweep.directory / RUNS).mkdir(parents=True, exist_ok=True)
    documentation = f"What all runs of a sweep share: {sweep.base.name} with the settings of its command line."
    write_atomically(sweep.directory / RECIPE, recipe_source(sweep.base, documentation))
    spec = {
        "method": sweep.method,
        "axes": {axis.field: axis.text for axis in sweep.axes},
        "trials": sweep.trials,
        "seeds": sweep.seeds,
        "metric": sweep.metric,
        "draw_seed": sweep.draw_seed,
        "from": sweep.parent,
        "combinations": list(tried),
        "runs": [run.name for run in runs],
    }
    write_atomically(sweep.directory / SPEC, json.dumps(spec, indent=2, ensure_ascii=False) + "\n")


def read_spec(directory: str | Path) -> dict[str, Any]:
    """Return the contents of a directory's sweep.json. Raises ConfigError where there is none that can be read."""
    path = Path(directory) / SPEC
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        if wrong := [name for name, kind in SPEC_FIELDS.items() if not isinstance(dict(spec).get(name), kind)]:
            raise ValueError(f"it lacks {', '.join(wrong)}")
        if not all(isinstance(one, dict) and one.keys() == spec["axes"].keys() for one in spec["combinations"]):
            raise ValueError("its combinations are not of its axes")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--workdir={directory}: no sweep can be read there, as {SPEC} is missing or damaged ({error}). Give the "
            "directory of a sweep, or start one: opendeep sweep --help."
        ) from error
    return spec


def read_sweep(directory: str | Path, metric: str = "") -> tuple[Sweep, list[SweepRun]]:
    """Return the sweep in `directory` and its runs; `metric` other than the one that it was started with.

    Raises ConfigError where there is none.
    """
    spec = read_spec(directory)
    base = load_recipe(str(Path(directory) / RECIPE))
    chosen = metric or spec["metric"]
    names = ("method", "trials", "seeds", "draw_seed")
    known = {name: spec[name] for name in names} | {"parent": spec.get("from", "")}
    sweep = plan_sweep(directory, base, spec["axes"], metric=chosen, **known)
    return sweep, sweep.all_runs(spec["combinations"])


def _check_same(sweep: Sweep, before: dict[str, Any]) -> None:
    """Raise ConfigError where the directory's sweep asks another question."""
    shared = load_recipe(str(sweep.directory / RECIPE))
    changed = [change for change in diff(shared, sweep.base) if not _is_harmless(change[0])]
    lines = format_diff(changed).strip().replace("\n", "\n  ")
    other = before["method"] != sweep.method or before.get("from", "") != sweep.parent
    if lines or other or set(before["axes"]) != {axis.field for axis in sweep.axes}:
        raise ConfigError(
            f"--workdir={sweep.directory}: it holds another sweep (there -> here).{_changes(sweep, before)}"
            f"{f'{chr(10)}  {lines}{chr(10)}' if lines else ''} Give that sweep's settings to go on with it, or "
            "another --workdir."
        )
    other = before["axes"] != {axis.field: axis.text for axis in sweep.axes} or before["draw_seed"] != sweep.draw_seed
    if sweep.method in ("random", "optuna") and other:
        raise ConfigError(
            f"--workdir={sweep.directory}: it was drawn from other values, or by another seed (there -> here)."
            f"{_changes(sweep, before)} Give those, or another --workdir."
        )


def _changes(sweep: Sweep, before: dict[str, Any]) -> str:
    here = {"method": sweep.method, "trials": sweep.trials, "seeds": sweep.seeds, "draw_seed": sweep.draw_seed}
    here["from"] = sweep.parent
    here |= {f"sweep.{axis.field}": axis.text for axis in sweep.axes}
    there = {name: before[name] for name in ("method", "trials", "seeds", "draw_seed")}
    there["from"] = before.get("from", "")
    there |= {f"sweep.{field}": text for field, text in before["axes"].items()}
    changed = [
        f"{name} {there.get(name, 'none')} -> {here.get(name, 'none')}"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]
    return f" {'; '.join(changed)}." if changed else ""


def _is_harmless(name: str) -> bool:
    return any(name == field or (field.endswith(".") and name.startswith(field)) for field in HARMLESS)
