"""Whatever happens to a checkpoint's files or its disk is noticed, said in a paragraph, and costs nothing else."""

import errno
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoints import abstract, files_of, flip, payload, save, state_at

from opendeep_jax.checkpoint import checkpoints as checkpoint
from opendeep_jax.checkpoint import files as checkpoint_files
from opendeep_jax.checkpoint.checkpoints import Checkpoints
from opendeep_jax.checkpoint.files import CorruptCheckpoint, read_items, to_items
from opendeep_jax.checkpoint.policy import why_kept
from opendeep_jax.checkpoint.tools import checkpoint_path, verify
from opendeep_jax.checkpoint.writer import snapshot
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import CheckpointConfig


def restore(workdir, before=None, **config):
    with Checkpoints(workdir, CheckpointConfig(**{"keep": 0, **config})) as checkpoints:
        return checkpoints.restore(abstract(), before)


def check_is(state, step) -> None:
    jax.tree.map(np.testing.assert_array_equal, state, state_at(step))


def test_a_flipped_byte_anywhere_is_noticed_or_changes_nothing(tmp_path):
    save(tmp_path, 3)
    step = tmp_path / "checkpoints" / "3"
    items = to_items(abstract())
    original = {file: file.read_bytes() for file in files_of(step)}
    noticed = set()
    for file in original:
        for place in (0.0, 0.5, 1.0):
            flip(file, place)
            try:
                found = read_items(step, items)
            except CorruptCheckpoint as error:
                noticed.add(file.relative_to(step).as_posix())
                assert "\n" not in str(error) and 20 < len(str(error)) < 400
            else:
                jax.tree.map(np.testing.assert_array_equal, found, to_items(state_at(3)))
            file.write_bytes(original[file])
    assert "digests/metadata" in noticed and len(noticed) > 5


@pytest.mark.parametrize("harm", ["truncate", "empty", "remove", "flip"])
@pytest.mark.parametrize("item", ["model", "optimizer", "digests"])
def test_the_newest_sound_checkpoint_is_taken_and_the_damaged_one_set_aside(harm, item, tmp_path):
    save(tmp_path, 2, 4)
    for file in payload(tmp_path / "checkpoints" / "4" / item):
        if harm == "remove":
            file.unlink()
        elif harm == "flip":
            flip(file)
        else:
            os.truncate(file, file.stat().st_size // 2 if harm == "truncate" else 0)
    state, notes = restore(tmp_path)
    check_is(state, 2)
    (note,) = notes
    assert note.startswith("The checkpoint of step 4 in ") and "\n" not in note and "quarantine/4-" in note
    (aside,) = (tmp_path / "quarantine").iterdir()
    assert aside.name.startswith("4-") and (aside / "model").is_dir()
    save(tmp_path, 4)  # the run comes by again
    assert restore(tmp_path)[1] == []


def test_a_digest_names_the_damaged_array(tmp_path):
    save(tmp_path, 2, 4)
    file = tmp_path / "checkpoints" / "4" / "model"
    needle = np.asarray(state_at(4).params["embed"]).tobytes()
    for path in files_of(file):
        if (at := path.read_bytes().find(needle)) >= 0:
            data = bytearray(path.read_bytes())
            data[at + 100] ^= 1
            path.write_bytes(data)
    _, (note,) = restore(tmp_path)
    assert "params.embed is not what was saved (digests differ)" in note


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_anew(tmp_path):
    save(tmp_path, 2, 4)
    for step in ("2", "4"):
        shutil.rmtree(tmp_path / "checkpoints" / step / "model")
    with pytest.raises(ConfigError, match="none of its checkpoints is sound.*step 4.*step 2.*quarantine"):
        restore(tmp_path)
    with pytest.raises(ConfigError, match="none of its checkpoints is sound"):
        restore(tmp_path)
    shutil.rmtree(tmp_path / "quarantine")
    with pytest.raises(ConfigError, match="its run had checkpoints, and there is none now.*another --workdir"):
        restore(tmp_path)


def test_reading_only_moves_nothing(tmp_path):
    save(tmp_path, 2, 4)
    shutil.rmtree(tmp_path / "checkpoints" / "4" / "model")
    with Checkpoints(tmp_path) as checkpoints:
        state, (note,) = checkpoints.restore(abstract())
        check_is(state, 2)
        assert checkpoints.steps() == [2, 4] and "moved" not in note
        assert checkpoints.save(state_at(9)) is None
    assert not (tmp_path / "quarantine").exists()


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda s: s._replace(params={**s.params, "embed": jax.ShapeDtypeStruct((41, 9), jnp.float32)}), r"\[41, 9\]"),
        (lambda s: s._replace(params={**s.params, "more": s.params["embed"]}), "has an array params.more"),
        (lambda s: s._replace(router_bias={}), "has no array router_bias.bias"),
        (lambda s: s._replace(step=jax.ShapeDtypeStruct((), jnp.uint32, sharding=s.step.sharding)), r"uint32\[\]"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_and_stays(change, text, tmp_path):
    save(tmp_path, 2, 4)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        with pytest.raises(ConfigError, match=f"of another configuration.*{text}"):
            checkpoints.restore(change(abstract()))
        assert checkpoints.steps() == [2, 4]


def test_only_earlier_checkpoints_are_restored_and_later_ones_can_be_discarded(tmp_path):
    save(tmp_path, 2, 4, 6)
    check_is(restore(tmp_path, before=6)[0], 4)
    assert restore(tmp_path, before=2) is None
    with Checkpoints(tmp_path, CheckpointConfig(keep=0)) as checkpoints:
        checkpoints.save(state_at(8))
        checkpoints.discard_from(4)
        assert checkpoints.steps() == [2]
        checkpoints.save(state_at(4))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4]


