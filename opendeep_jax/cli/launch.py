"""`opendeep launch --target=TARGET --config=RECIPE ...`: a run on several processes here, or as a cluster's job."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from opendeep_jax.cli.flags import make_flags, parse_own
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import CONFIG_FILE
from opendeep_jax.config.schema import RunConfig

if TYPE_CHECKING:
    from opendeep_jax.config.overrides import Launch

HELP = """\
Starts a run on several processes of this machine, or as a job of a cluster.

usage: opendeep launch --target=TARGET --config=RECIPE --workdir=DIRECTORY [--name=value ...]
       opendeep launch --target=TARGET --from=RUN[@STEP] --workdir=NEW [--name=value ...]

  --target       local: this machine. slurm: sbatch. gke-tpu, gke-gpu: a JobSet for Kubernetes. tpu-vm: a queued
                 resource of Cloud TPU. skypilot: a managed job of SkyPilot. (default: local)
  --dry_run      Print the file, and start nothing.
  --restarts     Times that the job is started again after status 75 or a crash. (default: 100)

local:
  --processes    Processes; GPUs or cores are divided among them. (default: 1)
  --min_processes  Go on without a process that was killed, and its devices, as long as so many are left. 0 starts all
                 again. (default: 0)

clusters:
  --topology     The cluster, as `opendeep plan` takes it: v5p:4x4x4, 2*v6e:16x16, h100:4x8 (nodes x GPUs), gb200:18x4.
  --image        Container image with opendeep installed.
  --shared       Directory of the file system that all machines share; --workdir and --data.directory are in it.
                 (default: /shared)
  --job_name     Name of the job; the work directory's if not given.
  --grace_seconds  From being told to stop to being killed: a step and a save. (default: 300)
  --env          NAME=value of a variable of the run's environment, or NAME where its value is to be in no file;
                 may be given several times, or several after one.
  --secret       gke: a Secret of Kubernetes, whose keys become variables. tpu-vm: a file under --shared with lines
                 NAME=value. (slurm and skypilot take the values of --env=NAME from where the job is submitted)
  --volume       gke, skypilot: the claim or volume that holds the shared file system.
  --namespace    gke: namespace. (default: default)
  --queue        gke: Kueue's LocalQueue; none if not given.
  --spot         gke, tpu-vm, skypilot: true for machines that may be taken away, at a lower price.
  --time         slurm: time limit, such as 7-00:00:00. (default: 24:00:00)
  --account      slurm: account.
  --partition    slurm: partition.
  --qos          slurm: quality of service.
  --reservation  slurm: reservation.
  --sbatch       slurm: any other option of sbatch, as name=value; may be given several times, or several after one.
  --project      tpu-vm: Google Cloud project.
  --zone         tpu-vm: its zone.
  --nfs          tpu-vm: what is mounted at --shared, as host:/export.

