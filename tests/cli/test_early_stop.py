"""SIGTERM and Ctrl-C before the first step: a line, and the status that says what to do."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from opendeep_jax.cli import early_stop
from opendeep_jax.cli.early_stop import EarlyStop, early_stops
from opendeep_jax.cli.main import explanation

BUSY = """
import hashlib, sys, time
from opendeep_jax.cli import early_stop
early_stop.UNWIND_SECONDS = 0.2
try:
    with early_stop.early_stops():
        print("ready", flush=True)
        {body}
except early_stop.EarlyStop as end:
    sys.exit(end.status)
"""
WAYS = {
    "in Python": "time.sleep(30)",
    # As a compilation: one long call into C, between two lines of the main thread.
    "in C": "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
    "swallowed": "\n        while True:\n            try: time.sleep(30)\n            except BaseException: pass",
}


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("way", WAYS)
def test_a_signal_while_a_run_starts_is_answered_at_once(way, number, status):
    program = BUSY.format(body=WAYS[way])
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - begun < 15
    assert f"stopped by {number.name} between steps. Nothing is lost: give the same command to go on" in said
    assert process.returncode == status and "Traceback" not in said


def test_the_training_loop_takes_over_and_gives_back(monkeypatch):
    from opendeep_jax.faults.interrupt import stop_requests

    ends = []
    monkeypatch.setattr(early_stop, "UNWIND_SECONDS", 0.0)
    with early_stops(exit=ends.append):
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            assert stop.signal == "SIGTERM" and ends == []
        with pytest.raises(EarlyStop) as end:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert explanation("train", end.value) == (75, "")
        deadline = time.monotonic() + 10
        while ends != [75] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ends == [75]


def test_handlers_are_as_they_were_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with early_stops():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_another_thread_has_no_signals_to_look_after():
    done = []

    def run():
        with early_stops():
            done.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_signal_to_a_forked_worker_is_not_the_runs():
    program = """
import os, signal, sys, time
from opendeep_jax.cli.early_stop import early_stops
with early_stops(exit=lambda status: os._exit(9)):
    worker = os.fork()
    if not worker:
        time.sleep(10)
        os._exit(8)
    os.kill(worker, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -signal.SIGTERM
    time.sleep(0.2)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
