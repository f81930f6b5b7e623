"""The processes of a job meet before JAX starts, and say who is missing."""

import socket
import threading
import time

import pytest

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.exits import Resume
from opendeep_jax.parallel import roll_call as module
from opendeep_jax.parallel.cluster import Cluster
from opendeep_jax.parallel.roll_call import roll_call


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def meet(address: str, places: list[tuple[int, int]], seconds: float, late: float = 0.0) -> dict[int, Exception | None]:
    """What each (process, count) ends with; process 0 begins `late` seconds after the others."""
    ends: dict[int, Exception | None] = {}

    def one(process: int, count: int) -> None:
        time.sleep(0 if process else late)
        try:
            roll_call(Cluster("environment", address, count, process), seconds)
            ends[process] = None
        except Exception as error:
            ends[process] = error

    threads = [threading.Thread(target=one, args=place) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return ends


@pytest.mark.parametrize("late", [0.0, 0.4])
def test_processes_that_all_come_go_on_whoever_is_first(late):
    address = free_address()
    assert meet(address, [(index, 5) for index in range(5)], 20, late) == dict.fromkeys(range(5))
    assert meet(address, [(index, 2) for index in range(2)], 20, late) == dict.fromkeys(range(2))  # the port is free


def test_all_that_are_there_say_who_is_missing_and_that_it_may_be_tried_again():
    ends = meet(free_address(), [(0, 5), (2, 5), (3, 5)], 0.5)
    assert sorted(ends) == [0, 2, 3]
    for error in ends.values():
        assert isinstance(error, Resume)
        text = str(error)
        assert "processes 1, 4 of 5 (environment) did not come within 0.5 seconds (faults.join_seconds)" in text
        assert f"process 2 on {socket.gethostname()}" in text and "start the same command again" in text


def test_without_process_0_the_others_say_so():
    address = free_address()
    ends = meet(address, [(1, 2)], 0.4)
    assert isinstance(ends[1], Resume) and f"did not reach process 0 at {address} within 0.4 seconds" in str(ends[1])


def test_a_name_that_is_not_known_yet_is_asked_again():
    cluster = Cluster("JobSet", "no-such-host.invalid:1234", 2, 1)
    with pytest.raises(Resume, match="did not reach process 0 at no-such-host.invalid:1234"):
        roll_call(cluster, 0.3)


def test_parts_of_different_jobs_refuse_each_other():
    ends = meet(free_address(), [(0, 2), (1, 3)], 5)
    assert all(isinstance(error, ConfigError) and "one of 3" in str(error) for error in ends.values())


def test_strangers_at_the_port_are_passed_over(monkeypatch):
    monkeypatch.setattr(module, "ATTEMPT_SECONDS", 0.5)
    address = free_address()
    host, _, port = address.partition(":")

    def stranger() -> None:
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"\xff\xfe\n", b""):
            for _ in range(100):
                try:
                    with socket.create_connection((host, int(port))) as wire:
                        wire.sendall(words)
                    break
                except OSError:
                    time.sleep(0.02)

    threading.Thread(target=stranger, daemon=True).start()
    assert meet(address, [(0, 2), (1, 2)], 20) == {0: None, 1: None}


def test_a_port_that_is_taken_is_named(monkeypatch):
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.2)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen at port {port}"):
            roll_call(Cluster("Slurm", f"node0:{port}", 2, 0), 5)
