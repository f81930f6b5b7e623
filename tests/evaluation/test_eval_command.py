"""`opendeep eval` end to end on tasks and texts in files, and what it refuses."""

import hashlib
import json
import sys

import pytest

pytest.importorskip("lm_eval")

from opendeep_jax.cli.main import main  # noqa: E402


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """No compilation cache outside of the test's directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_tasks_run_from_the_command_to_the_file(tiny_directory, task_directory, tmp_path, capsys):
    out = tmp_path / "results.json"
    command = ["eval", f"--model={tiny_directory}", "--tasks=colors,colors_written", f"--out={out}"]
    command += [f"--include_path={task_directory}", "--num_fewshot=1", "--seed=7"]
    assert main(command) == 0, capsys.readouterr().err
    assert "colors_written" in capsys.readouterr().out
    found = json.loads(out.read_text("utf-8"))
    assert found["model"]["name"] == "tiny" and len(found["model"]["config_sha256"]) == 64
    assert {"opendeep", "lm_eval", "jax"} <= set(found["versions"])
    assert found["settings"]["seed"] == 7 and found["settings"]["max_length"] == 64
    colors = found["tasks"]["colors"]
    assert (colors["n"], colors["num_fewshot"], len(colors["samples"])) == (3, 1, 3)
    metric = colors["metrics"]["acc,none"]
    low, high = metric["interval"]
    assert low <= metric["value"] <= high and metric["standard_error"] >= 0 and metric["higher_is_better"]
    assert metric["value"] == pytest.approx(sum(sample["scores"]["acc"] for sample in colors["samples"]) / 3)
    again = tmp_path / "again.json"
    assert main([*command[:3], f"--out={again}", *command[4:]]) == 0
    assert json.loads(again.read_text("utf-8"))["tasks"] == found["tasks"]  # the same to the last digit


def test_the_hashes_are_those_of_the_very_prompts(tiny_directory, task_directory, tmp_path, capsys):
    out = tmp_path / "results.json"
    more = [f"--include_path={task_directory}", f"--out={out}", "--limit=1", "--prompts=chat"]
    assert main(["eval", f"--model={tiny_directory}", "--tasks=colors,colors_written", *more]) == 0
    tasks = json.loads(out.read_text("utf-8"))["tasks"]
    prompt = "<user>The sky is<assistant>"
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in (f"{prompt}blue", f"{prompt}made of cheese")]
    assert [sample["prompt_sha256"] for sample in tasks["colors"]["samples"]] == [hashes]
    (written,) = tasks["colors_written"]["samples"]
    assert written["prompt_sha256"] == [hashlib.sha256(prompt.encode()).hexdigest()]
    assert tasks["colors_written"]["metrics"]["exact_match,none"]["interval"] is not None


def test_a_text_is_measured(tiny_directory, tmp_path, capsys):
    text, out = tmp_path / "a.txt", tmp_path / "results.json"
    text.write_text("some text to foretell, again and again. " * 5, "utf-8")
    command = ["eval", f"--model={tiny_directory}", f"--text={text}", "--stride=16", f"--out={out}"]
    assert main(command) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text("utf-8"))
    assert found["bytes"] == 200 and found["perplexity"] > 1 and found["stride"] == 16
    assert found["model"]["source"] == str(tiny_directory)


def test_a_mesh_measures_what_one_device_measures(tiny_directory, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text to foretell, again and again. " * 5, "utf-8")
    command = ["eval", f"--model={tiny_directory}", f"--text={tmp_path / 'a.txt'}"]
    one, divided = (
        json.loads(capsys.readouterr().out)
        for more in ([], ["--parallel.data=2", "--parallel.tensor=2"])
        if main([*command, *more]) == 0
    )
    assert divided.pop("nats") == pytest.approx(one.pop("nats"), rel=1e-5)
    assert divided["model"] == one["model"] and divided["windows"] == one["windows"]


@pytest.mark.parametrize(
    "more, words",
    [
        ([], "is no run"),
        (["--tasks=colors", "--text=a.txt"], "--tasks and --text are both given"),
        (["--workdir=x"], "--model and --workdir are both given"),
        (["--tasks=colors", "--prompts=chatty"], "must be plain or chat"),
        (["--tasks=colors", "--limit=-1"], "--limit=-1: must be at least 0"),
        (["--tasks=colors", "--out=/nowhere/a.json"], "its directory is not there"),
        (["--tasks=colors", "--step=3"], "only a run has steps"),
        (["--tasks=colors", "--parallel.stage=2"], "--parallel.stage: generation divides neither"),
        (["--text=nowhere.txt"], "there is no such file"),
        (["--tasks=colors", "--include_path=/nowhere"], "is no directory"),
        (["--tasks=,"], "names no task"),
        (["--taks=colors"], "Did you mean --tasks"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(tiny_directory, more, words, capsys):
    assert main(["eval", f"--model={tiny_directory}", *more]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("opendeep: ")


def test_no_source_and_no_run_are_refused(tmp_path, capsys):
    assert main(["eval"]) == 2
    assert "--model is missing" in capsys.readouterr().err
    assert main(["eval", f"--workdir={tmp_path}"]) == 2
    assert "holds no model" in capsys.readouterr().err


@pytest.mark.slow  # the harness reads its thousands of tasks
def test_a_wrong_task_is_answered_with_the_right_one(tiny_directory, task_directory, capsys):
    command = ["eval", f"--model={tiny_directory}", "--tasks=helaswag", f"--include_path={task_directory}"]
    assert main(command) == 2
    assert "--tasks=helaswag: there is no such task. Did you mean hellaswag?" in capsys.readouterr().err


def test_without_the_extra_the_cure_is_said(tiny_directory, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "opendeep_jax.evaluation.harness", raising=False)
    assert main(["eval", f"--model={tiny_directory}", "--tasks=colors"]) == 2
    assert "pip install 'opendeep-jax[eval]'" in capsys.readouterr().err
