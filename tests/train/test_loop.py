"""A run's promises: its files, the same numbers each time, and nothing lost when it is stopped or killed."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import interrupted_after

from opendeep_jax.checkpoint.checkpoints import Checkpoints
from opendeep_jax.config.load import load_run_config, save_run_config
from opendeep_jax.models.accounting import count_parameters
from opendeep_jax.record.metrics import read_jsonl
from opendeep_jax.train import loop

CLOCK = {"seconds", "tokens_per_second", "step_seconds", "mfu", "first_step_seconds", "data_seconds"}
"""Fields that a clock decides."""

KILLED_RUN = """
import os, signal, sys, time
from pathlib import Path
from opendeep_jax.config.load import load_run_config
from opendeep_jax.train import loop

workdir, put, batches = Path(sys.argv[1]), loop.put_batch, 0

def put_batch(*arguments):
    global batches
    batches += 1
    if batches == 14:
        while not (workdir / "checkpoints" / "8").is_dir():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    return put(*arguments)

loop.put_batch = put_batch
loop.train(load_run_config(workdir), workdir)
"""


def records(workdir):
    """metrics.jsonl by step, without what a clock decides."""
    lines = read_jsonl(workdir / "metrics.jsonl")
    return {line["step"]: {name: value for name, value in line.items() if name not in CLOCK} for line in lines}


def assert_same_numbers(workdir, other):
    """Every number of every line that both runs logged is the same to the bit, and no line is missing."""
    ours, theirs = records(workdir), records(other)
    assert {step for step in theirs if step % 2 == 0} <= ours.keys()
    for step in ours.keys() & theirs.keys():
        assert ours[step] == theirs[step], step
    for name in ("evaluation.jsonl", "samples.jsonl"):
        assert read_jsonl(workdir / name) == read_jsonl(other / name), name
    assert read_jsonl(workdir / "experts.jsonl")[-1] == read_jsonl(other / "experts.jsonl")[-1]


def test_a_finished_run_has_all_its_files(small_run):
    files = {path.name for path in small_run.iterdir()}
    assert files >= {"config.json", "config_diff.txt", "metrics.jsonl", "evaluation.jsonl", "experts.jsonl"}
    assert files >= {"samples.jsonl", "summary.json", "report.html", "tensorboard", "checkpoints"}
    assert list(small_run.glob("*.png")) and list((small_run / "tensorboard").iterdir())


def test_every_line_of_metrics_has_the_fields_that_the_documentation_names(small_run):
    lines = read_jsonl(small_run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, *range(2, 25, 2)]
    always = "step tokens loss lm_loss mtp_loss balance_loss grad_norm learning_rate expert_load_max_over_mean"
    for line in lines:
        assert set(always.split()) <= line.keys()
        assert line["tokens"] == line["step"] * 8 * 32
        assert 1 <= line["expert_load_max_over_mean"] <= 8
    for line in lines[1:]:
        assert line["step_seconds"] > 0 and line["mfu"] > 0
        assert line["tokens_per_second"] == pytest.approx(8 * 32 / line["step_seconds"])


def test_the_summary_says_what_was_trained(small_run):
    summary = json.loads((small_run / "summary.json").read_text())
    config = load_run_config(small_run)
    count = count_parameters(config.model)
    assert (summary["steps"], summary["tokens"]) == (24, 24 * 8 * 32)
    assert (summary["parameters"], summary["active_parameters"]) == (count.total + count.mtp, count.active)
    assert summary["final_loss"] == read_jsonl(small_run / "metrics.jsonl")[-1]["loss"]
    last = read_jsonl(small_run / "evaluation.jsonl")[-1]
    assert (last["step"], last["held_out_bits_per_byte"]) == (24, summary["held_out_bits_per_byte"])
    assert 0 < summary["xz_bits_per_byte"] < 8 and 0 < summary["gzip_bits_per_byte"] < 8
    assert summary["seconds"] > 0 and summary["tokens_per_second"] > 0 and summary["peak_memory_bytes"] > 2**20


def test_a_small_model_learns(small_run):
    lines = read_jsonl(small_run / "metrics.jsonl")
    assert lines[0]["lm_loss"] == pytest.approx(math.log(264), abs=0.5)  # at first it knows nothing
    assert lines[-1]["lm_loss"] < lines[0]["lm_loss"] - 1
    evaluations = read_jsonl(small_run / "evaluation.jsonl")
    assert [line["step"] for line in evaluations] == [12, 24]
    assert evaluations[1]["held_out_bits_per_byte"] < evaluations[0]["held_out_bits_per_byte"]


def test_checkpoints_are_kept_as_configured(small_run):
    with Checkpoints(small_run) as checkpoints:
        assert checkpoints.steps() == [16, 24]


def test_training_a_finished_run_again_changes_none_of_its_numbers(small_run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(small_run, again)
    before = json.loads((again / "summary.json").read_text())
    summary = loop.train(load_run_config(again), again)
    assert_same_numbers(again, small_run)
    assert (again / "metrics.jsonl").read_bytes() == (small_run / "metrics.jsonl").read_bytes()
    for field in ("steps", "tokens", "final_loss", "held_out_bits_per_byte", "parameters", "tokens_per_second"):
        assert summary[field] == before[field], field
    assert json.loads((again / "summary.json").read_text()) == summary


def test_a_run_that_is_killed_and_then_interrupted_has_the_numbers_of_an_undisturbed_one(small_run, tmp_path, capsys):
    config = load_run_config(small_run)
    save_run_config(config, config, tmp_path)
    environment = os.environ | {"PYTHONPATH": str(Path(loop.__file__).parents[2])}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert 8 in records(tmp_path) and not (tmp_path / "summary.json").exists()

    with interrupted_after(10):
        loop.train(config, tmp_path)
    assert "resuming from step 8" in capsys.readouterr().out
    summary = loop.train(config, tmp_path)
    assert "resuming from step 16" in capsys.readouterr().out

    assert_same_numbers(tmp_path, small_run)
    expected = json.loads((small_run / "summary.json").read_text())
    for field in ("steps", "tokens", "final_loss", "held_out_bits_per_byte", "parameters"):
        assert summary[field] == expected[field], field
