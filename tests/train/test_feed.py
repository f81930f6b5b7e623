"""The seams carry what is not pretraining: a run that samples what it trains on (tests/rollouts.py), in any number of
starts and processes."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
from rollouts import ROWS, STEPS, Rollouts, config, policy_gradient
from small_models import interrupted_after

from opendeep_jax.checkpoint.tools import checkpoint_path, differences
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ParallelConfig
from opendeep_jax.data.recorded import check_same_data
from opendeep_jax.record.files import METRICS, SUMMARY, read_jsonl, read_object
from opendeep_jax.train.feed import Pretraining
from opendeep_jax.train.loop import train


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The directory of a run on eight devices, undisturbed, with a step computed again elsewhere on the way."""
    workdir = tmp_path_factory.mktemp("rollouts") / "run"
    run = config(ParallelConfig(fsdp=8), replay_every=4)
    train(run, workdir, Rollouts(run, workdir), policy_gradient())
    return workdir


def numbers(workdir: Path) -> list[list[float]]:
    return [[line[name] for name in ("step", "policy_loss", "grad_norm")] for line in read_jsonl(workdir / METRICS)]


def test_a_run_trains_on_what_it_samples(whole):
    assert read_object(whole / SUMMARY)["steps"] == STEPS
    assert [step for step, *_ in numbers(whole)] == [1, 2, 3, 4, 5] and np.isfinite(numbers(whole)).all()
    assert any(norm > 0 for *_, norm in numbers(whole))
    drawn = [np.load(whole / "rollouts" / f"{step}.0.npy") for step in range(STEPS)]
    assert all(ids.shape == (ROWS, 6) for ids in drawn) and not np.array_equal(drawn[0], drawn[1])


def test_a_run_that_is_killed_reads_its_rollouts_and_ends_with_the_same_bits(whole, tmp_path, monkeypatch):
    run, sampled = config(ParallelConfig(fsdp=8), replay_every=4), []
    with interrupted_after(3):  # in step 4, which it has sampled
        train(run, tmp_path, Rollouts(run, tmp_path), policy_gradient())
    before = Rollouts.sample_with
    monkeypatch.setattr(
        Rollouts, "sample_with", lambda feed, state: sampled.append(int(state.step)) or before(feed, state)
    )
    train(run, tmp_path, Rollouts(run, tmp_path), policy_gradient())
    assert sampled == [4]  # steps 3 and 4 were done again from what was kept
    assert numbers(tmp_path) == numbers(whole)
    assert differences(checkpoint_path(tmp_path), checkpoint_path(whole)) == []


def test_rollouts_alone_give_the_run_again(whole, tmp_path, monkeypatch):
    shutil.copytree(whole / "rollouts", tmp_path / "rollouts")
    monkeypatch.setattr(Rollouts, "sample_with", None)
    run = config(ParallelConfig(fsdp=8))
    train(run, tmp_path, Rollouts(run, tmp_path), policy_gradient())
    assert differences(checkpoint_path(tmp_path), checkpoint_path(whole)) == []


def test_each_process_of_a_job_samples_the_prompts_of_its_own_rows_with_its_own_engine(whole, tmp_path):
    script = str(Path(processes.__file__).with_name("rollouts.py"))
    started = processes.start_command([script, str(tmp_path / "run")], processes=2, devices=2)
    for status, text in processes.finish(started):
        assert status == 0, text
    drawn = [np.load(tmp_path / "run" / "rollouts" / f"0.{process}.npy") for process in range(2)]
    assert [len(ids) for ids in drawn] == [ROWS // 2, ROWS // 2]
    # With the first weights each has drawn what one process draws for those rows.
    assert np.array_equal(np.concatenate(drawn), np.load(whole / "rollouts" / "0.0.npy"))
    assert read_object(tmp_path / "run" / SUMMARY)["steps"] == STEPS


def test_a_batch_that_is_asked_for_again_is_the_same(tmp_path):
    feed = Pretraining(config(), tmp_path)
    feed.data = SimpleNamespace(iterate=lambda first, part: itertools.count(first))
    assert [feed.batch(step, None) for step in (3, 4, 5, 4, 5, 2, 7)] == [3, 4, 5, 4, 5, 2, 7]


def test_other_tokens_than_those_of_the_run_are_refused(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps({"content_hash": "a" * 64, "train_tokens": 5}))
    check_same_data({"content_hash": "a" * 64, "train_tokens": 5}, tmp_path)
    with pytest.raises(ConfigError, match="trained on 5 tokens .* now give 6 others"):
        check_same_data({"content_hash": "b" * 64, "train_tokens": 6}, tmp_path)
