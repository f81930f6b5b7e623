"""Several processes on this machine are one job: they find each other, start again together and end together."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.jobs.launch import local as launch_local
from opendeep_jax.jobs.launch.local import job_status, run_local

PLACE = """
import os, signal, sys, time
index, count = int(os.environ.get("OPENDEEP_PROCESS_ID", 0)), int(os.environ.get("OPENDEEP_NUM_PROCESSES", 1))
address = os.environ.get("OPENDEEP_COORDINATOR_ADDRESS", "")
with open("starts", "a") as file:
    file.write(f"{index} {count} {address} {os.getpid()}\\n")
    file.flush()
start = sum(line.startswith(f"{index} ") for line in open("starts"))  # 1, 2, ...
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(launch_local, "PAUSE_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def python(body: str) -> list[str]:
    """A command that knows its place as `index`, `count` and `address`, and the number of this start."""
    Path("program.py").write_text(PLACE + body)
    return [sys.executable, "-S", "program.py"]


def starts() -> list[list[str]]:
    return [line.split() for line in Path("starts").read_text().splitlines()]


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "statuses, job",
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([0, 75], 75),
        ([-9, 75], 75),
        ([-9, 1], 75),
        ([1, 75], 1),
        ([1, 0], 1),
        ([2, 75], 2),
        ([75, 3], 3),
        ([-9, 2], 2),
        ([130, 75], 130),
        ([134, 75], 134),
        ([-6], 75),
    ],
)
def test_the_jobs_status_is_what_starting_again_cannot_cure(statuses, job):
    assert job_status(statuses) == job


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_process_is_told_its_place(count):
    assert run_local(python(""), count, 0, 5) == 0
    assert sorted(line[0] for line in starts()) == [str(index) for index in range(count)]
    assert {line[1] for line in starts()} == {str(count)}
    if count > 1:
        (address,) = {line[2] for line in starts()}
        assert address.startswith("127.0.0.1:")


def test_one_process_is_no_job_of_several():
    assert run_local(python("sys.exit('OPENDEEP_NUM_PROCESSES' in os.environ)"), 1, 0, 5) == 0


def test_lines_of_the_others_are_marked_and_those_of_the_first_are_as_they_are(capfd):
    body = "for line in range(200): print(f'{index}:' + 'x' * 100, flush=True)\nsys.stderr.write('end')\n"
    assert run_local(python(body), 3, 0, 20) == 0
    out = capfd.readouterr().out.splitlines()
    assert out.count("[1] 1:" + "x" * 100) == out.count("[2] 2:" + "x" * 100) == 200
    assert out.count("0:" + "x" * 100) == 200
    assert "[1] end" in out


def test_all_start_again_when_one_asks_for_it_until_they_end_well(capfd):
    assert run_local(python("sys.exit(75 if start < 3 else 0)"), 2, 10, 5) == 0
    assert len(starts()) == 6
    said = capfd.readouterr().err
    assert "process 0 ended with status 75, process 1 ended with status 75; starting 2 again (2 of 10)" in said


def test_a_killed_process_is_named_and_all_start_again(capfd):
    body = "if start == 1: os.kill(os.getpid(), signal.SIGKILL) if index == 1 else sys.exit(75)\n"
    assert run_local(python(body), 2, 1, 5) == 0
    assert "process 1 was killed by SIGKILL" in capfd.readouterr().err


def test_the_others_go_on_without_a_killed_process_if_they_may(capfd):
    body = "if count == 3 and index == 1:\n    os.kill(os.getpid(), 9)\nsys.exit(0 if count == 2 else 75)"
    assert run_local(python(body), 3, 5, 5, fewest=2) == 0
    assert "process 1 was killed by SIGKILL" in (said := capfd.readouterr().err) and "starting 2 again (1 of 5)" in said
    assert sorted(line[:2] for line in starts()[-2:]) == [["0", "2"], ["1", "2"]]


