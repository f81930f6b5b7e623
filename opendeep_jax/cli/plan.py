"""`opendeep plan --config=RECIPE --topology=NAME ...`: what a run would take on chips that are not here."""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from opendeep_jax.cli.flags import make_flags, parse_own
from opendeep_jax.config.checks import ConfigError, check_run, deferred
from opendeep_jax.config.files import write_atomically
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.plan.batch import largest_stage, with_batch

HELP = """\
Compiles a run's training step for a cluster, without one, and says what it would take: memory, time, cost.

usage: opendeep plan --config=RECIPE --topology=NAME [--name=value ...]

  --topology       The cluster: v5p:8x8x8, v5e:16x16, 2*v6e:16x16 (two slices), v7x:4x4x4, h100:256x8 (nodes x GPUs).
  --slices         TPU slices of that shape, joined by the data-centre network.
  --rows_per_chip  Rows of a batch for each chip, in one piece; the recipe's own batch if not given.
  --tokens_per_chip  The same in tokens, whole rows.
  --price          Dollars for a chip-hour; without it an assumption, which the table shows.
  --json           File for the plan as JSON.
  --dump_hlo       File for the optimized HLO of the step.
  --report         File for a page with bars for memory and time.
  --search         Try other layouts, the promising ones compiled, and rank them.
  --compile_best   How many layouts --search compiles (default: 3).
  --save           With --search, file for the best layout's settings.

Every setting of the run can be given by its name, as to `opendeep train`: --parallel.expert=8 --model.remat.moe=full.
Nothing is measured: times are bounds from data sheets.
"""


def main(argv: Sequence[str]) -> None:
    """Print the plan that `argv` asks for and write its files.

    Raises ConfigError for input that cannot work, and, after the files are written, for a run that does not fit.
    """
    values = make_flags(
        topology=("", ""),
        slices=(0, ""),
        rows_per_chip=(0, ""),
        tokens_per_chip=(0, ""),
        price=(0.0, ""),
        json=("", ""),
        dump_hlo=("", ""),
        report=("", ""),
        search=(False, ""),
        compile_best=(3, ""),
        save=("", ""),
    )
    rest = parse_own(values, argv, "opendeep plan", HELP)
    if not values.topology:
        raise ConfigError("--topology is missing: say for which cluster, as in --topology=v5p:8x8x8.")
    _check_numbers(values)

    from opendeep_jax.plan.topology import check_compiler, parse_topology

    topology = parse_topology(values.topology, values.slices)

    from opendeep_jax.config.overrides import resolve  # tyro takes a while

    with deferred():  # the recipe's own batch need not divide over these chips where another one is asked for
        config, launch = resolve(rest, "opendeep plan")
        planned = _with_rows(config, values, topology.chips)
    check_run(planned)
    check_compiler(topology)

    from opendeep_jax.plan.compile import prepare_process

    prepare_process()  # before anything imports JAX

    from opendeep_jax.config.schedule import tokens_before, total_steps
    from opendeep_jax.plan.estimate import make_plan
    from opendeep_jax.plan.search import flag_file, search
    from opendeep_jax.plan.table import plan_table

    total_tokens, found = tokens_before(config, total_steps(config)), []
    print(
        f"compiling {planned.name} for {topology.chips:,} {topology.chip.name}; a large model takes minutes", flush=True
    )
    if values.search:
        found = search(planned, topology, values.compile_best, values.price, total_tokens)
    plan = next((one.plan for one in found if one.plan), None) or make_plan(
        planned, topology, values.price, total_tokens
    )
    print(plan_table(plan))
    if values.json:
        write_atomically(values.json, json.dumps(plan.to_json(), indent=2) + "\n")
    if values.dump_hlo and plan.text:
        write_atomically(values.dump_hlo, plan.text)
    if values.report:
        from opendeep_jax.plan.report import plan_page

        write_atomically(values.report, plan_page(plan, found, planned))
    if values.save and plan.fits:
        best = next(one for one in found if one.plan is plan)
        write_atomically(values.save, flag_file(best.candidate, launch.recipe, launch.config_name, topology))
        print(f"\nopendeep train --config={launch.config} --flagfile={values.save}")
    if not plan.fits:
        raise ConfigError(plan.why_not())


def _check_numbers(values: flags.FlagValues) -> None:
    for name in ("slices", "rows_per_chip", "tokens_per_chip", "price"):
        if not 0 <= values[name].value < float("inf"):
            raise ConfigError(f"--{name}={values[name].value}: must be above 0.")
    if values.compile_best < 1:
        raise ConfigError(f"--compile_best={values.compile_best}: must be at least 1.")
    if values.rows_per_chip and values.tokens_per_chip:
        raise ConfigError("--rows_per_chip and --tokens_per_chip both set the batch. Give one of them.")
    if values.save and not values.search:
        raise ConfigError(f"--save={values.save}: saves what --search finds. Give --search too.")
    for name in ("json", "dump_hlo", "report", "save"):  # a plan takes minutes: know before that it can be kept
        path = Path(values[name].value)
        if values[name].value and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"--{name}={path}: cannot be written. Give a file in a directory that exists.")


def _with_rows(config: RunConfig, values: flags.FlagValues, chips: int) -> RunConfig:
    """Return the configuration with the batch that the flags ask for."""
    length = largest_stage(config).length
    rows = values.rows_per_chip
    if values.tokens_per_chip:
        if values.tokens_per_chip % length:
            raise ConfigError(
                f"--tokens_per_chip={values.tokens_per_chip}: must be a multiple of the {length} tokens of a row. "
                f"Use {max(1, round(values.tokens_per_chip / length)) * length}."
            )
        rows = values.tokens_per_chip // length
    return with_batch(config, rows * chips) if rows else config
