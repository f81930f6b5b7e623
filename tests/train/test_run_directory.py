"""What a work directory keeps, and whom it lets in."""

import json
import os
import signal
import threading
import types

import jax
import jax.numpy as jnp
import pytest
import tokenizers
from small_models import DENSE, run_config

from opendeep_jax.checkpoint import checkpoints as checkpoint
from opendeep_jax.checkpoint.checkpoints import Checkpoints
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import CheckpointConfig
from opendeep_jax.faults.health import new_health
from opendeep_jax.faults.interrupt import stop_requests
from opendeep_jax.record.files import finished_summary
from opendeep_jax.record.record import Record
from opendeep_jax.record.workdir import only_writer
from opendeep_jax.text.files import load_tokenizer
from opendeep_jax.train import loop
from opendeep_jax.train.feed import Pretraining
from opendeep_jax.train.run_directory import environment, save_run
from opendeep_jax.train.state import TrainState

CONFIG = run_config(DENSE)
FULL = ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device [os_error_code='28']")
"""What tensorstore raises on a full disk, shortened."""


def state_at(step: int) -> TrainState:
    return TrainState(
        jnp.int32(step), {"weight": jnp.ones(1000)}, {"moment": jnp.ones(1000)}, {"bias": jnp.ones(2)}, new_health()
    )


def checkpoints_in(workdir) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("method", ["save", "wait_until_finished"])
def test_a_full_disk_is_an_os_error_and_leaves_the_checkpoints_before(method, tmp_path, monkeypatch):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(state_at(1))
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"

    def no_space(*_, **__):
        half.mkdir(exist_ok=True)
        raise FULL

    with pytest.raises(OSError) as raised, Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        monkeypatch.setattr(checkpoints.durable.manager, method, no_space)
        checkpoints.save(state_at(2))
    assert (raised.value.errno, raised.value.strerror) == (28, "No space left on device")
    assert raised.value.filename == str(tmp_path / "checkpoints")
    assert checkpoints_in(tmp_path) == ["1"]


def test_a_checkpoint_that_cannot_fit_is_not_begun(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=8000))
        with pytest.raises(OSError, match=r"No space left on device: a checkpoint takes 9.33 KiB, 7.81 KiB are free"):
            checkpoints.save(state_at(1))
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10_000))
        checkpoints.save(state_at(1))
    assert checkpoints_in(tmp_path) == ["1"]


def test_an_error_that_is_not_the_disks_is_raised_as_it_is(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="a bug"):
            patch.setattr(
                checkpoints.durable.manager, "save", lambda *_, **__: (_ for _ in ()).throw(ValueError("a bug"))
            )
            checkpoints.save(state_at(1))
            checkpoints.wait()


def test_one_process_at_a_time_writes_a_work_directory(tmp_path):
    with only_writer(tmp_path / "new"):
        with only_writer(tmp_path / "other"):
            pass
        with pytest.raises(ConfigError, match="another process is training there.*another --workdir"):
            loop.train(CONFIG, tmp_path / "new")
    with only_writer(tmp_path / "new"):
        pass
    assert list((tmp_path / "new").iterdir()) == []


def test_a_run_is_finished_when_its_summary_has_all_its_steps(tmp_path):
    assert finished_summary(tmp_path, 10) is None
    for text, steps, finished in [('{"steps": 10}', 10, True), ('{"steps": 10}', 20, False), ('{"ste', 10, False)]:
        (tmp_path / "summary.json").write_text(text)
        assert (finished_summary(tmp_path, steps) is not None) is finished


def test_the_environment_has_versions_and_hardware_but_no_paths(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false --xla_dump_to=/home/someone/dump")
    found = environment()
    assert found["xla_flags"] == "--xla_cpu_enable_fast_math=false"
    assert found["devices"] == jax.device_count() and found["device_kind"] == jax.devices()[0].device_kind
    assert {"opendeep", "python", "jax", "jaxlib", "flax", "optax", "cpus", "platform"} <= found.keys()
    assert "/" not in json.dumps(found) and os.uname().nodename not in found.values()


def test_the_copy_of_a_tokenizer_keeps_boundaries_that_are_named_beside_it(tmp_path):
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<s>", "</s>", "<start>", "<stop>"], show_progress=False)
    library.train_from_iterator(["some text"], trainer)
    original, workdir = tmp_path / "original", tmp_path / "run"
    original.mkdir()
    workdir.mkdir()
    library.save(str(original / "my.json"))
    (original / "tokenizer_config.json").write_text('{"bos_token": "<start>", "eos_token": {"content": "<stop>"}}')
    tokenizer = load_tokenizer(original / "my.json")
    feed = Pretraining(CONFIG, workdir)
    feed.data = types.SimpleNamespace(tokenizer=tokenizer, describe=lambda: {"content_hash": "x"})
    feed.save(Record(workdir))
    save_run(CONFIG, CONFIG, Record(workdir))
    copy = load_tokenizer(workdir / "tokenizer.json")
    assert (copy.bos_id, copy.eos_id) == (tokenizer.bos_id, tokenizer.eos_id) == (2, 3)
    assert json.loads((workdir / "environment.json").read_text()) == environment()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number, capfd):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop:
        assert not stop.after(1)
        signal.raise_signal(number)
        assert stop.after(1)
        assert "Stopping after this step" in capfd.readouterr().err
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_thread_that_gets_no_signals_can_train_as_well():
    answers = []

    def ask():
        with stop_requests() as stop:
            answers.append(stop.after(1))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [False]


@pytest.mark.parametrize("made_again", [False, True])
def test_a_directory_that_goes_away_under_a_run_is_said_in_a_paragraph(made_again, tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(ConfigError, match="is gone: .* Bring it back and give the same command") as raised:
        with only_writer(workdir):
            workdir.rename(tmp_path / "moved")
            if made_again:
                workdir.mkdir()
            raise FileNotFoundError("metrics.jsonl")
    assert isinstance(raised.value.__cause__, FileNotFoundError) and "\n" not in str(raised.value)


def test_other_failures_in_a_directory_that_is_there_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics"), only_writer(tmp_path):
        raise FileNotFoundError("metrics.jsonl")
