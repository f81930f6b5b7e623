import logging
import subprocess
import sys
from pathlib import Path

import pytest

import opendeep_jax
from opendeep_jax.cli.process import process_start, set_verbosity

ROOT = Path(opendeep_jax.__file__).parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the start of a process is estimated")
def test_the_start_of_the_process_lies_before_its_first_import():
    program = (
        "import time\n"
        "first = time.perf_counter()\n"
        "time.sleep(0.3)\n"
        "from opendeep_jax.cli.process import process_start\n"
        "print(first - process_start())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert -0.02 < float(done.stdout) < 30, done.stderr  # the system counts in hundredths of a second


def test_without_the_systems_word_processor_time_stands_in(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda _: "not the kernel's line")
    monkeypatch.setattr("time.process_time", lambda: 5.0)
    monkeypatch.setattr("time.perf_counter", lambda: 100.0)
    assert process_start() == 95.0


@pytest.mark.parametrize("verbosity, level", [(1, logging.DEBUG), (0, logging.INFO), (-1, logging.WARNING)])
def test_verbosity_governs_our_loggers_and_those_of_absl(verbosity, level):
    loggers = logging.getLogger("opendeep_jax.data.pipeline"), logging.getLogger("absl")
    try:
        set_verbosity(verbosity)
        assert [logger.getEffectiveLevel() for logger in loggers] == [level, level]
    finally:
        set_verbosity(-1)
