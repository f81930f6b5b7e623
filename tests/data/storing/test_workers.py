import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.data.storing.workers import available_cores, run_jobs


def touch(directory, name, advance):
    """A job: writes who it was."""
    (directory / name).write_text(str(os.getpid()))
    print("a library's chatter")
    advance(len(name))
    advance(1)


def fail(kind, advance):
    time.sleep(0.1)
    raise ConfigError("the paragraph") if kind == "config" else ZeroDivisionError("the reason")


def sleep(directory, name, advance):
    """A job that does not end."""
    (directory / name).write_text(str(os.getpid()))
    time.sleep(600)


def die(advance):
    """A job that the system kills."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_job_is_done_once_and_reports(tmp_path, workers, capfd):
    names, sizes = [f"{'x' * i}" for i in range(1, 8)], []
    run_jobs(touch, (tmp_path,), [(name,) for name in names], workers, sizes.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert sum(sizes) == sum(len(name) + 1 for name in names)
    pids = {int(path.read_text()) for path in tmp_path.iterdir()}
    assert (pids == {os.getpid()}) == (workers == 1) and len(pids) <= workers


@pytest.mark.parametrize(("kind", "error"), [("config", ConfigError), ("other", ZeroDivisionError)])
def test_the_first_error_arrives_as_itself(kind, error):
    with pytest.raises(error) as raised:
        run_jobs(fail, (), [(kind,)] * 3, 2, lambda size: None)
    notes = getattr(raised.value, "__notes__", [])
    assert ("In a worker process" in "".join(notes)) == (kind == "other")


def test_a_job_that_cannot_travel_is_an_error():
    with pytest.raises(Exception, match="pickle|local"):
        run_jobs(fail, (), [(lambda: None,)] * 3, 2, lambda size: None)


def test_cores_are_those_this_process_may_use():
    assert 1 <= available_cores() <= os.cpu_count()


def test_a_killed_worker_is_an_error_with_the_cure():
    with pytest.raises(ConfigError, match="A worker process ended by signal 9 .* memory .*--data.workers=1"):
        run_jobs(die, (), [()] * 3, 2, lambda size: None)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent_and_hold_its_lock_until_then(tmp_path, kill):
    script = f"""
        import fcntl, os, pathlib, sys
        sys.path[:0] = {[str(Path(__file__).parents[3]), str(Path(__file__).parent)]!r}
        from test_workers import run_jobs, sleep
        lock = os.open({str(tmp_path / "lock")!r}, os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_jobs(sleep, (pathlib.Path({str(tmp_path)!r}),), [("1",), ("2",), ("3",)], 2, print, keep_open=(lock,))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in "12"))
    workers = [int((tmp_path / name).read_text()) for name in "12"]
    with open(tmp_path / "lock") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process.send_signal(kill)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == -kill
        assert errors.strip().endswith("KeyboardInterrupt") if kill == signal.SIGINT else not errors
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert wait_for(lambda: not any(map(alive, workers))) and not (tmp_path / "3").exists()