def test_the_newest_the_round_and_the_best_are_kept(tmp_path):
    measures = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: None, 6: 4.0, 7: 5.0}
    save(tmp_path, 1, 2, 3, 4, measures=measures, keep=1, keep_every=3, keep_best=1)
    save(tmp_path, 5, 6, 7, measures=measures, keep=1, keep_every=3, keep_best=1)  # measures outlive the process
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 3, 6, 7]
    kept = why_kept(measures, CheckpointConfig(keep=2, keep_every=3, keep_best=2))
    assert kept == {2: "best", 3: "every 3", 4: "best 2", 6: "newest 2, every 3", 7: "newest"}
    assert why_kept({}, CheckpointConfig()) == {} and len(why_kept(measures, CheckpointConfig(keep=0))) == 7


def test_a_save_reports_its_stall_and_size(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        report = checkpoints.save(state_at(1))
        assert (report.step, report.durable, report.notes) == (1, True, ()) and 0 < report.stall_seconds < 60
        assert report.bytes == sum(x.nbytes for x in jax.tree.leaves(state_at(1)))
        assert checkpoints.save(state_at(1)) is None


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
    state, spoil = state_at(3), jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(state)
        for _ in range(5):
            state = spoil(state)
    check_is(restore(tmp_path)[0], 3)
    copy = snapshot(state_at(2))
    assert all(x.sharding.memory_kind == "pinned_host" for x in jax.tree.leaves(copy))


def test_the_local_tier_is_newer_and_the_durable_one_outlives_it(tmp_path):
    tiers = {"local_directory": str(tmp_path / "fast"), "local_every": 1}
    with Checkpoints(tmp_path / "run", CheckpointConfig(**tiers)) as checkpoints:
        checkpoints.save(state_at(2))
        for step in (3, 4, 5):
            assert checkpoints.save(state_at(step), durable=False).durable is False
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5]
    check_is(restore(tmp_path / "run", **tiers)[0], 5)
    (local,) = (tmp_path / "fast").glob("*/process_0/checkpoints/5")
    for file in payload(local / "optimizer"):
        flip(file)
    state, (note,) = restore(tmp_path / "run", **tiers)
    check_is(state, 2)
    assert "step 5" in note and "process_0/quarantine" in note
    shutil.rmtree(tmp_path / "fast")
    state, notes = restore(tmp_path / "run", **tiers)
    check_is(state, 2)
    assert notes == []


@pytest.mark.parametrize("name", ["../run", "../link", "a b", "ü%20#?&", 'quo"te\n'])
def test_no_name_of_a_directory_makes_a_checkpoint_corrupt(name, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "run")
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "below")
    tiers = {"local_directory": "../fast", "local_every": 1}
    save(name, 2)
    with Checkpoints(name, CheckpointConfig(**tiers)) as checkpoints:
        checkpoints.save(state_at(3), durable=False)
    state, notes = restore(name, **tiers)
    check_is(state, 3)
    check_is(restore(name)[0], 2)
    verify(checkpoint_path(name))
    assert notes == []


def test_two_runs_share_a_local_directory_and_not_their_checkpoints(tmp_path):
    tiers = {"local_directory": str(tmp_path / "fast"), "local_every": 1}
    for run, step in (("a", 3), ("b", 4)):
        with Checkpoints(tmp_path / run, CheckpointConfig(**tiers)) as checkpoints:
            checkpoints.save(state_at(step), durable=False)
    check_is(restore(tmp_path / "a", **tiers)[0], 3)


