"""What a run began from is never lost in silence: no way of losing checkpoints makes one begin anew."""

import dataclasses
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoints import abstract, save, state_at
from small_models import run_config

from opendeep_jax.checkpoint.checkpoints import Checkpoints, NoSoundCheckpoint
from opendeep_jax.checkpoint.digests import digest_numpy
from opendeep_jax.checkpoint.files import MODEL, OPTIMIZER, flat, make_record, to_items
from opendeep_jax.checkpoint.policy import why_kept
from opendeep_jax.checkpoint.tools import list_checkpoints, prunable, prune
from opendeep_jax.checkpoint.versions import IN_A_ROW, NEW
from opendeep_jax.checkpoint.writer import Writer
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import save_run_config
from opendeep_jax.config.schema import CheckpointConfig
from opendeep_jax.record.files import ORIGIN, checkpoint_steps
from opendeep_jax.record.origin import FORMAT, read_origin, write_origin
from opendeep_jax.record.workdir import check_workdir
from opendeep_jax.train.imported_run import RECIPE, check_importable


def restore(workdir, before=None, **config):
    with Checkpoints(workdir, CheckpointConfig(**config)) as checkpoints:
        return checkpoints.restore(abstract(), before)


def at(step: int, last_update: int):
    """`state_at` a step since whose last update all others were skipped."""
    state = state_at(step)
    return state._replace(health=state.health._replace(last_update=jnp.int32(last_update)))


@pytest.mark.parametrize("origin", [{"kind": "import", "step": 0}, {"kind": "branch", "step": 6, "parent": "runs/a"}])
@pytest.mark.parametrize("policy", itertools.product([1, 2], [0, 5], [0, 1]))
def test_no_keep_policy_prunes_what_the_run_began_from(origin, policy, tmp_path):
    config = CheckpointConfig(**dict(zip(("keep", "keep_every", "keep_best"), policy, strict=True)))
    write_origin(tmp_path, **origin)
    steps = [origin["step"] + i for i in range(5)]
    with Checkpoints(tmp_path, config) as checkpoints:
        for step in steps:
            checkpoints.save(state_at(step), measure=float(step))
        checkpoints.wait()
        assert checkpoints.steps()[0] == steps[0] and len(checkpoints.steps()) < len(steps)
        checkpoints.discard_from(0)
        assert checkpoints.steps() == [steps[0]]
    assert read_origin(tmp_path) | origin == read_origin(tmp_path)
    assert why_kept({step: None for step in steps}, config, steps[0])[steps[0]].endswith("the run began from it")


def test_pruning_by_hand_and_the_list_know_what_the_run_began_from(tmp_path):
    save(tmp_path, 0, 2, 4)
    save_run_config(run_config(), run_config(), tmp_path)
    write_origin(tmp_path, "import")
    assert prunable(tmp_path, CheckpointConfig(keep=1)) == prune(tmp_path, CheckpointConfig(keep=1)) == [2]
    assert [(row.step, row.why) for row in list_checkpoints(tmp_path)] == [
        (0, "newest 2, the run began from it"),
        (4, "newest"),
    ]


def delete_all(workdir):
    shutil.rmtree(workdir / "checkpoints")


def move_all(workdir):
    (workdir / "checkpoints").rename(workdir / "checkpoints.old")


def damage_all_and_clean_up(workdir):
    for step in checkpoint_steps(workdir / "checkpoints"):
        (workdir / "checkpoints" / str(step) / "digests" / "metadata").write_text("{}")
    with pytest.raises(NoSoundCheckpoint):
        restore(workdir)
    shutil.rmtree(workdir / "quarantine")


LOSSES = [delete_all, move_all, damage_all_and_clean_up]


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
@pytest.mark.parametrize("kind", ["random", "import", "branch"])
@pytest.mark.parametrize("before", [None, 3])
def test_a_run_that_had_a_checkpoint_is_never_begun_anew(lose, kind, before, tmp_path):
    write_origin(tmp_path, kind, step=2 if kind == "branch" else 0)
    save(tmp_path, 2, 4)
    lose(tmp_path)
    for _ in range(2):
        with pytest.raises(NoSoundCheckpoint, match="none of its checkpoints is sound.*another --workdir"):
            restore(tmp_path, before)
    save(tmp_path, 2)  # as if it were brought back
    assert int(restore(tmp_path)[0].step) == 2


def test_a_lost_local_tier_is_a_lost_checkpoint(tmp_path):
    tiers = {"local_directory": str(tmp_path / "fast"), "local_every": 1}
    with Checkpoints(tmp_path / "run", CheckpointConfig(**tiers)) as checkpoints:
        assert checkpoints.restore(abstract()) is None
        checkpoints.save(state_at(3), durable=False)
    assert int(restore(tmp_path / "run", **tiers)[0].step) == 3
    shutil.rmtree(tmp_path / "fast")
    with pytest.raises(NoSoundCheckpoint, match="local_directory"):
        restore(tmp_path / "run", **tiers)


