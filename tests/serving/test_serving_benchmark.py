"""benchmarks/serving.py sees answers, errors and lost pages."""

import os
import sys
from pathlib import Path

import pytest
from fake_engine import EchoEngine
from live_server import live

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import serving as benchmark  # noqa: E402


class Leaking(EchoEngine):
    """Never gives a page back."""

    def step(self):
        progress = super().step()
        self.stats.free_pages = 1
        return progress


@pytest.mark.parametrize("engine, status", [(EchoEngine, 0), (Leaking, 1)])
def test_a_short_load_is_answered_and_lost_pages_are_seen(engine, status, capsys):
    with live(lambda: engine(max_length=4096, step_seconds=0.001)) as server:
        arguments = [f"--address={server.address}", "--clients=8", "--seconds=1"]
        assert benchmark.main(arguments) == status
    assert " 0 errors" in capsys.readouterr().out


def test_a_failing_server_is_seen(capsys, caplog):
    def fail(_):
        raise RuntimeError("no")

    with live(lambda: EchoEngine(fail=fail)) as server:
        assert benchmark.main([f"--address={server.address}", "--clients=2", "--seconds=0.5"]) == 1
    assert " 0 answers" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells")
def test_resident_memory_is_that_of_the_process():
    assert 2**20 < benchmark.resident(os.getpid()) < 2**40
