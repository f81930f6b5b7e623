"""`opendeep describe --config=RECIPE|--workdir=RUN ...`: what a run is and takes, without starting it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from opendeep_jax.cli.flags import make_flags, parse_own
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config
from opendeep_jax.config.schema import RunConfig

HELP = """\
Says what a run is and takes, in seconds and without starting it: parameters by part, memory, work, schedule, text.

usage: opendeep describe --config=RECIPE [--devices=N] [--json] [--name=value ...]
       opendeep describe --workdir=RUN [--devices=N] [--json]

  --config   Recipe, or the path of one.
  --workdir  Instead: the directory of a run, begun or imported.
  --devices  Devices that the run is divided over; as many as the fixed axes of its mesh have if not given.
  --json     Print it as JSON.

Every setting of the run can be given by its name, as to `opendeep train`: --model.num_layers=4. Nothing is prepared,
compiled or trained. `opendeep plan` compiles the step for a cluster, which is exact, and says how long it takes.
"""


def main(argv: Sequence[str]) -> None:
    """Print the description. Raises ConfigError for input that cannot work."""
    values = make_flags(config=("", ""), workdir=("", ""), devices=(0, ""), json=(False, ""))
    rest = parse_own(values, argv, "opendeep describe", HELP)
    if values.devices < 0 or (values["devices"].present and not values.devices):
        raise ConfigError(f"--devices={values.devices}: must be at least 1.")
    config = _config(values, rest)

    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed, and no accelerator is to be taken from a run
    from opendeep_jax.plan.describe import describe, description_table
    from opendeep_jax.record.files import DATA, read_object

    begun = values.workdir if not values.config else ""  # a recipe's own text need not be that of a run
    described = describe(config, values.devices, read_object(Path(begun, DATA)) if begun else None)
    print(json.dumps(described, indent=2) if values.json else description_table(described))


def _config(values: flags.FlagValues, rest: list[str]) -> RunConfig:
    from opendeep_jax.config.overrides import apply, resolve  # tyro takes a while

    if values.config or not values.workdir:
        own = [f"--{name}={values[name].value}" for name in ("config", "workdir") if values[name].value]
        return resolve([*own, *rest], "opendeep describe")[0]
    if not Path(values.workdir).is_dir():
        raise ConfigError(
            f"--workdir={values.workdir}: there is no such directory. Give a run's, such as --workdir=runs/quickstart, "
            "or a recipe, as in --config=quickstart."
        )
    return apply(load_run_config(values.workdir), rest)
