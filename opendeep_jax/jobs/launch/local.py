"""Several processes on this machine as one job: started, listened to, started again together, ended together."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.exits import BUG, INTERRUPTED, MEND, OK, RESUME, STOPPED
from opendeep_jax.jobs.child import child_command, cores_of, gpus_here, gpus_of

POLL_SECONDS = 0.05
KILL_SECONDS = 30.0
"""Seconds from SIGTERM to SIGKILL, for processes that outstay the others."""
BEGAN = int(time.time())
PAUSE_SECONDS = 1.0
"""Pause before all are started again."""


def run_local(command: Sequence[str], processes: int, restarts: int, patience: float, fewest: int = 0) -> int:
    """Run `command` in `processes` processes, which find each other by OPENDEEP_* variables, and return the status.

    Process 0 has this terminal; lines of the others begin with their number. All end before this returns, and if this
    process is killed they receive SIGTERM. SIGINT and SIGTERM are passed on.

    Args:
        command: what each executes.
        restarts: times that all are started again, where one asks for it (status 75) or was killed.
        patience: seconds that the others have to notice, by themselves, that one has failed.
        fewest: go on without the processes that were killed, as long as so many are left; 0 always starts all again.
    """
    environments = [_own_part(index, processes) for index in range(processes)]
    for attempt in range(restarts + 1):
        statuses, signal_received = _run_once(command, environments, patience)
        status = job_status(statuses)
        if signal_received or status != RESUME or attempt == restarts:
            break
        reasons = ", ".join(f"process {index} {_ended(code)}" for index, code in enumerate(statuses) if code)
        left = [part for part, code in zip(environments, statuses, strict=True) if code >= 0]
        if fewest and fewest <= len(left) < len(environments):
            environments = left
        _log(f"{reasons}; starting {len(environments)} again ({attempt + 1} of {restarts})")
        time.sleep(PAUSE_SECONDS)
    if status == RESUME and signal_received == signal.SIGINT:
        return INTERRUPTED
    if status not in (OK, RESUME):
        reasons = ", ".join(f"process {index} {_ended(code)}" for index, code in enumerate(statuses) if code)
        _log(reasons)
    return status


def job_status(statuses: Sequence[int]) -> int:
    """Return the job's status from those of its processes (negative: killed by that signal).

    What starting again does not fix comes first. A process that was killed is a lost peer, and explains a Python error
    in another; without one an error is a bug.
    """
    for final in (MEND, STOPPED, INTERRUPTED):
        if final in statuses:
            return final
    if any(status < 0 for status in statuses):
        return RESUME
    others = [status for status in statuses if status not in (OK, RESUME)]
    if others:
        return BUG if BUG in others else others[0]
    return RESUME if RESUME in statuses else OK


def _run_once(
    command: Sequence[str], environments: Sequence[tuple[Mapping[str, str], set[int]]], patience: float
) -> tuple[list[int], int]:
    """Statuses of one start of all processes, and the signal that stopped this process (0: none)."""
    address = f"127.0.0.1:{_free_port()}"
    stop_signals: list[int] = []
    children: list[subprocess.Popen] = []

    def pass_on(number, frame):
        stop_signals.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    readers = []
    try:
        for index, (environment, cores) in enumerate(environments):
            if stop_signals:
                break
            children.append(_start(command, index, len(environments), address, environment, cores))
            if index:
                readers.append(threading.Thread(target=_echo, args=(children[-1].stdout, index)))
                readers[-1].start()
        _wait(children, patience)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for reader in readers:
            reader.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return [child.returncode for child in children] or [RESUME], stop_signals[-1] if stop_signals else 0


def _wait(children: Sequence[subprocess.Popen], patience: float) -> None:
    """Return when all have ended. Once one has failed the others have `patience` seconds, then they are ended."""
    failed_at = told_at = None
    while any(child.poll() is None for child in children):
        now = time.monotonic()
        if failed_at is None and any(child.poll() not in (None, OK) for child in children):
            failed_at = now
        if failed_at is not None and told_at is None and now - failed_at > patience:
            told_at = now
            for child in children:
                if child.poll() is None:
                    child.terminate()
        if told_at is not None and now - told_at > KILL_SECONDS:
            return  # the caller kills
        time.sleep(POLL_SECONDS)


def _start(
    command: Sequence[str], index: int, count: int, address: str, environment: Mapping[str, str], cores: set[int]
) -> subprocess.Popen:
    own = (
        {}
        if count == 1
        else {
            "OPENDEEP_COORDINATOR_ADDRESS": address,
            "OPENDEEP_NUM_PROCESSES": str(count),
            "OPENDEEP_PROCESS_ID": str(index),
        }
    )
    output = subprocess.PIPE if index else None
    # A session of their own: Ctrl-C reaches this process alone, which passes it on once.
    return subprocess.Popen(
        child_command(command, signal.SIGTERM, cores),
        # By the job's name a run counts the starts that got nowhere (cli/starts.py).
        env={**os.environ, "OPENDEEP_JOB": f"local-{os.getpid()}-{BEGAN}", **environment, **own},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if index else None,
        start_new_session=True,
    )


def _own_part(index: int, count: int) -> tuple[dict[str, str], set[int]]:
    """Return the GPUs (as environment) or else the cores that one of `count` processes has to itself.

    Raises ConfigError for GPUs that can't be divided.
    """
    gpus = gpus_here()
    if len(gpus) % count:
        raise ConfigError(
            f"--processes={count}: does not divide the {len(gpus)} GPUs here. Give a divisor of {len(gpus)}, or "
            "choose GPUs by CUDA_VISIBLE_DEVICES; JAX_PLATFORMS=cpu uses none."
        )
    return (gpus_of(index, count), set()) if gpus else ({}, cores_of(index, count))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _echo(lines: IO[bytes], index: int) -> None:
    """Print a process's lines with its number in front, whole, so that two never mix."""
    for line in lines:
        sys.stdout.write(f"[{index}] {line.decode(errors='replace').rstrip()}\n")
        sys.stdout.flush()
    lines.close()


def _ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _log(text: str) -> None:
    print(f"opendeep launch: {text}", file=sys.stderr, flush=True)
