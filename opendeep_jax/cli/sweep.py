"""`opendeep sweep --config=RECIPE --sweep.NAME=VALUES ...`: many variants of a recipe, trained and compared."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from opendeep_jax.cli.flags import make_flags, parse_own
from opendeep_jax.config.checks import ConfigError

HELP = """\
Trains every combination of some settings' values, and compares them: one table, pictures, the best as a recipe.

usage: opendeep sweep --config=RECIPE --sweep.NAME=VALUES [--sweep.NAME=VALUES ...] [--name=value ...]
       opendeep sweep --workdir=DIRECTORY --collect

  --sweep.NAME=a,b,c        Values of a setting; a tuple's elements are divided by spaces.
  --sweep.NAME=low:high     A range, for random and optuna; low:high:log for one over powers of ten.
  --method=grid             grid (all combinations), zip (first with first, ...), random or optuna.
  --trials=12               Combinations that random and optuna try.
  --seeds=1                 Runs of each combination, with different seeds.
  --parallel=1              Runs at once; they share the cores (and NVIDIA GPUs) of this machine evenly.
  --target=local            Where the runs go: here, or a target of `opendeep launch`, such as slurm.
  --metric=NAME             held_out_bits_per_byte (unless no text is held out), final_loss or seconds; less is better.
  --draw_seed=0             Seed of what --method=random draws.
  --workdir=DIRECTORY       Where the sweep is; runs/sweeps/RECIPE if not given.
  --from=RUN@STEP           Begin every run as a branch of this checkpoint, as `opendeep train --from` does; with the
                            configuration of RUN where no --config is given.
  --collect                 Start nothing; write table, pictures and best.py from what is there.

Every other setting of the run can be given by its name, as to `opendeep train`, and counts for all runs:

  opendeep sweep --config=quickstart --sweep.optimizer.learning_rate=5e-3,1e-2 --sweep.model.moe.experts_per_token=2,4

The same command goes on after whatever ended it; runs with a result are not run again.
"""


def main(argv: Sequence[str]) -> int:
    """Run a sweep; return the exit status. Raises ConfigError for invalid input, before anything is written."""
    values = make_flags(
        trials=(0, ""),
        seeds=(1, ""),
        parallel=(1, ""),
        target=("local", ""),
        metric=("", ""),
        draw_seed=(0, ""),
        collect=(False, ""),
    )
    for name in ("config", "workdir", "from"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    flags.DEFINE_enum("method", "grid", ["grid", "zip", "random", "optuna"], "", flag_values=values)
    settings, rest = _take_settings(parse_own(values, argv, "opendeep sweep", HELP))

    from opendeep_jax.config.overrides import refuse_empty, resolve  # tyro takes a while
    from opendeep_jax.jobs.sweep.plan import one_checkpoint, plan_sweep, read_sweep
    from opendeep_jax.jobs.sweep.run import report, run_sweep

    if values.collect:
        if not values.workdir:
            raise ConfigError("--workdir is missing: say which sweep to collect, as in --workdir=runs/sweeps/NAME.")
        sweep, runs = read_sweep(values.workdir, values.metric)
        report(sweep, runs)
        return 0
    for name in ("config", "workdir", "from"):
        refuse_empty(name, values[name].value)
    parent = values["from"].value or ""
    if parent and not values.workdir:
        raise ConfigError(f"--from={parent}: --workdir is missing: say where the sweep of its branches is to be.")
    if parent:
        parent = one_checkpoint(parent, values.workdir)
        rest = [f"--from={parent}", f"--workdir={values.workdir}", *rest]
    recipe = [f"--config={values.config}"] if values.config else []
    base, launch = resolve([*recipe, *rest], "opendeep sweep", trains=bool(parent))
    directory = values.workdir or f"runs/sweeps/{launch.config_name}"
    options = {name: values[name].value for name in ("method", "trials", "seeds", "metric", "draw_seed")}
    sweep = plan_sweep(Path(directory), base, settings, **options, parent=parent)
    return run_sweep(sweep, values.parallel, values.target)


def _take_settings(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the fields to sweep with their values as text, and the other arguments."""
    settings: dict[str, str] = {}
    rest = []
    for argument in argv:
        name, equals, text = argument.partition("=")
        if not name.startswith("--sweep."):
            rest.append(argument)
            continue
        field = name.removeprefix("--sweep.").replace("-", "_")
        if not equals:
            raise ConfigError(f"{argument}: values are written behind an equals sign, as in {name}=1,2.")
        if field in settings:
            raise ConfigError(f"{name} is given twice. Write all its values into one list.")
        settings[field] = text
    return settings, rest
