"""No process waits for ever: a hang is found, explained and ended; slow but honest work is left alone."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

import opendeep_jax
from opendeep_jax.config.exits import RESUME, PeerEnded, Resume
from opendeep_jax.config.operations import FaultsConfig
from opendeep_jax.faults.watchdog import SLOWER, STACKS, Watchdog
from opendeep_jax.parallel import distributed
from opendeep_jax.record.events import read_events
from opendeep_jax.record.files import HEARTBEAT

HANG = FaultsConfig(hang_seconds=0.5)


class Exit:
    """Takes the place of the process's end: keeps the status, and when it came."""

    def __init__(self):
        self.statuses, self.happened, self.seconds, self._begun = [], threading.Event(), None, time.monotonic()

    def __call__(self, status: int) -> None:
        self.statuses.append(status)
        self.seconds = time.monotonic() - self._begun
        self.happened.set()


@pytest.fixture
def end() -> Exit:
    return Exit()


def stuck_in_a_collective(end: Exit) -> None:
    end.happened.wait(30)


def test_a_hang_is_found_in_time_with_stacks_an_event_and_a_paragraph(end, tmp_path, capsys):
    with Watchdog(tmp_path, HANG, end) as watchdog:
        watchdog.doing("step", 12)
        stuck_in_a_collective(end)
    assert end.statuses[0] == RESUME and 0.5 < end.seconds < 5
    stacks = tmp_path / STACKS / "process_0.txt"
    assert "stuck_in_a_collective" in stacks.read_text()
    event = read_events(tmp_path, "hang")[0]
    assert event["step"] == 12 and event["text"].startswith("step of step 12 has not ended within 0.5 seconds")
    assert str(stacks) in event["text"] and "start the same command again" in event["text"]
    assert "\n" not in event["text"] and event["text"] in capsys.readouterr().err


def test_signs_of_life_are_given_until_the_process_ends(end, tmp_path, monkeypatch):
    monkeypatch.setattr("opendeep_jax.faults.watchdog.BEAT_SECONDS", 0.1)
    sign, seen = tmp_path / HEARTBEAT, set()
    with Watchdog(tmp_path, FaultsConfig(hang_seconds=0, peer_seconds=0), end) as watchdog:
        for step in (3, 4):
            watchdog.doing("compile", step)
            until = time.monotonic() + 5
            while step not in seen and time.monotonic() < until:
                with contextlib.suppress(ValueError):  # half written
                    found = json.loads(sign.read_text())
                    seen |= {found["step"]} if found["doing"] == "compile" and not found["ended"] else set()
                time.sleep(0.01)
    assert seen >= {3, 4} and json.loads(sign.read_text())["ended"] is True


def test_the_paragraph_comes_even_where_the_event_cannot_be_written(end, tmp_path, capsys):
    (tmp_path / "events.jsonl").mkdir()
    with Watchdog(tmp_path, HANG, end) as watchdog:
        watchdog.doing("step", 12)
        end.happened.wait(30)
    assert end.statuses[0] == RESUME and "has not ended within" in capsys.readouterr().err


def test_what_keeps_moving_is_no_hang(end, tmp_path):
    with Watchdog(tmp_path, HANG, end) as watchdog:
        for step in range(12):
            watchdog.doing("step", step)
            time.sleep(0.1)
    assert end.statuses == [] and [path.name for path in tmp_path.iterdir()] == [HEARTBEAT]


def test_compiling_and_reading_may_take_much_longer_than_a_step(end, tmp_path):
    with Watchdog(tmp_path, HANG, end) as watchdog:
        watchdog.doing("compile", 1)
        time.sleep(1.2)
    assert end.statuses == [] and min(SLOWER[what] for what in ("compile", "data preparation", "restore")) >= 10


def test_nothing_is_a_hang_when_told_to_wait_for_ever(end, tmp_path):
    with Watchdog(tmp_path, FaultsConfig(hang_seconds=0, peer_seconds=0.5), end) as watchdog:
        watchdog.doing("step", 1)
        time.sleep(1)
    assert end.statuses == []


def test_a_clean_end_leaves_no_thread_and_other_processes_stacks(end, tmp_path):
    (tmp_path / STACKS).mkdir()
    (tmp_path / STACKS / "process_1.txt").write_text("a peer's")
    before = set(threading.enumerate())
    with Watchdog(tmp_path, HANG, end):
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) == before
    assert [path.name for path in (tmp_path / STACKS).iterdir()] == ["process_1.txt"]


def test_a_failure_of_the_run_ends_the_watch_and_is_not_hidden(end, tmp_path):
    with pytest.raises(ZeroDivisionError), Watchdog(tmp_path, HANG, end):
        1 / 0  # noqa: B018
    time.sleep(0.8)
    assert end.statuses == []


