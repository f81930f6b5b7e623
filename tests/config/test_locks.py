"""Locks hold one process at a time, also where the file system has no flock, and never outlive their holder."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from opendeep_jax.config import locks
from opendeep_jax.config.locks import Held, locked


@pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def place(request, tmp_path, monkeypatch):
    """A function that takes the lock of a directory, where flock works, or fails in one of the ways it does."""

    def fail(descriptor, operation):
        raise OSError(request.param, os.strerror(request.param))

    if request.param:
        monkeypatch.setattr(locks.fcntl, "flock", fail)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.01)

    class Lock:
        owner = tmp_path / ".owner"
        flock = not request.param

        def __init__(self, waiting):
            self.descriptor = os.open(tmp_path, os.O_RDONLY)
            self.inside = locked(self.descriptor, self.owner, waiting)

        def __enter__(self):
            return self.inside.__enter__()

        def __exit__(self, *error):
            self.inside.__exit__(*error)
            os.close(self.descriptor)

    return Lock


def test_a_lock_is_held_by_one_and_given_back(place):
    for _ in range(2):
        with place(None):
            with pytest.raises(Held):
                place(None).__enter__()
    assert not place.owner.exists()


def test_who_waits_is_told_and_gets_the_lock_when_it_is_given_back(place):
    order = []
    with place(None):
        waiter = threading.Thread(target=lambda: place(lambda: order.append("waits")).__enter__())
        waiter.start()
        while not order:
            time.sleep(0.01)
        order.append("gives back")
    waiter.join(10)
    assert order == ["waits", "gives back"] and not waiter.is_alive()


def owned_by(place, host: str, pid: int) -> None:
    place.owner.write_text(json.dumps({"host": host, "pid": pid, "key": "x"}))


@pytest.mark.parametrize("waiting", [None, lambda: None])
def test_the_lock_of_a_dead_process_is_taken(place, waiting):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    owned_by(place, socket.gethostname(), process.pid)
    with place(waiting):
        assert place.flock or "key" in place.owner.read_text()


@pytest.mark.parametrize("waiting", [None, lambda: None])
def test_the_lock_of_another_machine_is_taken_once_it_is_silent(place, monkeypatch, waiting):
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.1)
    owned_by(place, "elsewhere", 1)
    with place(waiting):
        assert place.flock or "elsewhere" not in place.owner.read_text()


def test_the_lock_of_another_machine_that_lives_is_left_alone(place):
    if place.flock:
        return
    owned_by(place, "elsewhere", 1)
    ended = threading.Event()

    def live():
        while not ended.wait(0.02):
            os.utime(place.owner)

    beat = threading.Thread(target=live)
    beat.start()
    try:
        with pytest.raises(Held):
            place(None).__enter__()
    finally:
        ended.set()
        beat.join()
    assert "elsewhere" in place.owner.read_text()