def test_a_local_tier_that_fails_is_a_note_and_not_the_runs_end(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    tiers = {"local_directory": str(tmp_path / "file"), "local_every": 1}
    with Checkpoints(tmp_path / "run", CheckpointConfig(**tiers)) as checkpoints:
        assert checkpoints.save(state_at(1), durable=False) is None
        (note,) = checkpoints.save(state_at(2)).notes
        assert "local checkpoints" in note and "Not a directory" in note
    tiers["local_directory"] = str(tmp_path / "fast")
    with Checkpoints(tmp_path / "run", CheckpointConfig(**tiers)) as checkpoints:
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(checkpoints.local.manager, "save", lambda *_, **__: (_ for _ in ()).throw(full))
        early = checkpoints.save(state_at(3), durable=False).notes
        (note,) = early + checkpoints.save(state_at(4)).notes  # with the first report that comes after it
        assert "No space left" in note
    check_is(restore(tmp_path / "run")[0], 4)


def test_a_full_disk_is_an_os_error_and_the_checkpoints_before_stay(tmp_path, monkeypatch):
    save(tmp_path, 2)
    with pytest.raises(OSError) as raised, Checkpoints(tmp_path, CheckpointConfig(keep=0)) as checkpoints:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100))
        checkpoints.save(state_at(4))
    assert raised.value.errno == errno.ENOSPC and "a checkpoint takes" in str(raised.value)
    check_is(restore(tmp_path)[0], 2)


def test_a_file_size_limit_while_writing_is_an_os_error_and_leaves_nothing_half(tmp_path):
    """The kernel's own refusal, as on a full disk, in the middle of Orbax's writing."""
    import subprocess
    import sys

    save(tmp_path, 2)
    program = (
        "import resource, signal, sys; sys.path[:0] = sys.argv[2:]; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from small_checkpoints import *\n"
        "checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep=0)).__enter__()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))\n"
        "try:\n    checkpoints.save(state_at(4)); checkpoints.wait()\n"
        "except OSError as error:\n    checkpoints.__exit__(None, None, None); print(error.errno, error.filename)\n"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), str(Path(checkpoint.__file__).parents[2])]
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path, *paths], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == [str(errno.EFBIG), str(tmp_path / "checkpoints")], done.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    check_is(restore(tmp_path)[0], 2)


def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError) as raised:
        Checkpoints(tmp_path, CheckpointConfig())
    assert raised.value.errno == errno.EACCES


def test_a_file_that_may_not_be_read_makes_no_checkpoint_corrupt(tmp_path, monkeypatch):
    save(tmp_path, 2)
    refused = ValueError("Error opening file [source locations='x'] [os_error_code='13']")
    monkeypatch.setattr(checkpoint_files, "open_array", lambda *_: (_ for _ in ()).throw(refused))
    with pytest.raises(PermissionError):
        restore(tmp_path)
    assert not (tmp_path / "quarantine").exists()


def test_the_record_says_what_there_is(tmp_path):
    save(tmp_path, 2, measures={2: 1.5})
    record = json.loads((tmp_path / "checkpoints" / "2" / "digests" / "metadata").read_text())
    assert (record["step"], record["measure"]) == (2, 1.5)
    assert record["arrays"][".opt_state[0]['mu']['embed']"]["dtype"] == "bfloat16"
    assert record["arrays"]["params.head.weight"]["shape"] == [40, 9]


CUT_SHORT = """
import resource, sys, time
import jax.numpy as jnp
from opendeep_jax.config.schema import CheckpointConfig
from opendeep_jax.checkpoint.checkpoints import Checkpoints
from opendeep_jax.faults.health import new_health
from opendeep_jax.train.state import TrainState

weights = {f"w{i}": jnp.ones((64, 64)) for i in range(80)}
resource.setrlimit(resource.RLIMIT_FSIZE, (300 * 1024, -1))
try:
    with Checkpoints(sys.argv[1], CheckpointConfig()) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(1), weights, (), {}, new_health()))
except OSError as error:
    time.sleep(1)  # for what ends late
    sys.exit(error.strerror)
"""


def test_a_write_that_fails_half_way_says_nothing_but_its_error(tmp_path):
    done = subprocess.run([sys.executable, "-c", CUT_SHORT, tmp_path], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (1, os.strerror(errno.EFBIG)), done.stderr[:2000]
    assert list((tmp_path / "checkpoints").iterdir()) == []