@pytest.mark.parametrize("error", [RuntimeError("x"), ValueError("y"), OSError("z")])
def test_a_process_alone_has_no_peer_to_lose(error, end, tmp_path):
    begun = time.monotonic()
    with Watchdog(tmp_path, FaultsConfig(peer_seconds=30), end) as watchdog:
        assert watchdog.lost_peer(error) is None
    assert time.monotonic() - begun < 5


@pytest.fixture
def first_of_two(monkeypatch):
    """This process takes itself for the first of two, the other of which is heard of."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(Watchdog, "_missing", lambda self: [])


GLOO = "UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue() timed out with key: x [type.googl"


def test_a_peer_that_comes_too_late_to_a_collective_asks_for_another_start(end, first_of_two, tmp_path):
    with Watchdog(tmp_path, FaultsConfig(peer_seconds=0.5), end) as watchdog:
        watchdog.doing("step", 3)
        found = watchdog.lost_peer(jax.errors.JaxRuntimeError(GLOO))
    assert isinstance(found, Resume) and "\n" not in str(found)
    for words in ("GetKeyValue() timed out", "one of them came too late", "start the same command again"):
        assert words in str(found)
    assert read_events(tmp_path, "hang")[0]["text"] == str(found)
    assert GLOO in (tmp_path / STACKS / "process_0.txt").read_text()


def test_a_lost_peer_is_told_with_what_this_process_did_when_it_failed(end, first_of_two, monkeypatch, tmp_path):
    monkeypatch.setattr(Watchdog, "_missing", lambda self: [1])
    with Watchdog(tmp_path, FaultsConfig(peer_seconds=0.5), end) as watchdog:
        watchdog.doing("step", 3)
        found = watchdog.lost_peer(jax.errors.JaxRuntimeError("Connection closed by peer"))
    assert "Process 0 was at step 3 (step) and ends" in str(found)
    assert read_events(tmp_path, "lost_peer")[0]["processes"] == [1]


def test_a_bug_of_this_process_stays_one_where_no_peer_is_missing(end, first_of_two, tmp_path):
    with Watchdog(tmp_path, FaultsConfig(peer_seconds=0.5), end) as watchdog:
        assert watchdog.lost_peer(jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes differ")) is None
    assert not read_events(tmp_path)


LAST_WORDS = """
import os, sys, time
from opendeep_jax.faults.exit_notice import install_exit_notice
farewell = install_exit_notice(3, sys.argv[1], "node000", "stacks/process_3.txt")
print("ready", flush=True)
{end}
"""


def last_words(end: str, coordinator: str = "127.0.0.1:1") -> tuple[int, str]:
    """How a process that left last words ends, and what is then on its standard error."""
    environ = os.environ | {"PYTHONPATH": str(Path(opendeep_jax.__file__).parents[1])}
    command = [sys.executable, "-c", LAST_WORDS.format(end=end), coordinator]
    process = subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        if "sleep" in end:
            process.kill()
        _, said = process.communicate(timeout=60)  # until the child has closed standard error, too
    return process.returncode, said


@pytest.mark.parametrize("end, status", [("os.abort()", -signal.SIGABRT), ("time.sleep(60)", -signal.SIGKILL)])
def test_a_death_without_a_word_is_explained(end, status):
    ended, said = last_words(end)
    assert ended == status
    assert "process 3 has ended without a word: process 0 on node000, which holds the job together, is gone" in said
    assert "start the same command again" in said and "stacks/process_3.txt" in said


def test_while_process_0_is_there_it_is_not_blamed():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as coordinator:
        _, said = last_words("os.abort()", f"127.0.0.1:{coordinator.getsockname()[1]}")
    assert "killed from outside (for its memory, perhaps), or it crashed" in said


@pytest.mark.parametrize("end", ["farewell()", "farewell(); farewell(); os.abort()"])
def test_a_farewell_calls_the_last_words_off(end):
    assert "without a word" not in last_words(end)[1]


@pytest.mark.parametrize("status, ends", [(1, [1]), (2, [2]), (3, [3]), (0, []), (75, []), (130, [])])
def test_a_process_ends_as_another_one_has_ended_for_good(status, ends, end, tmp_path, capsys, monkeypatch):
    """And not with that one's loss (75), or JAX's abort: launchers start again after those."""
    said = {"1": f"{status} opendeep: the disk is full"}
    monkeypatch.setattr(distributed, "get_values", lambda prefix: said if prefix == "ended" else {})
    monkeypatch.setattr(distributed, "host_of", lambda process: "node001")
    watchdog = Watchdog(tmp_path, FaultsConfig(peer_seconds=1.0), end)
    watchdog._check_peer_exits()
    with watchdog:
        end.happened.wait(4 if ends else 0.5)
    assert end.statuses[:1] == ends
    failure = watchdog.lost_peer(RuntimeError("connection reset"))
    if ends:
        text = capsys.readouterr().err
        assert f"process 1 on node001 has ended with status {status}" in text and "the disk is full" in text
        assert isinstance(watchdog._ended_peer, PeerEnded) and failure is None  # one process has no peers to lose
