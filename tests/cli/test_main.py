"""`opendeep` answers every mistake with one paragraph and a status, and never with a stack of frames."""

import contextlib
import dataclasses
import errno
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import opendeep_jax
from opendeep_jax.cli import main as cli
from opendeep_jax.cli.main import COMMANDS, main
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_recipe, load_run_config, save_run_config

ROOT = Path(opendeep_jax.__file__).parent.parent


@pytest.fixture
def command(monkeypatch):
    """Puts a function in the place of every command's main."""

    def put(function):
        monkeypatch.setattr(cli.importlib, "import_module", lambda _: types.SimpleNamespace(main=function))

    return put


def raises(error):
    def function(_):
        raise error

    return function


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(argv, capsys):
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_version_is_the_packages(word, capsys):
    assert main([word]) == 0
    assert capsys.readouterr().out == f"opendeep {opendeep_jax.__version__}\n"


def test_an_unknown_command_is_answered_with_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "Did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["watch", "plan", "describe", "export"])
def test_help_of_a_command_is_its_own(name, capsys):
    said = []
    for argv in (["help", name], [name, "--help"]):
        with contextlib.suppress(SystemExit):
            assert main(argv) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and f"opendeep {name}" in said[0]


@pytest.mark.parametrize(
    "argv, answer",
    [
        (["help", "trian"], "Did you mean train?"),
        (["quickstart"], "quickstart is a recipe. Did you mean `opendeep train --config=quickstart`?"),
        (["llama3:8b"], "Did you mean `opendeep train --config=llama3:8b`?"),
        (["--config=quickstart", "--seed=1"], "as in `opendeep train --config=quickstart --seed=1`"),
        (["plan", "--config=quickstart", "--topolgy=v5e:2x2"], "Did you mean --topology?"),
        (["launch", "--config=quickstart", "--tarhet=slurm"], "Did you mean --target?"),
        (["launch", "--config=quickstart", "--process=2"], "Did you mean --processes?"),
        (["sweep", "--config=quickstart", "--paralel=2"], "Did you mean --parallel?"),
        (["describe", "--config=quickstart", "--device=2"], "Did you mean --devices?"),
    ],
)
def test_a_beginners_slip_is_answered_with_what_was_meant(argv, answer, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert answer in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_bad_input_is_one_paragraph_on_standard_error(command, capsys):
    command(raises(ConfigError("seed = -1: must be from 0.")))
    assert main(["train"]) == 2
    assert capsys.readouterr() == ("", "opendeep: seed = -1: must be from 0.\n")


def test_an_interrupt_is_one_line_and_status_130(command, capsys):
    command(raises(KeyboardInterrupt()))
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "\nopendeep train: interrupted. Give the same command to go on.\n"
    assert main(["eval"]) == 130
    assert capsys.readouterr().err == "\nopendeep eval: interrupted.\n"


@pytest.mark.parametrize(
    "number, reason, fix",
    [
        (errno.ENOSPC, "No space left on device", "free some space"),
        (errno.EFBIG, "File too large", "ulimit"),
        (errno.EIO, "Input/output error", "The disk"),
        (errno.EACCES, "Permission denied", "permissions"),
        (errno.EROFS, "Read-only file system", "permissions"),
    ],
)
def test_a_disk_that_does_not_take_a_file_is_explained(command, capsys, number, reason, fix):
    command(raises(OSError(number, reason, "runs/a/state")))
    assert main(["train"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"opendeep: {reason} (runs/a/state). ") and fix in err


@pytest.mark.parametrize(
    "error", [OSError(errno.EINVAL, "Invalid argument"), RuntimeError("a bug"), ValueError("a bug")]
)
def test_a_bug_is_not_hidden(command, error):
    command(raises(error))
    with pytest.raises(type(error)):
        main(["train"])


@pytest.mark.parametrize("name", ["report"])
def test_a_command_on_a_run_explains_itself_and_its_mistakes(name, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert "--workdir" in capsys.readouterr().out
    for argv, answer in [
        ([], "--workdir is missing"),
        (["--workdr=x"], "Did you mean --workdir?"),
        (["runs/a"], "runs/a: opendeep"),
        ([f"--workdir={tmp_path}"], "no run can be read there"),
    ]:
        assert main([name, *argv]) == 2
        assert answer in capsys.readouterr().err


def test_train_hands_the_resolved_configuration_and_the_recipe_to_the_loop(monkeypatch, tmp_path):
    handed = []

    def train(config, workdir, recipe, begun):
        handed.append((config, workdir, recipe))
        assert 0 < time.perf_counter() - begun < 3600
        save_run_config(config, recipe, workdir)

    monkeypatch.setitem(sys.modules, "opendeep_jax.train.loop", types.SimpleNamespace(train=train))
    workdir = str(tmp_path / "run")
    argv = ["train", "--config=quickstart", f"--workdir={workdir}", "--seed=5", "--train.batch_size=8"]
    assert main(argv) == 0
    recipe = dataclasses.replace(load_recipe("quickstart"), name="quickstart/run")  # titled by its directory
    assert handed == [(load_run_config(workdir), workdir, recipe)]
    assert handed[0][0].seed == 5
    assert main(argv) == 0  # and goes on in the same directory

    assert main([*argv, "--seed=6"]) == 2
    assert len(handed) == 2


def test_train_refuses_rows_that_do_not_divide_over_the_devices(monkeypatch, tmp_path, capsys):
    import jax

    monkeypatch.setattr(jax, "device_count", lambda: 13)
    assert main(["train", "--config=quickstart", f"--workdir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "must divide over the 13 devices of data x fsdp x expert, and 10 of 26 would be padding" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argv, status, answer",
    [
        (["train", "--config=quickstart", "--model.moe.experts_per_token=20"], 2, "cannot exceed the 16 experts"),
        (["train", "--config=nowhere"], 2, "neither a recipe file nor the name of a recipe"),
        (["train", "--config=quickstart", "--help"], 0, "--model.moe.experts_per_token"),
    ],
)
def test_a_bad_start_and_help_are_answered_in_under_three_seconds_without_jax(argv, status, answer):
    program = (
        "import sys\n"
        "from opendeep_jax.cli.main import main\n"
        "try:\n    status = main(sys.argv[1:])\n"
        "except SystemExit as end:\n    status = end.code\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
        "sys.exit(status)\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)
    seconds = time.monotonic() - start
    assert done.returncode == status, done.stderr
    assert answer in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 3


def test_the_package_runs_as_a_module_and_help_may_be_cut_short():
    command = f"'{sys.executable}' -m opendeep_jax train --help | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: opendeep train")
    assert done.stderr == ""
