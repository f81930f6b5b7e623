"""`opendeep report --workdir=DIRECTORY`"""

from collections.abc import Sequence

from opendeep_jax.cli.flags import parse, run_flags
from opendeep_jax.config.load import load_run_config


def main(argv: Sequence[str]) -> None:
    """Write report.html and its picture from a run's metrics again, also while the run goes on."""
    values = parse(run_flags(), argv, "opendeep report", "Writes a run's report again from its metrics.")
    load_run_config(values.workdir)

    from opendeep_jax.record.report import write_report

    print(write_report(values.workdir))
