"""`opendeep eval --workdir=DIRECTORY --step=STEP`"""

import json
from collections.abc import Sequence

from opendeep_jax.cli.flags import parse, run_flags
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config


def main(argv: Sequence[str]) -> None:
    """Prints the held-out measures of one of a run's checkpoints as a JSON object."""
    flags = run_flags(step=(-1, "Step of the checkpoint; -1 takes the newest."))
    values = parse(flags, argv, "opendeep eval", "Measures a run's held-out bits per byte.")
    if values.step < -1:
        raise ConfigError(f"--step={values.step}: must be at least -1.")
    load_run_config(values.workdir)  # refuses a directory without a run before JAX is loaded

    from opendeep_jax.train.evaluate import evaluate_workdir

    print(json.dumps(evaluate_workdir(values.workdir, step=None if values.step < 0 else values.step), indent=2))
