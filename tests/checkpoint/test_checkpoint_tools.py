"""Checkpoints are verified, compared, thinned out and averaged from their files."""

import shutil

import numpy as np
import pytest
from small_checkpoints import flip, payload, save, state_at

from opendeep_jax.checkpoint import tools
from opendeep_jax.checkpoint.files import Unsound, steps_in
from opendeep_jax.checkpoint.tools import (
    average,
    checkpoint_path,
    differences,
    open_arrays,
    prunable,
    prune,
    verify,
)
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import save_run_config
from opendeep_jax.config.schema import CheckpointConfig, RunConfig


def test_a_whole_checkpoint_is_verified_byte_by_byte(tmp_path):
    save(tmp_path, 2)
    seen = []
    verify(checkpoint_path(tmp_path), seen.append)
    assert sum(seen) == tools.array_bytes(checkpoint_path(tmp_path)) > 4000


@pytest.mark.parametrize("item", ["model", "optimizer", "digests"])
@pytest.mark.parametrize("harm", ["flip", "remove"])
def test_damage_is_found_without_a_device(item, harm, tmp_path):
    save(tmp_path, 2)
    for file in payload(tmp_path / "checkpoints" / "2" / item):
        flip(file) if harm == "flip" else file.unlink()
    with pytest.raises(Unsound):
        verify(checkpoint_path(tmp_path))


def test_a_damaged_array_is_named(tmp_path):
    save(tmp_path, 2)
    needle = np.asarray(state_at(2).params["head.weight"]).tobytes()
    for file in (tmp_path / "checkpoints" / "2" / "model").rglob("*"):
        if file.is_file() and (at := file.read_bytes().find(needle)) >= 0:
            data = bytearray(file.read_bytes())
            data[at] ^= 1
            file.write_bytes(data)
    with pytest.raises(Unsound, match="^params.head.weight is not what was saved"):
        verify(checkpoint_path(tmp_path))


def test_equal_checkpoints_have_no_differences_and_others_say_how_much(tmp_path):
    save(tmp_path / "a", 2, 4)
    save(tmp_path / "b", 2)
    assert differences(checkpoint_path(tmp_path / "a", 2), checkpoint_path(tmp_path / "b")) == []
    found = {
        one.name: one for one in differences(checkpoint_path(tmp_path / "a", 2), checkpoint_path(tmp_path / "a", 4))
    }
    assert set(found) >= {".step", "params.embed", "router_bias.bias", ".opt_state[0]['mu']['embed']"}
    one, other = (np.asarray(state_at(step).params["embed"], np.float64) for step in (2, 4))
    gap = np.abs(one - other)
    assert found["params.embed"].elements == gap.size
    assert found["params.embed"].absolute == pytest.approx(gap.max())
    assert found["params.embed"].relative == pytest.approx((gap / np.maximum(abs(one), abs(other))).max())
    assert ".health.losses" not in found  # NaNs of the same bits are the same


def test_pruning_keeps_what_the_policy_says_and_always_the_newest(tmp_path):
    save(tmp_path, 1, 2, 3, 4, measures={1: 0.5})
    assert prunable(tmp_path, CheckpointConfig(keep=1, keep_best=1)) == [2, 3]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4
    assert prune(tmp_path, CheckpointConfig(keep=1, keep_best=1)) == [2, 3]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "4"]
    assert prune(tmp_path, CheckpointConfig(keep=0)) == []


def test_nothing_is_pruned_while_the_newest_is_not_sound(tmp_path):
    save(tmp_path, 1, 2, 3)
    for file in payload(tmp_path / "checkpoints" / "3" / "model"):
        flip(file)
    with pytest.raises(ConfigError, match="3: is the newest checkpoint, and not sound.*Nothing was deleted"):
        prune(tmp_path, CheckpointConfig(keep=1))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path):
    save(tmp_path, 2)
    save_run_config(RunConfig(), RunConfig(), tmp_path)
    for name in ("²", "007", "3.tmp", "-4"):
        (tmp_path / "checkpoints" / name).mkdir()
    for name in ("12x-3", "note", "5-20260101-000000"):
        (tmp_path / "unsound" / name).mkdir(parents=True)
    assert steps_in(tmp_path / "checkpoints") == [2]
    assert [(row.step, row.tier) for row in tools.list_checkpoints(tmp_path)] == [(5, "unsound"), (2, "durable")]


def test_a_file_that_the_run_deletes_meanwhile_counts_nothing(tmp_path):
    (tmp_path / "whole").write_bytes(b"123")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")  # as a file that went after its name was read
    assert tools._size(tmp_path) == 3


def test_an_average_is_the_mean_with_digests_of_its_own(tmp_path):
    save(tmp_path / "run", 2, 4, 6)
    (tmp_path / "run" / "config.json").write_text("{}")
    path = average(tmp_path / "run", [2, 6], tmp_path / "out")
    verify(path)
    assert path.name == "6" and (tmp_path / "out" / "config.json").read_text() == "{}"
    arrays = open_arrays(path)
    assert set(arrays) == {"params.embed", "params.head.weight", "router_bias.bias"}
    one, other = (np.asarray(state_at(step).params["embed"]) for step in (2, 6))
    np.testing.assert_array_equal(arrays["params.embed"].read().result(), (one + other) / 2)
    np.testing.assert_array_equal(arrays["router_bias.bias"].read().result(), [4, 4])


def test_an_average_that_was_cut_short_leaves_no_directory_that_looks_like_one(tmp_path, monkeypatch):
    save(tmp_path / "run", 2, 4)
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()

    def fail(*_):
        raise OSError("full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(tools.shutil, "copy", fail)
        average(tmp_path / "run", [2, 4], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert average(tmp_path / "run", [2, 4], tmp_path / "out").is_dir()


def test_what_cannot_be_averaged_is_refused(tmp_path):
    save(tmp_path / "run", 2, 4)
    for steps, out, text in (
        ([2, 2], "out", "different steps"),
        ([2, 3], "out", "there are: 2, 4"),
        ([2, 4], "run", "is there already"),
    ):
        with pytest.raises(ConfigError, match=text):
            average(tmp_path / "run", steps, tmp_path / out)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4" / "model")
    with pytest.raises(ConfigError, match="not sound"):
        average(tmp_path / "run", [2, 4], tmp_path / "out")
    assert not (tmp_path / "out").exists()
