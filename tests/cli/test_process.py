import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import opendeep_jax
from opendeep_jax.cli import process
from opendeep_jax.cli.process import choose_platform, process_start, set_verbosity
from opendeep_jax.config.exits import INTERRUPTED

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


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A Linux machine without devices or settings; the function that adds a device file, named as under /dev."""
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_FORCE_TPU_INIT", "PJRT_NAMES_AND_LIBRARY_PATHS"):
        monkeypatch.delenv(name, raising=False)
    moved = {kind: tuple(f"{tmp_path}{path}" for path in paths) for kind, paths in process.ACCELERATORS.items()}
    monkeypatch.setattr(process, "ACCELERATORS", moved)
    monkeypatch.setattr(process, "TPU_VENDOR", "no vendor")
    monkeypatch.setattr(process, "_foreign_plugins", lambda: False)
    monkeypatch.setattr(sys, "platform", "linux")

    def add(device: str) -> None:
        path = Path(f"{tmp_path}/dev/{device}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    yield add
    os.environ.pop("JAX_PLATFORMS", None)


def test_without_an_accelerator_jax_is_told_to_use_the_cpu(machine):
    choose_platform()
    assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(
    "device, kind",
    [
        ("nvidia0", "cuda"),
        ("nvidiactl", "cuda"),
        ("dxg", "cuda"),
        ("kfd", "rocm"),
        ("accel0", "tpu"),
        ("accel/accel0", "tpu"),
        ("vfio/12", "tpu"),
    ],
)
def test_with_an_accelerator_the_choice_is_jaxs(machine, device, kind):
    machine(device)
    choose_platform()
    assert process.found_accelerators() == {kind}
    assert "JAX_PLATFORMS" not in os.environ


@pytest.mark.parametrize("device", ["nvme0", "vfio/vfio", "accelerometer", "nvidia-caps-none"])
def test_other_devices_are_no_accelerators(machine, device):
    machine(device)
    choose_platform()
    assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("name", ["JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_FORCE_TPU_INIT"])
def test_what_the_user_chose_stays(machine, monkeypatch, name):
    monkeypatch.setenv(name, "proxy")
    choose_platform()
    assert os.environ.get("JAX_PLATFORMS") == ("proxy" if name == "JAX_PLATFORMS" else None)


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_elsewhere_than_on_linux_the_choice_is_jaxs(machine, monkeypatch, system):
    monkeypatch.setattr(sys, "platform", system)
    choose_platform()
    assert "JAX_PLATFORMS" not in os.environ


def test_a_plugin_of_unknown_devices_keeps_the_choice_jaxs(machine, monkeypatch):
    monkeypatch.setattr(process, "_foreign_plugins", lambda: True)
    choose_platform()
    assert "JAX_PLATFORMS" not in os.environ


@pytest.mark.skipif(bool(process.found_accelerators()), reason="this machine has an accelerator")
def test_a_command_without_an_accelerator_says_its_own_paragraph_alone(tmp_path):
    environ = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "-m", "opendeep_jax", "train", "--config=quickstart", f"--workdir={tmp_path}/run"]
    done = subprocess.run(
        [*command, "--parallel.fsdp=3", "--train.batch_size=9"],
        env=environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("opendeep: parallel = fsdp 3:")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_an_interrupt_before_the_command_has_begun_is_one_line(monkeypatch, capsys):
    from opendeep_jax.cli import main

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["opendeep", "eval", "--help"])
    monkeypatch.setattr(main, "choose_platform", interrupted)
    assert main.script() == INTERRUPTED
    assert capsys.readouterr().err == "\nopendeep eval: interrupted.\n"


@pytest.mark.parametrize("name", ["launch", "sweep"])
def test_what_only_starts_others_leaves_the_choice_to_them(machine, monkeypatch, name):
    from opendeep_jax.cli import main

    monkeypatch.setattr(sys, "argv", ["opendeep", name, "--help"])
    monkeypatch.setattr(main, "main", lambda: 0)
    assert main.script() == 0 and "JAX_PLATFORMS" not in os.environ
