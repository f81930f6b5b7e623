"""`opendeep sweep` from the command line: what it refuses, and the commands of the docs."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from small_models import run_config

import opendeep_jax
from opendeep_jax.cli.main import main
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.exits import OK
from opendeep_jax.config.load import save_run_config
from opendeep_jax.jobs.sweep import run as sweep_module
from opendeep_jax.jobs.sweep.local import train_command
from opendeep_jax.jobs.sweep.plan import check, plan_sweep, read_sweep, save

ROOT = Path(opendeep_jax.__file__).parent.parent


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=quickstart"], "varies one setting or more"),
        (["--sweep.optimizer.learning_rate=1,2"], "--config is missing"),
        (["--config=quickstart", "--sweep.optimizer.learning_rate", "1,2"], "behind an equals sign"),
        (["--config=quickstart", "--sweep.optimizer.beta1=1", "--sweep.optimizer.beta1=2"], "given twice"),
        (["--config=quickstart", "--method=annealing", "--sweep.optimizer.beta1=1"], "grid"),
        (["--config=quickstart", "--sweep.optimizer.beta=0.9"], "Did you mean"),
        (["--collect"], "--workdir is missing"),
        (["--collect", "--workdir=nowhere"], "no sweep can be read there"),
    ],
)
def test_a_wrong_command_line_is_one_paragraph_and_makes_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_commands_of_the_docs_ask_for_the_sweeps_that_are_shown(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE))
    lines = [line for line in blocks.replace("\\\n", " ").splitlines() if line.startswith("opendeep sweep")]
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_module, "run_sweep", lambda sweep, parallel, target: asked.append(sweep) or OK)
    for line in lines:
        assert main(shlex.split(line)[1:]) == OK
    grid, optuna = asked
    _, runs = check(grid)
    assert len(runs) == 12 and "`learning_rate=0.01,experts_per_token=4,seed=0`" in page
    assert "learning_rate=0.01,experts_per_token=4,seed=0" in {run.name for run in runs}
    assert optuna.method == "optuna" and all(axis.range for axis in optuna.axes)


@pytest.mark.parametrize(
    "field, value",
    [("axes", [1]), ("seeds", "x"), ("combinations", 5), ("combinations", [{"a": "b"}]), ("runs", 3)],
)
def test_a_damaged_list_of_runs_is_one_paragraph(field, value, tmp_path, capsys):
    sweep = plan_sweep(
        tmp_path / "sweep", dataclasses.replace(run_config(), name="small"), {"optimizer.learning_rate": "1e-4,1e-3"}
    )
    save(sweep, *check(sweep))
    spec = json.loads((sweep.directory / "sweep.json").read_text())
    (sweep.directory / "sweep.json").write_text(json.dumps(spec | {field: value}))
    assert main(["sweep", f"--workdir={sweep.directory}", "--collect"]) == 2
    assert "missing or damaged" in capsys.readouterr().err


def test_a_sweep_where_nothing_can_be_written_is_one_paragraph(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--config=quickstart", "--sweep.optimizer.beta1=0.9", f"--workdir={tmp_path / 'file'}"]
    assert main(["sweep", *arguments]) == 2
    assert "cannot write there (it is a file)" in capsys.readouterr().err


def test_all_runs_of_a_sweep_branch_from_one_checkpoint_while_the_trunk_goes_on(tmp_path, monkeypatch, capsys):
    trunk, directory, asked = tmp_path / "trunk", tmp_path / "sweep", []
    config = run_config()
    (trunk / "checkpoints" / "4").mkdir(parents=True)
    save_run_config(config, config, trunk)
    monkeypatch.setattr(sweep_module, "run_sweep", lambda sweep, parallel, target: asked.append(sweep) or OK)
    command = ["sweep", f"--from={trunk}", f"--workdir={directory}", "--sweep.optimizer.learning_rate=1e-3,1e-4"]
    assert main(command) == OK
    tried, runs = check(asked[0])
    save(asked[0], tried, runs)
    assert [run.config.model for run in runs] == [config.model] * 2
    started = train_command(asked[0])(runs[0])
    assert f"--from={trunk}@4" in started and started.index("train") < started.index(f"--from={trunk}@4")
    (trunk / "checkpoints" / "8").mkdir()
    assert main(command) == OK and asked[1].parent == asked[0].parent == read_sweep(directory)[0].parent
    check(asked[1])
    assert main([word.replace("trunk", "trunk@8") for word in command]) == OK
    with pytest.raises(ConfigError, match="it holds another sweep"):
        check(asked[2])
    assert main(["sweep", f"--from={trunk}", "--sweep.optimizer.learning_rate=1e-3"]) == 2
    assert "--workdir is missing" in capsys.readouterr().err


def test_a_sweep_from_a_checkpoint_that_is_not_there_starts_no_run(tmp_path, capsys):
    (tmp_path / "trunk" / "checkpoints" / "4").mkdir(parents=True)
    save_run_config(run_config(), run_config(), tmp_path / "trunk")
    command = f"--from={tmp_path}/trunk@5", f"--workdir={tmp_path}/sweep", "--sweep.optimizer.learning_rate=1e-3"
    assert main(["sweep", *command]) == 2
    assert "has no checkpoint of step 5; there are: 4" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
