"""Executors of the stages: processes of this machine, or datatrove's executors for Slurm and Ray.

A stage is a number of ranks that know nothing of each other; the stages follow each other. Whatever is done already is
not done again. On Slurm and Ray data.directory must be on a disk that all machines share.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.storage import write_file
from opendeep_jax.data.curation.accounting import load_accounting
from opendeep_jax.data.curation.plan import CurationPlan
from opendeep_jax.data.curation.recipe import quiet_datatrove
from opendeep_jax.data.curation.stages import run_rank
from opendeep_jax.data.storing.workers import available_cores, run_jobs
from opendeep_jax.display.progress import progress_bar

Executor = Literal["local", "slurm", "ray"]

TITLES = {
    "filter": "Filtering",
    "duplicates": "Deciding on duplicates",
    "finish": "Writing what is left",
    "account": "Adding up",
}
POLL_SECONDS = 10.0
"""Interval between polls of Slurm."""
SLURM_DEFAULTS: dict[str, Any] = {"time": "24:00:00", "mem_per_cpu_gb": 4, "qos": "", "job_name": "opendeep_curate"}
RAY_DEFAULTS: dict[str, Any] = {"mem_per_cpu_gb": 4}


def parse_options(text: str) -> dict[str, str]:
    """Return an executor's options as a command line gives them: `partition=cpu,time=8:00:00`. Raises ConfigError."""
    options = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not (name and equals):
            raise ConfigError(f"{item!r} among the executor's options must be written as name=value.")
        options[name] = value
    return options


