"""Many variants of one recipe, trained and compared: `opendeep sweep`. docs/sweeps.md shows one.

settings -> combinations -> runs (sweep_axes, sweep_plan) -> trained here, or handed to `opendeep launch`
-> results -> table, pictures, best.py (sweep_results, sweep_plots)
"""

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.exits import OK, STOPPED
from opendeep_jax.config.files import write_atomically
from opendeep_jax.display.tables import text_table
from opendeep_jax.jobs.launch.render import check_engine, check_target
from opendeep_jax.jobs.sweep.local import LAST_LINES, Command, locked, prepare_data, run_here, train_command
from opendeep_jax.jobs.sweep.plan import Sweep, SweepRun, check, save
from opendeep_jax.jobs.sweep.recipe import recipe_source
from opendeep_jax.jobs.sweep.results import (
    Row,
    best_summary,
    mean_text,
    ranked,
    read_result,
    rows,
    settings,
    table_lines,
    write_tables,
)
from opendeep_jax.jobs.sweep.search import check_ends, next_combinations
from opendeep_jax.record.workdir import check_workdir

BEST = "best.py"


def run_sweep(sweep: Sweep, parallel: int = 1, target: str = "local", command: Command | None = None) -> int:
    """Run what has no result yet, and write tables, pictures and the best recipe; return an exit status.

    The status is 0 when every run has its result, or was handed over; STOPPED when a run failed; RESUME or
    INTERRUPTED after SIGTERM or Ctrl-C. The same command goes on in each case.

    Args:
        parallel: runs at once here; with optuna also the combinations that are chosen at a time.
        target: `local`, or where `opendeep launch` can start a run.
        command: what starts a run; `opendeep train` if None.
    Raises:
        ConfigError: for settings, directories and text that no run can start from.
    """
    if parallel < 1:
        raise ConfigError(f"--parallel={parallel}: must be 1 or more, the runs at once.")
    if target != "local":
        check_target(target)
        check_engine(target)
    if sweep.method == "optuna":
        check_ends(sweep)
    tried, runs = check(sweep)
    check_workdir(sweep.base, sweep.directory, branches=bool(sweep.parent))
    with locked(sweep.directory, "sweeps", seconds=5.0):
        if sweep.method == "optuna":  # what another process has added while this one waited
            tried, runs = check(sweep)
        save(sweep, tried, runs)
        while True:
            if target != "local":
                submit_runs(sweep, runs, target)
                status = OK
            else:
                if command is None and parallel > 1:
                    prepare_data(sweep, [run for run in runs if read_result(run).state != "finished"])
                status = run_here(runs, parallel, command or train_command(sweep))
            states = [read_result(run).state for run in runs]
            under_way = any(state in ("begun", "waiting", "handed over") for state in states)
            left = sweep.trials - len(tried) if sweep.method == "optuna" else 0
            if status or under_way or left <= 0:
                break
            more = next_combinations(sweep, rows(runs, sweep.metric), min(parallel, left))
            if not more:
                print(f"optuna proposes nothing that was not tried; the search ends after {len(tried)} combinations.")
                break
            tried = [*tried, *more]
            runs = sweep.all_runs(tried)
            save(sweep, tried, runs)
        report(sweep, runs)
    return status or (STOPPED if "failed" in states else OK)


def submit_runs(sweep: Sweep, runs: Sequence[SweepRun], target: str) -> None:
    """Give every run that has neither a result nor a job to `opendeep launch`, one after the other.

    Raises ConfigError with the launcher's own words where it refuses; runs before that one stay handed over.
    """
    for run in runs:
        if read_result(run).state in ("finished", "handed over"):
            continue
        command = [sys.executable, "-m", "opendeep_jax", "launch", f"--target={target}"]
        command += [*sweep.shared, f"--workdir={run.workdir}", *run.arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said = done.stdout.strip()
        if done.returncode:
            lines = "\n".join(said.splitlines()[-LAST_LINES:])
            raise ConfigError(f"--target={target}: {run.name} could not be handed over:\n{lines}")
        run.sibling_file(".failed").unlink(missing_ok=True)
        write_atomically(run.sibling_file(".job"), said + "\n")
        print(f"handed over {run.name}")


def report(sweep: Sweep, runs: Sequence[SweepRun]) -> list[Row]:
    """Print the table, and write results.csv, results.md, the pictures and best.py from what results there are."""
    from opendeep_jax.jobs.sweep.plots import write_pictures  # matplotlib takes a while

    table = rows(runs, sweep.metric)
    write_tables(sweep, table, write_pictures(sweep, table))
    best = ranked(table)[0] if table else None
    print(f"\n{text_table(table_lines(table, sweep))}\n\n{best_summary(table, sweep)}")
    if best and best.complete:
        write_best(sweep, best)
        print(f"Its recipe: {sweep.directory / BEST}")
    waiting = [result for row in table for result in row.results if result.state in ("begun", "waiting", "handed over")]
    if waiting:
        print(f"{len(waiting)} of {len(runs)} runs have no result yet; the same command goes on.")
    print(f"Table, pictures and failures: {sweep.directory / 'results.md'}")
    return table


def write_best(sweep: Sweep, best: Row) -> Path:
    """Write the best combination as a recipe, with the sweep's first seed; return its path."""
    path = sweep.directory / BEST
    documentation = (
        f"The best of a sweep of {sweep.base.name}: {settings(best, sweep)}.\n\n"
        f"Result:   {sweep.metric} {mean_text(best)}\n"
        f"Command:  opendeep train {shlex.join([f'--config={path}', *sweep.shared[1:]])} --workdir=runs/best"
    )
    config = dataclasses.replace(best.config, name=f"{sweep.base.name}-best")
    write_atomically(path, recipe_source(config, documentation, [axis.field for axis in sweep.axes]))
    return path
