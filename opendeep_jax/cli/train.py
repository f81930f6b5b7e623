"""`opendeep train --config=RECIPE --workdir=DIRECTORY --dotted.name=value ...`, or `--from=RUN@STEP --workdir=NEW`"""

import os
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from opendeep_jax.cli.process import process_start, set_verbosity
from opendeep_jax.cli.starts import counted_start
from opendeep_jax.config.checks import check_devices
from opendeep_jax.config.exits import BUG
from opendeep_jax.config.overrides import Launch, resolve
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.parallel.cluster import Cluster, find_cluster
from opendeep_jax.record.trackers import check_trackers
from opendeep_jax.record.workdir import check_workdir


def main(argv: Sequence[str]) -> None:
    """Train the run that `argv` describes, or resume it, alone or as one process of a job.

    Raises ConfigError for input that cannot work, and what `train.loop.train` raises.
    """
    config, launch = resolve(argv, trains=True)
    cluster = find_cluster(os.environ, launch.coordinator_address, launch.num_processes, launch.process_id)
    # Of a TPU pod JAX finds the place later; a pod of GKE has the name of its node, which may change.
    host = "-".join(os.environ.get(name, "0") for name in ("MEGASCALE_SLICE_ID", "TPU_WORKER_ID"))
    process = (
        (host if "TPU_WORKER_ID" in os.environ else socket.gethostname())
        if cluster is None
        else str(cluster.process_id)
    )
    try:
        with counted_start(launch.workdir, process, os.environ, _is_bug):
            _train(config, launch, cluster)
    except BaseException as error:
        job = sys.modules.get("opendeep_jax.parallel.distributed")
        if job is not None and job.in_job():
            _leave(error)
        raise


def _train(config: RunConfig, launch: Launch, cluster: Cluster | None) -> None:
    check_trackers(config)
    if cluster is None:
        check_start(config, launch)

    # Only now, behind everything that can be refused without it: loading JAX takes about a second.
    import jax

    from opendeep_jax.parallel.distributed import primary_first, start

    set_verbosity(launch.verbosity)
    start(cluster, config.faults.join_seconds)
    if cluster is not None:
        primary_first("workdir", lambda: check_start(config, launch))
    primary_first("devices", lambda: check_devices(config, jax.device_count()))

    from opendeep_jax.train.loop import train

    if launch.parent:
        from opendeep_jax.train.branch import begin_branch

        begin_branch(config, launch.recipe, launch.workdir, launch.parent)
    train(config, launch.workdir, recipe=launch.recipe, begun=process_start())


def _is_bug(error: BaseException) -> bool:
    from opendeep_jax.cli.main import explanation

    return explanation("train", error)[0] is None and isinstance(error, Exception)


def check_start(config: RunConfig, launch: Launch) -> None:
    """Raise ConfigError unless the run can start, resume, or branch from another run in its work directory."""
    if launch.parent:
        from opendeep_jax.train.branch import check_branch

        check_branch(config, launch.workdir, launch.parent)
    else:
        check_workdir(config, launch.workdir)


def _leave(error: BaseException) -> NoReturn:
    """End this process of a job without the handlers at exit, which would wait for peers that may be gone."""
    from opendeep_jax.cli.main import explanation, report_error
    from opendeep_jax.parallel.distributed import leave_together

    status = report_error("train", error)
    if status is None:
        traceback.print_exception(error)
        status = BUG
    sys.stdout.flush()
    sys.stderr.flush()
    leave_together(status, explanation("train", error)[1] or repr(error))
    os._exit(status)
