"""A run that an older version wrote (format 0, tests/golden/old_run.tar.xz) is gone on with, measured and looked at.

Its directory was made at commit 74aec26: two layers, one with experts; updates of steps 3 and 4 skipped for NaN, a
rollback to step 2 that skips their batches, and SIGTERM after step 7 of 8. That version ended it with EXPECTED.
"""

import json
import tarfile
from pathlib import Path

import pytest

from opendeep_jax.checkpoint.files import FORMAT as CHECKPOINT_FORMAT
from opendeep_jax.checkpoint.files import make_record, read_record
from opendeep_jax.checkpoint.tools import list_checkpoints
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config
from opendeep_jax.generation.engine import Engine
from opendeep_jax.generation.requests import EngineConfig, SamplingParams
from opendeep_jax.pretrained.sources import open_model
from opendeep_jax.record.files import METRICS, SUMMARY, last_record, read_object
from opendeep_jax.record.origin import FORMAT, ORIGIN, read_origin, write_origin
from opendeep_jax.record.run_view import RunView
from opendeep_jax.record.skipped_batches import read_skipped_batches
from opendeep_jax.train.evaluate import evaluate_workdir
from opendeep_jax.train.loop import train

ARCHIVE = Path(__file__).parents[1] / "golden" / "old_run.tar.xz"
EXPECTED = {
    "loss": 5.310537815093994,  # of step 8
    "grad_norm": 0.7508416771888733,
    "held_out_loss": 5.288948500334327,  # of step 7
    "held_out_bits_per_byte": 7.687710748685916,
    "final_bits_per_byte": 7.648431152607383,
}


@pytest.fixture
def old_run(tmp_path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace("/tmp/gold", str(tmp_path)))
    return tmp_path / "run"


def test_an_old_run_is_watched_and_its_checkpoints_listed(old_run):
    run = RunView(old_run)
    run.refresh()
    assert (run.step, run.total, run.state()[0]) == (7, 8, "stopped")
    assert [event["kind"] for event in run.events][-2:] == ["rollback", "preempted"]
    assert [(row.step, row.tier) for row in list_checkpoints(old_run)] == [(7, "durable")]
    assert read_origin(old_run)["kind"] == "random" and "format" not in read_origin(old_run)
    assert [(w["first"], w["last"]) for w in read_skipped_batches(old_run)] == [(3, 4)]


def test_an_old_run_is_measured_and_goes_on_to_the_numbers_that_it_would_have_had(old_run):
    found = evaluate_workdir(old_run)
    assert found["held_out_loss"] == pytest.approx(EXPECTED["held_out_loss"], rel=1e-5)
    assert found["held_out_bits_per_byte"] == pytest.approx(EXPECTED["held_out_bits_per_byte"], rel=1e-5)
    train(load_run_config(old_run), old_run)
    line = last_record(old_run / METRICS)
    assert line["step"] == 8 and line["loss"] == pytest.approx(EXPECTED["loss"], rel=1e-5)
    assert line["grad_norm"] == pytest.approx(EXPECTED["grad_norm"], rel=1e-4)
    summary = read_object(old_run / SUMMARY)
    assert summary["held_out_bits_per_byte"] == pytest.approx(EXPECTED["final_bits_per_byte"], rel=1e-5)
    assert read_origin(old_run)["kind"] == "random"


def test_an_old_run_generates(old_run):
    model, tokenizer, _ = open_model(old_run)
    engine = Engine(model, EngineConfig(slots=1, max_length=32))
    prompt = tokenizer.encode("import ")
    (done,) = engine.generate([prompt], SamplingParams(max_tokens=6, temperature=0))
    assert tokenizer.decode(done.tokens) == 6 * " "


def test_a_directory_of_a_newer_version_is_refused(tmp_path):
    write_origin(tmp_path, "random")
    assert read_origin(tmp_path)["format"] == FORMAT
    (tmp_path / ORIGIN).write_text(json.dumps({"kind": "random", "step": 0, "format": FORMAT + 1}))
    with pytest.raises(
        ConfigError, match=f"format {FORMAT + 1}, and this version .* up to {FORMAT}: .*Update OpenDeep"
    ):
        read_origin(tmp_path)


def test_a_checkpoint_of_a_newer_version_is_refused_and_stays_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("opendeep_jax.checkpoint.files.FORMAT", CHECKPOINT_FORMAT + 1)
    record = make_record(3, None, {}, {})
    monkeypatch.undo()
    (tmp_path / "3" / "digests").mkdir(parents=True)
    (tmp_path / "3" / "digests" / "metadata").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="of format 2, .* reads those up to 1. Use OpenDeep .*, which wrote"):
        read_record(tmp_path / "3")