def check_executor(executor: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for an executor that does not exist or cannot run here, and for options it does not know."""
    if executor not in ("local", "slurm", "ray"):
        raise ConfigError(f"The executor is {executor!r}, but it must be local, slurm or ray.")
    if executor == "local":
        if options:
            raise ConfigError(f"The local executor has no options, such as {next(iter(options))!r}; see data.workers.")
        return
    known = _options_of(executor)
    for name in options:
        if name not in known:
            raise ConfigError(f"The {executor} executor has no option {name!r}. It has {', '.join(sorted(known))}.")
    if executor == "slurm":
        if not shutil.which("sbatch"):
            raise ConfigError("There is no `sbatch` here: submit to Slurm from a machine that can reach it.")
        if "partition" not in options:
            raise ConfigError("Slurm needs to know a partition: give partition=NAME among the executor's options.")


def _options_of(executor: str) -> set[str]:
    import inspect

    from datatrove.executor import SlurmPipelineExecutor
    from datatrove.executor.ray import RayPipelineExecutor

    kind = SlurmPipelineExecutor if executor == "slurm" else RayPipelineExecutor
    ours = {"self", "pipeline", "tasks", "depends", "depends_job_id", "logging_dir", "skip_completed"}
    return set(inspect.signature(kind.__init__).parameters) - ours


def run_stages(
    plan: CurationPlan, executor: Executor, options: Mapping[str, Any], workers: int, progress: bool
) -> None:
    """Run every stage of a plan to its end. Raises ConfigError for what the user can correct."""
    run = {"local": _run_local, "slurm": _run_slurm, "ray": _run_ray}[executor]
    run(plan, {name: _number(value) for name, value in options.items()}, workers, progress)


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _left(plan: CurationPlan, stage: str, ranks: int) -> list[int]:
    return [rank for rank in range(ranks) if not plan.mark(stage, rank).exists()]


def _run_local(plan: CurationPlan, options: dict, workers: int, progress: bool) -> None:
    workers = workers or available_cores()
    for stage, ranks in plan.stages():
        left = _left(plan, stage, ranks)
        sizes = [plan.tasks[rank].size for rank in left] if stage in ("filter", "finish") else []
        with progress_bar(TITLES[stage], sum(sizes), progress and bool(left)) as advance:
            run_jobs(run_rank, (str(plan.directory), stage), [(rank,) for rank in left], workers, advance)


def _step(directory: str, stage: str, data: Any, rank: int, world_size: int) -> None:
    """Run a rank of a stage as a step of a datatrove pipeline."""
    run_rank(directory, stage, rank, lambda size: None)


def _pipeline(plan: CurationPlan, stage: str) -> list[Callable]:
    return [functools.partial(_step, str(plan.directory.absolute()), stage)]


def _logs(plan: CurationPlan, stage: str) -> str:
    return str((plan.directory / "logs" / stage).absolute())


def _run_ray(plan: CurationPlan, options: dict, workers: int, progress: bool) -> None:
    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    quiet_datatrove()
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    for stage, ranks in plan.stages():
        left = _left(plan, stage, ranks)
        if not left:
            continue
        with progress_bar(TITLES[stage], 0, progress):
            settings = RAY_DEFAULTS | {"workers": workers or -1} | options
            # Its own notes of what is done would outlive a result that was deleted: ours decide.
            RayPipelineExecutor(
                _pipeline(plan, stage), ranks, logging_dir=_logs(plan, stage), skip_completed=False, **settings
            ).run()
        if _left(plan, stage, ranks) and not load_accounting(plan.directory):
            raise _failed("Ray", plan, stage)


def _failed(executor: str, plan: CurationPlan, stage: str) -> ConfigError:
    return ConfigError(
        f"{executor} could not finish the stage `{stage}` of the curation in {plan.directory}. What went wrong is in "
        f"{_logs(plan, stage)}. What is finished is kept: correct it and run the same command again."
    )


def _run_slurm(plan: CurationPlan, options: dict, workers: int, progress: bool) -> None:
    """Submit all stages, each after the one before it, and wait; after an interruption, the same call waits again."""
    note = plan.work("slurm.json")
    jobs = json.loads(note.read_text("utf-8")) if note.exists() else {}
    if not any(state for state, _ in _queue(jobs).values()):
        jobs = _submit(plan, options, workers)
        write_file(note, json.dumps(jobs))
    with progress_bar(f"Waiting for Slurm jobs {', '.join(jobs.values())}", 0, progress):
        while not load_accounting(plan.directory):
            queue = _queue(jobs)
            broken = any(reason == "DependencyNeverSatisfied" for _, reason in queue.values())
            if (broken or not queue) and not load_accounting(plan.directory):
                stage = next(stage for stage, ranks in plan.stages() if _left(plan, stage, ranks))
                raise _failed("Slurm", plan, stage)
            time.sleep(POLL_SECONDS)


def _submit(plan: CurationPlan, options: dict, workers: int) -> dict[str, str]:
    """Submit the stages that are not done; return their job ids by stage."""
    from datatrove.executor import SlurmPipelineExecutor

    quiet_datatrove()
    binaries = Path(sys.executable).parent
    here = {"env_command": f'export PATH="{binaries}:$PATH" PYTHONPATH="{os.pathsep.join(filter(None, sys.path))}"'}
    jobs: dict[str, str] = {}
    for stage, ranks in plan.stages():
        if not _left(plan, stage, ranks):
            continue
        settings = SLURM_DEFAULTS | {"workers": workers or -1} | here | options
        job = SlurmPipelineExecutor(
            _pipeline(plan, stage),
            ranks,
            logging_dir=_logs(plan, stage),
            skip_completed=False,
            depends_job_id=next(reversed(jobs.values()), None),
            **settings,
        )
        job.job_name = f"{settings['job_name']}_{stage}"
        try:
            job.run()
        except (OSError, subprocess.CalledProcessError) as error:
            raise ConfigError(
                f"sbatch refused the stage `{stage}` of the curation: {error}. Its message is above; correct the "
                f"executor's options ({', '.join(f'{name}={value}' for name, value in options.items())})."
            ) from error
        jobs[stage] = job.job_id
    return jobs


def _queue(jobs: dict[str, str]) -> dict[str, tuple[str, str]]:
    """(state, reason) of each of the jobs that Slurm still has, by id."""
    if not jobs:
        return {}
    command = ["squeue", "--noheader", "--jobs", ",".join(jobs.values()), "--format", "%A %T %r"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    except OSError as error:
        raise ConfigError(f"Cannot ask Slurm for its queue: {error}. Is `squeue` on the PATH?") from error
    return {id: (state, reason) for id, state, reason in (line.split(maxsplit=2) for line in lines if line.strip())}
