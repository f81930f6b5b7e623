"""Runs in processes of their own, one or several as a job, as `opendeep train` starts them."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

from small_models import small_run_config
from xla_flags import xla_flags

from opendeep_jax.config.load import to_json
from opendeep_jax.config.schema import EvaluationConfig, RunConfig

RECIPE = """
from pathlib import Path
from opendeep_jax.config.load import from_json

def get_config():
    return from_json(Path(__file__).with_suffix(".json").read_text())
"""


def tiny_config(corpus: Path, prepared: Path, **train) -> RunConfig:
    """As `small_run_config`, with less to compile: two layers, no multi-token prediction, no samples on the way."""
    config = small_run_config(corpus, prepared, **{"sample_every": 0, "log_every": 1} | train)
    model = dataclasses.replace(config.model, num_layers=2, mtp=dataclasses.replace(config.model.mtp, depth=0))
    return dataclasses.replace(config, model=model, evaluation=EvaluationConfig(final_batches=1))


def write_recipe(config: RunConfig, path: Path) -> Path:
    """A recipe file that gives `config`."""
    path.with_suffix(".json").write_text(to_json(config))
    path.write_text(RECIPE)
    return path


def start(recipe: Path, workdir: Path, *flags: str, processes: int = 1, devices: int = 1) -> list[subprocess.Popen]:
    """Starts `opendeep train` as a job of so many processes, each with so many devices."""
    arguments = [f"--config={recipe}", f"--workdir={workdir}", *flags]
    return start_command(["-m", "opendeep_jax.cli.main", "train", *arguments], processes, devices)


def start_command(arguments: list[str], processes: int, devices: int) -> list[subprocess.Popen]:
    """Starts Python with these arguments as a job of so many processes, each with so many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environ = os.environ | {"XLA_FLAGS": xla_flags(devices), "JAX_PLATFORMS": "cpu"}
    started = []
    for process in range(processes):
        if processes > 1:
            environ = environ | {
                "OPENDEEP_COORDINATOR_ADDRESS": address,
                "OPENDEEP_NUM_PROCESSES": str(processes),
                "OPENDEEP_PROCESS_ID": str(process),
            }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(
            subprocess.Popen([sys.executable, *arguments], env=environ, cwd=Path(__file__).parent.parent, **pipes)
        )
    return started


def launch(recipe: Path, workdir: Path, *flags: str) -> tuple[int, str]:
    """`opendeep launch` on this machine with one device for each process; its exit status and standard error."""
    command = [sys.executable, "-m", "opendeep_jax", "launch", f"--config={recipe}", f"--workdir={workdir}", *flags]
    environ = os.environ | {"XLA_FLAGS": xla_flags(devices=1), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, env=environ, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stderr


def finish(started: list[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str]]:
    """Waits for all; (exit status, what was written to standard error) of each. Kills those that don't end."""
    try:
        return [(process.wait(timeout), process.stderr.read()) for process in started]
    finally:
        for process in started:
            process.kill()
            process.stdout.close()
            process.stderr.close()


def run(recipe: Path, workdir: Path, *flags: str, processes: int = 1, devices: int = 1) -> list[tuple[int, str]]:
    """`start` and `finish`."""
    return finish(start(recipe, workdir, *flags, processes=processes, devices=devices))


def python(program: str, *arguments: str, processes: int, devices: int) -> list[str]:
    """Runs a program as a job; the standard output of each process. Fails where one does."""
    started = start_command(["-c", program, *arguments], processes, devices)
    ended = [process.communicate(timeout=300) for process in started]
    assert all(process.returncode == 0 for process in started), [error[-2000:] for _, error in ended]
    return [output for output, _ in ended]
