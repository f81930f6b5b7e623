"""Files that `opendeep launch` writes, and stand-ins for the programs that read them, for its tests."""

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from opendeep_jax.cli.launch import main
from opendeep_jax.jobs.launch.render import TARGETS

RUN = ["--config=quickstart", "--workdir=/shared/runs/a", "--data.directory=/shared/data", "--train.batch_size=512"]
NEEDS = {
    "slurm": ["--topology=h100:2x8", "--image=images.example/opendeep:1"],
    "gke-tpu": ["--topology=v5p:2x4x4", "--image=images.example/opendeep:1", "--volume=shared"],
    "gke-gpu": ["--topology=h200:4x8", "--image=images.example/opendeep:1", "--volume=shared"],
    "tpu-vm": [
        "--topology=v6e:4x4",
        "--image=images.example/opendeep:1",
        "--project=p1",
        "--zone=us-east5-b",
        "--nfs=10.0.0.2:/share",
    ],
    "skypilot": ["--topology=h100:2x8", "--image=images.example/opendeep:1", "--volume=shared"],
}
MORE = {
    "slurm": ["--time=7-00:00:00", "--account=lab", "--partition=gpu"],
    "gke-tpu": ["--topology=2*v6e:16x16", "--queue=team", "--namespace=research", "--spot=true"],
    "gke-gpu": ["--topology=b200:1x8", "--queue=team", "--spot=true", "--namespace=2024"],
    "tpu-vm": ["--topology=2*v5p:2x2x2", "--spot=true"],
    "skypilot": ["--topology=b200:1x8", "--spot=true"],
}
BOTH = [(target, more) for target in TARGETS for more in ([], MORE[target])]
HOSTILE = """it's "$(touch gone)" `touch gone` $HOME \\ {{name}} é"""


def rendered(target: str, *more: str) -> str:
    """What `--dry_run` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([f"--target={target}", "--dry_run", *NEEDS[target], *RUN, *more]) == 0
    return out.getvalue()


def read_yaml(text: str):
    return pytest.importorskip("yaml").safe_load(text)


def programs(directory: Path, **bodies: str) -> dict[str, str]:
    """An environment in which commands of these names are these bash scripts; each logs its arguments to NAME.log."""
    directory.mkdir(exist_ok=True)
    for name, body in bodies.items():
        path = directory / name
        log = shlex.quote(str(directory / f"{name}.log"))
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>{log}\n{body}\n')
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}


def bash(text: str, environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what is ignored here, as under nohup, bash could not trap
    try:
        command = "bash", "-c", text
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
    finally:
        signal.signal(signal.SIGHUP, before)


def container(jobset: dict) -> dict:
    (job,) = jobset["spec"]["replicatedJobs"]
    (only,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return only


def startup_script(text: str, directory: Path) -> str:
    """The part that each machine executes, its status file put into `directory`."""
    (script,) = re.findall(r"<<'END_OF_STARTUP'\n(.*?)^END_OF_STARTUP$", text, flags=re.DOTALL | re.MULTILINE)
    return script.replace("/var/tmp/opendeep.status", str(directory / "status"))
