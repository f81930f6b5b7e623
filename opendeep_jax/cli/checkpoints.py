"""`opendeep checkpoints ACTION ...`: list, verify, compare, thin out or average a run's checkpoints."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from opendeep_jax.cli.flags import parse, run_action, run_flags
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config
from opendeep_jax.display.progress import progress_bar
from opendeep_jax.display.tables import text_table

HELP = """\
List, verify, compare, thin out or average a run's checkpoints.

usage: opendeep checkpoints list    --workdir=DIRECTORY               steps, sizes, and why each is kept
       opendeep checkpoints verify  --workdir=DIRECTORY [--step=N]    read all again, and name what is damaged
       opendeep checkpoints diff    --workdir=DIRECTORY --a=N --b=N   arrays that differ, of two steps
                                    [--other=DIRECTORY]               … or of two runs
       opendeep checkpoints prune   --workdir=DIRECTORY [--keep=N] [--keep_every=N] [--keep_best=N] [--dry_run]
       opendeep checkpoints average --workdir=DIRECTORY --steps=N,N,N --out=DIRECTORY
"""


def main(argv: Sequence[str]) -> int:
    """Run one of the actions; return the exit status. Raises ConfigError for invalid input."""
    actions = {"list": _list, "verify": _verify, "diff": _diff, "prune": _prune, "average": _average}
    return run_action(actions, ["checkpoints", *argv], HELP)


def _parse(action: str, purpose: str, argv: Sequence[str], dry_run: bool = False, **more: Any) -> flags.FlagValues:
    values = run_flags(**more)
    if dry_run:
        flags.DEFINE_bool("dry_run", False, "Say what would go, and delete nothing.", flag_values=values)
    parse(values, argv, f"opendeep checkpoints {action}", purpose)
    load_run_config(values.workdir)  # refuses a directory without a run before JAX is loaded
    import jax

    jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy with the very run
    return values


def _list(argv: Sequence[str]) -> None:
    values = _parse("list", "Lists a run's checkpoints.", argv)
    from opendeep_jax.checkpoint.tools import list_checkpoints
    from opendeep_jax.display.numbers import human_bytes
    from opendeep_jax.record.origin import lineage, read_origin

    rows = list_checkpoints(values.workdir)
    if not rows:
        print("no checkpoints yet")
        return
    shown = [
        (
            f"{row.step:,}",
            row.time.replace("T", " ")[:19] or "-",
            human_bytes(row.bytes),
            "-" if row.measure is None else f"{row.measure:.4f}",
            row.tier,
            row.why or ("corrupt, moved away" if row.tier == "quarantined" else "not by the policy"),
        )
        for row in rows
    ]
    print(text_table([("step", "time (UTC)", "size", "bits/byte", "tier", "kept as"), *shown], right=(0, 2, 3)))
    if ancestry := lineage(read_origin(values.workdir)):
        print(f"began with: {ancestry}")


def _verify(argv: Sequence[str]) -> None:
    step = (-1, "Step of the checkpoint; -1 verifies all.")
    values = _parse("verify", "Reads checkpoints again, and compares every array's digest.", argv, step=step)
    from opendeep_jax.checkpoint import tools
    from opendeep_jax.checkpoint.files import CorruptCheckpoint
    from opendeep_jax.record.files import checkpoint_steps

    newest = tools.checkpoint_path(values.workdir, _step(values.step))
    paths = [newest] if values.step >= 0 else [newest.parent / str(step) for step in checkpoint_steps(newest.parent)]
    problems = []
    for path in paths:
        try:
            with progress_bar(path.name, tools.array_bytes(path), transient=True) as seen:
                tools.verify(path, seen)
            print(f"step {int(path.name):,}: all {len(tools.read_record(path)['arrays'])} arrays are what was saved")
        except CorruptCheckpoint as error:
            if path.is_dir():
                problems.append(f"step {int(path.name):,}: {error}")
            else:
                print(f"step {int(path.name):,}: was deleted meanwhile, as the run has newer ones")
    if problems:
        raise ConfigError(
            f"--workdir={values.workdir}: {'; '.join(problems)}. Training skips such a checkpoint; "
            "restore it from a copy, or delete it."
        )


def _diff(argv: Sequence[str]) -> None:
    values = _parse(
        "diff",
        "Compares all arrays of two checkpoints.",
        argv,
        a=(-1, "Step of the first; -1 takes the newest."),
        b=(-1, "Step of the second; -1 takes the newest."),
        other=("", "Work directory of the second, if it is another's."),
    )
    from opendeep_jax.checkpoint import tools
    from opendeep_jax.checkpoint.files import CorruptCheckpoint

    first = tools.checkpoint_path(values.workdir, _step(values.a))
    second = tools.checkpoint_path(values.other or values.workdir, _step(values.b))
    if first == second:
        raise ConfigError("--a and --b name one checkpoint. Give two steps, or another run with --other=DIRECTORY.")
    try:
        with progress_bar("compare", tools.array_bytes(first), transient=True) as seen:
            found = tools.differences(first, second, seen)
    except CorruptCheckpoint as error:
        raise ConfigError(
            f"{first} and {second} cannot be compared: {error}. `opendeep checkpoints verify` says which is damaged."
        ) from error
    if not found:
        print(f"bitwise equal: all {len(tools.read_record(first)['arrays'])} arrays")
        return
    rows = [
        (
            one.name,
            one.note or f"{one.elements:,}",
            *("" if one.note else f"{x:.3g}" for x in (one.absolute, one.relative)),
        )
        for one in found
    ]
    print(text_table([("array", "elements that differ", "max abs", "max rel"), *rows], right=(1, 2, 3)))


def _prune(argv: Sequence[str]) -> None:
    values = _parse(
        "prune",
        "Deletes the checkpoints that a keep policy, by default the run's own, does not keep; never the newest.",
        argv,
        dry_run=True,
        keep=(-1, "Newest checkpoints that are kept, 0 for all; -1 as the run says."),
        keep_every=(-1, "Multiples of so many steps are kept, 0 for none; -1 as the run says."),
        keep_best=(-1, "So many with the fewest held-out bits per byte are kept, 0 for none; -1 as the run says."),
    )
    from opendeep_jax.checkpoint import tools
    from opendeep_jax.record.workdir import only_writer

    given = {name: number for name in ("keep", "keep_every", "keep_best") if (number := getattr(values, name)) != -1}
    for name, number in given.items():
        if number < 0:
            raise ConfigError(f"--{name}={number}: must be at least 0, or -1 for what the run says.")
    config = dataclasses.replace(load_run_config(values.workdir).checkpoint, **given)
    with only_writer(values.workdir):
        steps = tools.prunable(values.workdir, config)
        if steps and not values.dry_run:
            newest = tools.checkpoint_path(values.workdir)
            with progress_bar(f"verify {newest.name}", tools.array_bytes(newest), transient=True) as seen:
                tools.prune(values.workdir, config, seen)
    verb = "would delete" if values.dry_run else "deleted"
    print(
        f"{verb} the checkpoints of steps {', '.join(f'{step:,}' for step in steps)}" if steps else "nothing to delete"
    )


def _average(argv: Sequence[str]) -> None:
    values = _parse(
        "average",
        "Averages the weights of several checkpoints into a new work directory, for `opendeep eval` and `generate`.",
        argv,
        steps=("", "Steps to average, as in 800,900,1000."),
        out=("", "The work directory to make."),
    )
    try:
        steps = [int(word) for word in values.steps.split(",")]
    except ValueError:
        raise ConfigError(f"--steps={values.steps}: must be steps with commas between, as in 800,900,1000.") from None
    if not values.out:
        raise ConfigError("--out is missing: give a new directory, such as --out=runs/averaged.")
    from opendeep_jax.checkpoint.tools import array_bytes, average, checkpoint_path

    paths = [checkpoint_path(values.workdir, step) for step in steps]
    with progress_bar("average", sum(map(array_bytes, paths)), transient=True) as seen:
        average(values.workdir, steps, values.out, seen)
    print(f"averaged {len(steps)} checkpoints into {values.out}; measure it with opendeep eval --workdir={values.out}")


def _step(step: int) -> int | None:
    if step < -1:
        raise ConfigError(f"{step}: a step must be at least 0, or -1 for the default.")
    return None if step < 0 else step
