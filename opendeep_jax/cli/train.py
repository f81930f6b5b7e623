"""`opendeep train --config=RECIPE --workdir=DIRECTORY --dotted.name=value ...`"""

from collections.abc import Sequence

from opendeep_jax.cli.process import process_start, set_verbosity
from opendeep_jax.config.checks import check_devices
from opendeep_jax.config.load import check_workdir
from opendeep_jax.config.overrides import resolve


def main(argv: Sequence[str]) -> None:
    """Trains the run that `argv` describes, or resumes it. Raises ConfigError for input that cannot work."""
    config, launch = resolve(argv)
    check_workdir(config, launch.workdir)

    # Only now, behind everything that can be refused without it: loading JAX takes about a second.
    import jax

    set_verbosity(launch.verbosity)
    check_devices(config, jax.device_count())

    from opendeep_jax.train.loop import train

    train(config, launch.workdir, launch.recipe, process_start())
