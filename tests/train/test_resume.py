"""A run in several starts: nothing twice, nothing lost, and its numbers cover all of them."""

import dataclasses
import json
import os
import shutil
import signal
import time

import pytest
from small_models import DENSE, interrupted_after, small_run_config

from opendeep_jax.checkpoint.checkpoints import Checkpoints
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.exits import Resume
from opendeep_jax.config.load import load_run_config, save_run_config
from opendeep_jax.config.schedule import stage_at
from opendeep_jax.config.schema import (
    CheckpointConfig,
    DataPhase,
    EvaluationConfig,
    ParallelConfig,
    RampStage,
    RunConfig,
    TrainConfig,
)
from opendeep_jax.data.recorded import read_description
from opendeep_jax.record.files import read_jsonl
from opendeep_jax.train import evaluate, loop
from opendeep_jax.train.evaluate import evaluate_workdir, evaluation_batch_size
from opendeep_jax.train.observer import training_speed
from opendeep_jax.train.setup import StepPrograms


@pytest.fixture
def copied_run(small_run, tmp_path):
    """A copy of the small run, to be changed."""
    return shutil.copytree(small_run, tmp_path / "copy")


def contents(workdir):
    """Bytes of every file except the report's, by path."""
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and path.name not in ("report.html", "loss.png")
    }


def test_a_finished_run_is_left_exactly_as_it_is(copied_run, capsys):
    before = contents(copied_run)
    summary = loop.train(load_run_config(copied_run), copied_run)
    assert summary == json.loads((copied_run / "summary.json").read_text())
    assert capsys.readouterr().out.startswith("finished: all 24 steps are done. Report: ")
    assert contents(copied_run) == before


def test_a_run_killed_before_its_summary_gets_the_one_it_would_have_had(copied_run):
    before = json.loads((copied_run / "summary.json").read_text())
    kept = {name: (copied_run / name).read_bytes() for name in ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl")}
    (copied_run / "summary.json").unlink()
    summary = loop.train(load_run_config(copied_run), copied_run)
    same = "steps tokens final_loss held_out_bits_per_byte gzip_bits_per_byte tokens_per_second parameters"
    assert {name: summary[name] for name in same.split()} == {name: before[name] for name in same.split()}
    assert summary["seconds"] > read_jsonl(copied_run / "metrics.jsonl")[-1]["seconds"]
    assert {name: (copied_run / name).read_bytes() for name in kept} == kept  # and no evaluation twice


def dense_config(corpus, prepared) -> RunConfig:
    """6 steps of a small dense model, whose batches grow at the fourth; no text is held out."""
    ramp = (RampStage(8, tokens=3 * 8 * 32),)
    config = small_run_config(corpus, prepared, steps=6, batch_size=16, batch_ramp=ramp, log_every=1, sample_every=0)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(DENSE, vocab_size=264),
        data=dataclasses.replace(config.data, held_out_fraction=0.0),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=1),
        evaluation=EvaluationConfig(every=2),
        checkpoint=CheckpointConfig(every=0, keep=0),
    )


@pytest.fixture(scope="module")
def interrupted_run(text_corpus, tmp_path_factory):
    """The work directory of the dense run, stopped by SIGTERM in its second step and then resumed."""
    directory = tmp_path_factory.mktemp("interrupted")
    config, workdir = dense_config(text_corpus, directory / "data"), directory / "run"
    put, batches, of = loop.put_batch, [], StepPrograms.of

    def put_batch(*arguments):
        batches.append(1)
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(*arguments)

    def slow_of(programs, rows, length):
        if rows == stage_at(config, 3).batch_size:
            time.sleep(1 - programs.has(rows, length))
        return of(programs, rows, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "put_batch", put_batch)
        patch.setattr(StepPrograms, "of", slow_of)
        with pytest.raises(Resume, match="SIGTERM"):
            loop.train(config, workdir, begun=time.perf_counter() - 1000)
        with Checkpoints(workdir) as checkpoints:
            assert checkpoints.steps() == [2]  # the step at hand was finished and saved
        loop.train(config, workdir, begun=time.perf_counter() - 100)
    return workdir