def test_no_more_processes_are_given_up_than_allowed():
    body = "if index == 0 and start < 3:\n    os.kill(os.getpid(), 9)\nsys.exit(0 if start == 3 else 75)"
    assert run_local(python(body), 2, 5, 5, fewest=2) == 0
    assert {line[1] for line in starts()} == {"2"}


def test_starting_again_ends():
    assert run_local(python("sys.exit(75)"), 2, 2, 5) == 75
    assert len(starts()) == 6


@pytest.mark.parametrize("status", [1, 2, 3])
def test_what_starting_again_does_not_cure_is_not_started_again(status):
    assert run_local(python(f"sys.exit({status})"), 2, 5, 5) == status
    assert len(starts()) == 2


def test_whoever_outstays_a_failed_peer_is_ended(monkeypatch):
    monkeypatch.setattr(launch_local, "KILL_SECONDS", 0.5)
    body = """
if index == 1: sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
"""
    begun = time.monotonic()
    assert run_local(python(body), 2, 5, 0.5) == 3
    assert time.monotonic() - begun < 20


def test_a_process_that_ends_well_leaves_the_others_their_time():
    assert run_local(python("time.sleep(0 if index else 1.5)\nopen('end', 'w')"), 2, 0, 0.2) == 0
    assert Path("end").exists()


LAUNCHER = """
import sys
from opendeep_jax.jobs.launch.local import run_local
sys.exit(run_local(sys.argv[1:], 2, 5, 10))
"""
WAITING = """
signal.signal(signal.SIGTERM, lambda *_: (open(f"told{index}", "w").close(), sys.exit(75)))
signal.signal(signal.SIGINT, lambda *_: (open(f"told{index}", "w").close(), sys.exit(75)))
open(f"ready{index}", "w").close()
time.sleep(60)
"""


def launcher() -> subprocess.Popen:
    """run_local in a process of its own, with two processes that wait to be told to stop."""
    root = Path(launch_local.__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    child = subprocess.Popen([sys.executable, "-c", LAUNCHER, *python(WAITING)], env=environment)
    wait_for(lambda: Path("ready0").exists() and Path("ready1").exists())
    return child


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_and_nothing_starts_again(number, status):
    child = launcher()
    child.send_signal(number)
    assert child.wait(20) == status
    assert Path("told0").exists() and Path("told1").exists()
    assert len(starts()) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's end")
def test_a_killed_launcher_leaves_no_process_behind():
    child = launcher()
    child.kill()
    child.wait()
    wait_for(lambda: not any(alive(int(line[3])) for line in starts()))
    assert Path("told0").exists() and Path("told1").exists()  # they had the time to save


@pytest.mark.parametrize(
    "visible, count, parts", [("0,1,2,3", 2, ["0,1", "2,3"]), ("GPU-a,GPU-b", 2, ["GPU-a", "GPU-b"]), ("5", 1, ["5"])]
)
def test_gpus_are_divided(visible, count, parts, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    body = "open(f'gpus{index}', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    assert run_local(python(body), count, 0, 5) == 0
    assert [Path(f"gpus{index}").read_text() for index in range(count)] == parts


def test_gpus_that_cannot_be_divided_are_refused_before_anything_starts(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ConfigError, match="does not divide the 3 GPUs"):
        run_local(python(""), 2, 0, 5)
    assert not Path("starts").exists()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores can't be given here")
def test_cores_are_divided_and_every_process_has_one():
    body = "open(f'cores{index}', 'w').write(repr(sorted(os.sched_getaffinity(0))))"
    cores = sorted(os.sched_getaffinity(0))
    count = len(cores) + 1
    for processes in (1, min(2, len(cores)), count):
        assert run_local(python(body), processes, 0, 5) == 0
        parts = [eval(Path(f"cores{index}").read_text()) for index in range(processes)]
        assert sorted({core for part in parts for core in part}) == cores
        assert all(parts)
        if processes <= len(cores):
            assert sum(map(len, parts)) == len(cores)