What stays the same for a cluster can be kept in a variable: OPENDEEP_LAUNCH='--topology=h100:4x8 --image=...'.
Every setting of the run is given by its name, as to `opendeep train`: --parallel.expert=8.
"""
MOST_RESTARTS = 1_000_000
"""Every engine, and the shell, can count so far."""
SETTINGS = (
    *("image", "shared", "job_name", "grace_seconds", "volume", "namespace", "queue", "spot"),
    *("time", "account", "partition", "qos", "reservation", "project", "zone", "nfs", "secret"),
)
LISTS = ("env", "sbatch")
"""Settings that take several values."""


def main(argv: Sequence[str]) -> int:
    """Start the job that `argv` describes, or print its file. Raises ConfigError for invalid settings."""
    kept = os.environ.get("OPENDEEP_LAUNCH", "")
    try:
        argv = [*shlex.split(kept), *argv]
    except ValueError as error:
        raise ConfigError(
            f"OPENDEEP_LAUNCH={kept}: cannot be read as a shell would ({error}). Mend it there."
        ) from error
    argv, lists = _take_lists(argv)
    values = make_flags(
        target=("local", ""),
        restarts=(100, ""),
        processes=(0, ""),
        min_processes=(0, ""),
        topology=("", ""),
        dry_run=(False, ""),
        **{name: ("", "") for name in SETTINGS},
    )
    rest = parse_own(values, argv, "opendeep launch", HELP)

    from opendeep_jax.jobs.launch.render import LaunchJob, check_engine, check_target, render, submit

    check_target(values.target)
    if not 0 <= values.restarts <= MOST_RESTARTS:
        raise ConfigError(f"--restarts={values.restarts}: must be from 0 to {MOST_RESTARTS}.")

    from opendeep_jax.config.overrides import resolve  # tyro takes a while

    config, launch = resolve(rest, "opendeep launch", trains=True)
    settings = tuple((name, values[name].value) for name in SETTINGS if values[name].value)
    if values.target == "local":
        given = [(name, entry) for name in LISTS for entry in lists[name]]
        return _local(values, config, launch, rest, (*settings, *given))
    if values.processes:
        raise ConfigError(
            f"--processes={values.processes}: is for --target=local; a cluster's processes follow from --topology."
        )
    if launch.parent and not Path(launch.workdir, CONFIG_FILE).exists():  # else it is a branch already
        from opendeep_jax.train.branch_parent import check_tokenizer, open_parent  # JAX takes a while

        check_tokenizer(config, open_parent(config, launch.parent))
    job = LaunchJob(
        values.target,
        config,
        ("opendeep", "train", *rest),
        launch.workdir,
        values.topology,
        values.restarts,
        settings,
        tuple(lists["env"]),
        tuple(lists["sbatch"]),
    )
    text = render(job)
    if values.dry_run:
        print(text, end="")
        return 0
    check_engine(values.target)
    return submit(job, text)


def _take_lists(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """`argv` without the settings that take several values, and those: `--env=A --env B C=1` gives A, B and C=1."""
    rest: list[str] = []
    lists: dict[str, list[str]] = {name: [] for name in LISTS}
    taking = None
    for word in argv:
        flag, equals, value = word[2:].partition("=")
        if word.startswith("--") and flag in LISTS:
            lists[flag] += [value] if equals else []
            taking = None if equals and flag == "env" and "=" not in value else flag
        elif word.startswith("-") or taking is None:
            rest.append(word)
            taking = None
        else:
            lists[taking].append(word)
    return rest, lists


def _local(
    values: flags.FlagValues,
    config: RunConfig,
    launch: "Launch",
    rest: list[str],
    settings: tuple[tuple[str, str], ...],
) -> int:
    """`--target=local`: the processes here, or with --dry_run the script that would start them."""
    from opendeep_jax.cli.train import check_start
    from opendeep_jax.jobs.launch.local import run_local
    from opendeep_jax.jobs.launch.render import fill, job_name, template_directory

    if values.topology or settings:
        name = "topology" if values.topology else settings[0][0]
        raise ConfigError(f"--{name}: is for clusters, and --target=local has no use for it. Leave it out.")
    if values.processes < 0:
        raise ConfigError(f"--processes={values.processes}: must be at least 1.")
    processes = values.processes or 1
    if not 0 <= values.min_processes <= processes:
        raise ConfigError(
            f"--min_processes={values.min_processes}: must be from 0 to --processes, which is {processes}."
        )
    if values.dry_run:
        command = shlex.join(("opendeep", "train", *rest))
        names = {"name": job_name(launch.workdir), "processes": str(processes), "restarts": str(values.restarts)}
        text = (template_directory() / "local.sh").read_text(encoding="utf-8")
        print(fill(text, {**names, "command": command}), end="")
        return 0
    check_start(config, launch)  # said once, instead of by every process
    command = [sys.executable, "-m", "opendeep_jax", "train", *rest]
    return run_local(command, processes, values.restarts, config.faults.peer_seconds + 30, values.min_processes)
