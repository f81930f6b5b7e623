"""Kills a run with SIGKILL again and again, and compares what it ends with to a run that nobody disturbed.

    python benchmarks/kills.py [--kills=50] [--steps=1200] [--processes=1] [--devices=1] [--seed=0] [--directory=/tmp]

A tiny model with every mechanism of DeepSeek-V3 trains twice by `opendeep train`, with a checkpoint every 20 steps.
The second time its process is killed, and the same command given again, until it ends. The kills are spread over the
whole run: nearly half are aimed at a random time in a step, and as many at a checkpoint that is being written, a random
time after its temporary directory is seen; the rest fall a random time after a start. What is on disk after each says
where it really fell.
With --processes=2 or more the run is a job, of which one process, any, is killed; the others have to end by themselves.

Compared bit for bit: parameters, moments, router biases and the rest of the state, of the last checkpoint; all of
evaluation.jsonl and samples.jsonl; and of metrics.jsonl all that is no time or speed. Ends with 1 where a bit differs.
"""

import argparse
import collections
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from opendeep_jax.checkpoint.tools import checkpoint_path, differences
from opendeep_jax.config.exits import OK, RESUME
from opendeep_jax.record.metrics import read_jsonl

EVERY = 20
"""Steps between checkpoints."""
PLACES = {"step": 8, "save": 7, "start": 3}
"""Where kills are aimed at, and how often each."""
TIMES = ("seconds", "first_step_seconds", "step_seconds", "data_seconds", "tokens_per_second", "mfu")
"""Of metrics.jsonl: what two runs of the same numbers have differently."""
POLL_SECONDS = 0.0005
PATIENCE = 300.0
"""Seconds without a sign of life after which something is wrong with the run."""


def tiny_run(directory: Path, steps: int) -> list[str]:
    """Settings of a run that takes milliseconds a step, on text that is written to `directory`."""
    corpus = directory / "text"
    corpus.mkdir(parents=True, exist_ok=True)
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or directory / "compiled"
    for i in range(40):
        lines = [f"def value_{j}(count):\n    return count * {i * j % 9} + {j}\n" for j in range(3 + i % 5)]
        (corpus / f"module_{i}.py").write_text(f"import number_{i % 5}\n\n" + "\n".join(lines), encoding="utf-8")
    return f"""
        --config=quickstart --train.steps={steps} --train.batch_size=4 --train.loss_chunk=20 --train.log_every=1
        --train.sample_every=0 --train.compilation_cache={compiled} --model.vocab_size=264
        --model.hidden_size=32 --model.num_layers=2 --model.mlp_size=32 --model.mtp.depth=0
        --model.attention.num_heads=2 --model.attention.q_lora_rank=12 --model.attention.kv_lora_rank=8
        --model.attention.qk_nope_head_dim=8 --model.attention.qk_rope_head_dim=4 --model.attention.v_head_dim=8
        --model.moe.num_experts=8 --model.moe.experts_per_token=2 --model.moe.expert_size=8
        --data.tokenizer=bytes --data.sequence_length=32 --data.held_out_fraction=0.2 --data.sources.0.path={corpus}
        --data.sources.0.name=text --data.sources.0.epochs=10000 --optimizer.warmup_steps=4 --evaluation.every=40
        --evaluation.batches=1 --evaluation.final_batches=1 --checkpoint.every={EVERY}
    """.split()


def start(settings: Sequence[str], workdir: Path, processes: int = 1, devices: int = 1) -> list[subprocess.Popen]:
    """Gives the run's command: one process, or a job of several on this machine. Standard error goes to WORKDIR.N.err,
    where N is the process's number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices}"
    environ = {"JAX_PLATFORMS": "cpu"} | os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
    command = [sys.executable, "-m", "opendeep_jax.cli.main", "train", f"--workdir={workdir}", *settings]
    job = []
    for process in range(processes):
        if processes > 1:
            names = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
            environ |= {f"OPENDEEP_{n}": str(v) for n, v in zip(names, (address, processes, process), strict=True)}
        with open(f"{workdir}.{process}.err", "wb") as errors:
            pipes = {"stdout": subprocess.DEVNULL, "stderr": errors}
            job.append(subprocess.Popen(command, env=environ, cwd=Path(__file__).parents[1], **pipes))
    return job


def ended(job: list[subprocess.Popen]) -> bool:
    """Whether any process of the job has ended."""
    return any(process.poll() is not None for process in job)


def said(workdir: Path, processes: int = 1) -> str:
    """What the last start's processes wrote to standard error."""
    return "\n".join(Path(f"{workdir}.{process}.err").read_text(errors="replace") for process in range(processes))