def test_a_run_without_a_checkpoint_begins_again_and_says_so(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.restore(abstract()) is None and checkpoints.begin(state_at(0)) is None
    assert read_origin(tmp_path).keys() == {"kind", "step", "start", "format"}
    for state, text in ((state_at(0), "are as they were"), (state_at(1), "not as they were")):
        with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
            assert checkpoints.restore(abstract()) is None
            assert text in checkpoints.begin(state)


def test_going_back_to_before_the_first_checkpoint_begins_anew_and_a_later_start_may_too(tmp_path):
    write_origin(tmp_path, "random")
    save(tmp_path, 4)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.restore(abstract(), before=3) is None
        checkpoints.discard_from(1)
    assert restore(tmp_path) is None


def test_a_checkpoint_whose_updates_since_the_fault_were_all_skipped_is_good(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(keep=2)) as checkpoints:
        for step, last_update in ((4, 4), (8, 8), (12, 9), (16, 16)):
            checkpoints.save(at(step, last_update))
        checkpoints.wait()
        assert checkpoints.steps() == [12, 16]  # of the policy, all from after the fault of step 10
        state, _ = checkpoints.restore(abstract(), before=10)
        assert int(state.step) == 12 and int(state.health.last_update) == 9
        checkpoints.discard_from(13)
        assert checkpoints.steps() == [12]
        with pytest.raises(NoSoundCheckpoint, match="none from before step 9"):
            checkpoints.restore(abstract(), before=9)
        assert checkpoints.steps() == [12]


def older(workdir, step: int, skipped_in_a_row: int) -> None:
    """Writes a checkpoint as it was before gradient norms were judged."""
    items = to_items(state_at(step))
    rest = {name: array for name, array in items[OPTIMIZER].items() if name not in NEW}
    items[OPTIMIZER] = rest | {IN_A_ROW: jnp.int32(skipped_in_a_row), ".health.losses": jnp.arange(128.0)}
    arrays = flat(items)
    digests = {name: digest_numpy(np.asarray(array)) for name, array in arrays.items()}
    writer = Writer(workdir / "checkpoints", CheckpointConfig(keep=0), (MODEL, OPTIMIZER))
    writer.save(step, items, make_record(step, None, arrays, digests))
    writer.close()


def test_an_older_checkpoint_is_read_with_the_values_of_a_new_run_for_what_it_lacks(tmp_path):
    older(tmp_path, 8, 3)  # of a run that had others before
    state, notes = restore(tmp_path)
    assert notes == [] and int(state.step) == 8 and int(state.health.last_update) == 5
    np.testing.assert_array_equal(state.health.losses, np.arange(128.0))
    assert np.isnan(state.health.norms).all() and not state.health.high.any() and state.health.stretch == 0
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract())
    assert int(restore(tmp_path, before=6)[0].step) == 8
    with pytest.raises(NoSoundCheckpoint):
        restore(tmp_path, before=5)


OLD_RUNS = {
    "a checkpoint of step 0": (lambda run: save(run, 0, 2), "import", 1),
    "other checkpoints": (lambda run: save(run, 2, 4), "random", 1),
    "a log of saves": (lambda run: (run / "checkpoints.jsonl").write_text('{"step": 6}\n'), "random", 6),
    "a summary": (lambda run: (run / "summary.json").write_text("{}"), "random", 1),
    "one that was moved aside": (lambda run: (run / "unsound" / "7-20260101-000000").mkdir(parents=True), "random", 1),
    "an import's recipe": (lambda run: (run / "recipe.py").write_text(RECIPE), "import", None),
    "another recipe": (lambda run: (run / "recipe.py").write_text("def get_config(): ..."), "random", None),
    "nothing": (lambda run: None, "random", None),
}


@pytest.mark.parametrize("there", OLD_RUNS)
def test_of_a_run_older_than_the_file_its_other_files_tell_what_it_began_from(there, tmp_path):
    make, kind, saved = OLD_RUNS[there]
    make(tmp_path)
    (tmp_path / ORIGIN).unlink(missing_ok=True)
    origin = read_origin(tmp_path)
    assert (origin["kind"], origin["step"], origin.get("saved")) == (kind, 0, saved)
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    if there in ("nothing", "another recipe"):
        assert restore(tmp_path) is None
    elif not there.endswith(("of step 0", "other checkpoints")):  # of which nothing is left to tell
        with pytest.raises(NoSoundCheckpoint):
            restore(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"kind": "random"}', '{"kind": "x", "step": 0}'])
def test_a_damaged_origin_is_refused_and_never_taken_for_random(text, tmp_path):
    (tmp_path / ORIGIN).write_text(text)
    with pytest.raises(ConfigError, match="origin.json is damaged.*Write it again"):
        Checkpoints(tmp_path, CheckpointConfig())


def test_an_import_that_was_cut_short_is_neither_trained_nor_mixed_with_another(tmp_path):
    write_origin(tmp_path, "import")
    with pytest.raises(NoSoundCheckpoint, match="began from imported weights"):
        restore(tmp_path)
    check_importable(tmp_path)
    save(tmp_path, 0)
    with pytest.raises(ConfigError, match="cut short"):
        check_importable(tmp_path)


def test_an_imported_runs_configuration_in_another_directory_is_no_silent_beginning(tmp_path):
    home, config = tmp_path / "tuned", run_config()
    home.mkdir()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(home / "tokenizer.json")))
    save_run_config(config, config, home)
    check_workdir(config, tmp_path / "a")  # of a run that began from its seed, it is nobody's business
    write_origin(home, "import")
    check_workdir(config, home)
    with pytest.raises(ConfigError, match=f"--workdir={home}, or branch off with --from={home}@0"):
        check_workdir(config, tmp_path / "b")
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, mlp_size=48))
    check_workdir(other, tmp_path / "c")
    assert json.loads((home / ORIGIN).read_text()) == {"kind": "import", "step": 0, "format": FORMAT}


def test_an_old_run_writes_down_what_it_began_from_at_its_next_start(tmp_path):
    save(tmp_path, 0, 2)
    (tmp_path / ORIGIN).unlink()
    restore(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    assert read_origin(tmp_path) == {"kind": "import", "step": 0, "saved": 1, "format": FORMAT}
