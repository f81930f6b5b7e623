"""`opendeep watch --workdir=DIRECTORY [--workdir=…] [--every=2] [--once] [--html=FILE]`"""

import math
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from opendeep_jax.cli.flags import make_flags, parse
from opendeep_jax.config.checks import ConfigError

PURPOSE = """Shows runs while they go: curves, events, where the time went. q or Ctrl-C ends it, and touches no run.

--workdir is a run's directory, a sweep's, or a pattern in quotes; it may be given several times."""


def main(argv: Sequence[str]) -> None:
    """Show the runs until q or Ctrl-C. Raises ConfigError for a missing directory or invalid settings."""
    values = make_flags(
        every=(2.0, "Seconds between looks."),
        html=("", "Also write a page there that reloads itself, for a browser."),
    )
    flags.DEFINE_bool("once", False, "Show one frame and end; so it is without a terminal, too.", flag_values=values)
    flags.DEFINE_multi_string("workdir", None, "", flag_values=values)
    values["workdir"].help = "Directory of a run or a sweep, or a pattern."  # without absl's remark in two lines
    usage = "--workdir=DIRECTORY [--workdir=…] [--every=2] [--once] [--html=FILE]"
    parse(values, argv, "opendeep watch", PURPOSE, usage)
    if not (math.isfinite(values.every) and values.every >= 0.1):
        raise ConfigError(f"--every={values.every}: must be at least 0.1 seconds. The default is 2.")
    if values.html and (not Path(values.html).absolute().parent.is_dir() or Path(values.html).is_dir()):
        raise ConfigError(
            f"--html={values.html}: must be a file in a directory that exists. Make the directory, or give another "
            "path, such as --html=watch.html."
        )

    from opendeep_jax.jobs.watch.watch import watch

    watch(values.workdir, values.every, values.once, values.html)