def steps_done(workdir: Path) -> int:
    """The last step in metrics.jsonl."""
    try:
        with open(workdir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else 0
    except (FileNotFoundError, ValueError):
        return 0


def written(workdir: Path) -> int:
    """When metrics.jsonl was last written; 0 for never. A start that goes on from an earlier step writes it, too."""
    path = workdir / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def half_written(workdir: Path) -> bool:
    """Whether a checkpoint has begun to be written and is not whole."""
    return any((workdir / "checkpoints").glob("*tmp*"))


def wait_for(moment, job: list[subprocess.Popen]) -> None:
    """Returns when `moment()` is true, or a process has ended. Raises TimeoutError."""
    limit = time.monotonic() + PATIENCE
    while not moment() and not ended(job):
        if time.monotonic() > limit:
            raise TimeoutError(f"nothing happened for {PATIENCE:.0f} seconds")
        time.sleep(POLL_SECONDS)


def kill_at(aim: str, after_step: int, job: list[subprocess.Popen], workdir: Path, chance: random.Random) -> str:
    """Kills a process of the job at the next moment of this kind; returns where the kill fell, by what is on disk."""
    before = written(workdir)
    if aim == "start":
        limit = time.monotonic() + chance.uniform(0, 8)
        wait_for(lambda: time.monotonic() > limit, job)
    else:
        wait_for(lambda: written(workdir) != before and steps_done(workdir) >= after_step, job)
        wait_for(lambda: not half_written(workdir), job)
        if aim == "save":
            wait_for(lambda: half_written(workdir), job)
        time.sleep(chance.uniform(0, 0.02))
    chance.choice(job).kill()
    for process in job:
        process.wait(PATIENCE)
    if half_written(workdir):
        return "while a checkpoint was written"
    return "in a step" if written(workdir) != before else "while starting"


def disturbed(settings: Sequence[str], workdir: Path, options: argparse.Namespace) -> collections.Counter:
    """Trains the run to its end, killed on the way; how often, by where."""
    chance, where = random.Random(options.seed), collections.Counter()
    aims = [aim for aim, weight in PLACES.items() for _ in range(weight)]
    aims = [aims[i * len(aims) // options.kills % len(aims)] for i in range(options.kills)]
    chance.shuffle(aims)
    for number, aim in enumerate(aims):
        after = int((number + chance.uniform(0, 0.9)) * (options.steps - 2 * EVERY) / options.kills)
        job = start(settings, workdir, options.processes, options.devices)
        place = kill_at(aim, after, job, workdir, chance)
        statuses = [process.returncode for process in job]
        wrong = [status for status in statuses if status not in (-9, -6, RESUME)]  # JAX aborts without process 0
        if wrong:
            raise SystemExit(f"kill {number + 1}: a process ended with {wrong[0]}:\n{said(workdir, len(job))[-3000:]}")
        where[place] += 1
        print(f"kill {number + 1:>3} after step {steps_done(workdir):>5}: {place}", file=sys.stderr, flush=True)
    undisturbed(settings, workdir, options)
    return where


def undisturbed(settings: Sequence[str], workdir: Path, options: argparse.Namespace) -> None:
    """Trains the run to its end."""
    job = start(settings, workdir, options.processes, options.devices)
    if any([process.wait() != OK for process in job]):
        raise SystemExit(f"the run failed:\n{said(workdir, len(job))[-3000:]}")


def lines_that_differ(one: Path, other: Path) -> list[str]:
    """Lines of the two runs' records that are not the same, times left out: `metrics.jsonl, line 7`."""
    found = []
    for name in ("metrics.jsonl", "evaluation.jsonl", "experts.jsonl", "samples.jsonl"):
        first, second = (
            [{key: value for key, value in line.items() if key not in TIMES} for line in read_jsonl(run / name)]
            for run in (one, other)
        )
        if len(first) != len(second):
            found.append(f"{name}: {len(first)} and {len(second)} lines")
        pairs = zip(first, second, strict=False)
        found += [f"{name}, line {number}" for number, (a, b) in enumerate(pairs, 1) if a != b]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark from the command line; 1 where the runs differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--processes", type=int, default=1, help="of the job")
    parser.add_argument("--devices", type=int, default=1, help="of each process")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--directory", default=None, help="where to write; a temporary directory by default")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory, begun = Path(name).absolute(), time.monotonic()
        settings = tiny_run(directory, options.steps) + (["--faults.peer_seconds=5"] if options.processes > 1 else [])
        whole, killed = directory / "whole", directory / "killed"
        undisturbed([*settings, f"--data.directory={whole}_data"], whole, options)
        between = time.monotonic()
        where = disturbed([*settings, f"--data.directory={killed}_data"], killed, options)
        arrays = differences(checkpoint_path(whole), checkpoint_path(killed))
        lines = lines_that_differ(whole, killed)
        count = len(read_jsonl(killed / "metrics.jsonl"))
        for place, kills in where.most_common():
            print(f"{kills:>4} kills {place}")
        seconds = f"{between - begun:.0f} s undisturbed, {time.monotonic() - between:.0f} s with the kills"
        print(f"{options.steps:,} steps: {seconds}")
        print(f"final state: {'bitwise equal' if not arrays else f'{len(arrays)} arrays differ, as {arrays[0].name}'}")
        print(f"{count:,} lines of metrics: {'equal' if not lines else '; '.join(lines[:5])}")
    return int(bool(arrays or lines))


if __name__ == "__main__":
    sys.exit(main())