def test_an_interrupted_run_goes_on_from_the_step_it_stopped_at(interrupted_run):
    assert [line["step"] for line in read_jsonl(interrupted_run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not list((interrupted_run / "checkpoints").glob("*tmp*"))


def test_the_first_step_is_timed_from_the_start_of_the_program_and_the_run_over_all_starts(interrupted_run):
    lines = read_jsonl(interrupted_run / "metrics.jsonl")
    first = {line["step"]: line["first_step_seconds"] for line in lines if "first_step_seconds" in line}
    assert first.keys() == {1, 3} and 1000 < first[1] < 1100 and 100 < first[3] < 200
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] == pytest.approx(first[1], abs=5) and seconds[2] > 1100
    summary = json.loads((interrupted_run / "summary.json").read_text())
    assert summary["seconds"] >= seconds[-1]
    assert (summary["final_loss"], summary["tokens_per_second"]) == (lines[-1]["loss"], training_speed(lines))


def test_compiling_for_a_larger_batch_is_no_training_time(interrupted_run):
    lines = read_jsonl(interrupted_run / "metrics.jsonl")
    assert [line["tokens"] // 32 for line in lines] == [8, 16, 24, 40, 56, 72]
    assert lines[3]["step_seconds"] < 1  # the compilation before it was made to take longer than this


def test_phases_of_several_lengths_train_one_after_the_other_and_resume_with_the_same_numbers(text_corpus, tmp_path):
    config = dense_config(text_corpus, tmp_path / "data")
    phases = (DataPhase("short", tokens=3 * 16 * 32), DataPhase("long", sequence_length=64, batch_size=8))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, phases=phases, packing="best_fit"),
        train=dataclasses.replace(config.train, batch_ramp=()),
        checkpoint=CheckpointConfig(every=4),
    )
    loop.train(config, tmp_path / "whole")
    with interrupted_after(5):
        loop.train(config, tmp_path / "resumed")
    loop.train(config, tmp_path / "resumed")
    whole, resumed = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "resumed"))
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    assert [line["tokens"] for line in whole] == [512 * step for step in range(1, 7)]
    assert [phase["steps"] for phase in read_description(tmp_path / "whole")["phases"]] == [3, 3]


def test_without_held_out_text_nothing_is_claimed_about_it(interrupted_run):
    summary = json.loads((interrupted_run / "summary.json").read_text())
    assert [summary[f"{name}_bits_per_byte"] for name in ("held_out", "gzip", "xz")] == [None] * 3
    assert not (interrupted_run / "evaluation.jsonl").exists()
    assert "bits per byte," not in (interrupted_run / "report.html").read_text()
    with pytest.raises(ConfigError, match="held out no text"):
        evaluate_workdir(interrupted_run)


def test_a_run_is_evaluated_on_other_devices_than_it_was_trained_on(copied_run):
    config = load_run_config(copied_run)
    # Twelve devices are not here, and twelve rows do not divide over the eight that are.
    train = dataclasses.replace(config.train, batch_size=12)
    elsewhere = dataclasses.replace(config, parallel=ParallelConfig(fsdp=12), train=train)
    save_run_config(elsewhere, elsewhere, copied_run)
    expected = json.loads((copied_run / "summary.json").read_text())["held_out_bits_per_byte"]
    assert evaluate_workdir(copied_run)["held_out_bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_a_run_is_not_evaluated_on_other_text_than_its_own(copied_run):
    described = json.loads((copied_run / "data.json").read_text())
    (copied_run / "data.json").write_text(json.dumps(described | {"content_hash": "0" * 64}))
    for refused in (lambda: evaluate_workdir(copied_run), lambda: retrain(copied_run)):
        with pytest.raises(ConfigError, match="its run was trained on .* tokens .hash 000000000000.*others"):
            refused()


def retrain(workdir):
    (workdir / "summary.json").unlink()
    return loop.train(load_run_config(workdir), workdir)


def test_an_evaluation_takes_no_more_rows_at_once_than_training_does():
    config = RunConfig(train=TrainConfig(batch_size=32, accumulation_steps=4))
    assert evaluation_batch_size(config) == 8
    assert evaluation_batch_size(dataclasses.replace(config, evaluation=EvaluationConfig(batch_size=5))) == 5


def test_an_evaluation_of_a_run_uses_its_compiled_programs(copied_run, monkeypatch):
    used = []
    monkeypatch.setattr(evaluate, "use_compilation_cache", used.append)
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("asked for too late"))
    with pytest.raises(pytest.fail.Exception):
        evaluate_workdir(copied_run)
    assert used == [load_run_config(copied_run)]


def test_training_speed_leaves_out_the_first_step_of_every_start():
    lines = [
        {"step": 1, "tokens": 10, "first_step_seconds": 60.0},
        {"step": 3, "tokens": 30, "step_seconds": 0.5},
        {"step": 4, "tokens": 40, "first_step_seconds": 30.0},
        {"step": 6, "tokens": 60, "step_seconds": 1.5},
    ]
    assert training_speed(lines) == 40 / 4
    assert training_speed(lines[:1]) is None and training_speed([]) is None
