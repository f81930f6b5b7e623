"""`opendeep plan` on the command line: bad input is refused at once, and the files that are asked for are written."""

import importlib.util
import json
import os

import pytest
from small_models import DENSE, run_config

from opendeep_jax.cli import plan as command
from opendeep_jax.cli.plan import main
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.plan import compile as compiling
from opendeep_jax.plan import estimate
from opendeep_jax.plan.compile import OutOfResource
from opendeep_jax.plan.shortage import MEMORY, Shortage


@pytest.fixture(autouse=True)
def environment():
    """Puts back what the command sets for its own process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "--topology is missing"),
        (["--topology=v5e:2x2"], "--config is missing"),
        (["--topology=v5e:2x2", "--config=quikstart"], "Did you mean quickstart?"),
        (["--topology=v5e:2x2", "--config=quickstart", "--paralel.fsdp=4"], "parallel.fsdp"),
        (["--topology=v9:2x2", "--config=quickstart"], "no chip v9"),
        (["--topology=v5e:2x2", "--config=quickstart", "--price=-1"], "--price=-1.0"),
        (["--topology=v5e:2x2", "--config=quickstart", "--price=many"], "--price"),
        (["--topology=v5e:2x2", "--config=quickstart", "--rows_per_chip=1", "--tokens_per_chip=256"], "one of them"),
        (["--topology=v5e:2x2", "--config=quickstart", "--tokens_per_chip=300"], "multiple of the 256 tokens"),
        (["--topology=v5e:2x2", "--config=quickstart", "--save=x"], "Give --search"),
        (["--topology=v5e:2x2", "--config=quickstart", "--json=no/such/place.json"], "a directory that exists"),
        (["--topology=v5e:2x2", "--config=quickstart", "--parallel.fsdp=8"], "--topology=v5e:2x2 has 4 devices"),
        (["--topology=v5e:4x8", "--config=quickstart"], "rows must divide over the 32 devices"),
    ],
)
def test_bad_input_is_refused(argv, words, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: True)
    with pytest.raises(ConfigError) as error:
        main(argv)
    assert words in str(error.value)


def test_a_missing_compiler_is_told_before_jax_is_loaded(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ConfigError, match="tpu-compiler"):
        main(["--topology=v5e:2x2", "--config=quickstart"])


def test_help_tells_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for name in ("topology", "slices", "rows_per_chip", "price", "json", "dump_hlo", "report", "search", "save"):
        assert f"--{name}" in out


def test_a_run_that_does_not_fit_ends_with_why_after_its_files_are_written(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OutOfResource(Shortage(MEMORY, 20e9, 16e9, ""), 1.0)

    monkeypatch.setattr(estimate, "compile_step", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: True)
    files = {name: tmp_path / name for name in ("json", "report")}
    flags = [f"--{name}={path}" for name, path in files.items()]
    with pytest.raises(ConfigError, match="quickstart does not fit on v5e:2x2: each device needs 2.88 GiB more"):
        main(["--topology=v5e:2x2", "--config=quickstart", "--rows_per_chip=8", *flags])
    assert json.loads(files["json"].read_text())["memory"]["fits"] is False
    assert json.loads(files["json"].read_text())["rows_per_step"] == 32
    assert "does not fit" in files["report"].read_text() and "Memory of each device" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_a_search_ends_with_a_layout_that_train_takes(tmp_path, monkeypatch, capsys):
    from opendeep_jax.config import overrides

    monkeypatch.setattr(overrides, "load_recipe", lambda _: run_config(DENSE))
    files = {name: tmp_path / name for name in ("json", "dump_hlo", "report", "save")}
    flags = [f"--{name}={path}" for name, path in files.items()]
    main(["--topology=v5e:2x2", "--config=small", "--search", "--compile_best=1", "--price=3", *flags])
    assert f"--flagfile={files['save']}" in capsys.readouterr().out
    assert "--parallel.fsdp=" in files["save"].read_text() and "Layouts tried" in files["report"].read_text()
    assert files["dump_hlo"].read_text().startswith("HloModule")
    assert json.loads(files["json"].read_text())["price_per_chip_hour_usd"] == 3.0


def test_compiling_is_prepared_before_jax_is_imported(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    compiling.prepare_process()
    assert os.environ["JAX_PLATFORMS"] == "cpu" and os.environ["TPU_SKIP_MDS_QUERY"] == "1"
    assert command.HELP.startswith("Compiles")
