"""Real packages where they are installed, offline; stand-ins for what a service may do wrong."""

import dataclasses
import importlib.util
import json
import logging
import threading
import time

import pytest
from small_models import run_config

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.operations import TrackingConfig
from opendeep_jax.record import trackers
from opendeep_jax.record.trackers import Service, Trackers, check_trackers, open_trackers


def _config(*names):
    return dataclasses.replace(run_config(), tracking=TrackingConfig(trackers=names, project="tests"))


def _collect(into):
    return lambda: Service(lambda step, numbers: into.append((step, numbers)), lambda: into.append("closed"))


def test_a_service_gets_the_finite_numbers_in_order_and_is_closed():
    got = []
    opened = Trackers({"one": _collect(got)})
    opened.log(1, "train", {"step": 1, "loss": 2.5, "mfu": None, "grad_norm": float("nan"), "peaks": [1.0]})
    opened.log(2, "evaluation", {"step": 2, "held_out_bits_per_byte": 1.5})
    opened.log(3, "train", {"step": 3, "mfu": None})  # nothing to say
    opened.close()
    opened.close()
    assert got == [(1, {"train/loss": 2.5}), (2, {"evaluation/held_out_bits_per_byte": 1.5}), "closed"]


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_service_that_fails_is_named_once_and_the_others_go_on(where, caplog):
    def fail(*_):
        raise SystemExit("no network")

    def opener():
        if where == "open":
            fail()
        return Service(fail if where == "log" else lambda *_: None, fail if where == "close" else lambda: None)

    got = []
    with caplog.at_level(logging.WARNING, "opendeep_jax"):
        opened = Trackers({"bad": opener, "good": _collect(got)})
        for step in range(20):
            opened.log(step, "train", {"loss": 1.0})
        opened.close()
    assert len(got) == 21 and got[-1] == "closed"
    assert [record.message.split(" ")[:2] for record in caplog.records] == [["tracker", "bad"]]
    assert "no network" in caplog.text


def test_a_service_that_hangs_blocks_neither_the_run_nor_its_end(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "QUEUE_SIZE", 3)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    release = threading.Event()
    with caplog.at_level(logging.WARNING, "opendeep_jax"):
        opened = Trackers({"slow": lambda: Service(lambda *_: release.wait(), lambda: None)})
        begun = time.monotonic()
        for step in range(1000):
            opened.log(step, "train", {"loss": 1.0})
        opened.close()
        assert time.monotonic() - begun < 5
    release.set()
    assert sum("records behind" in record.message for record in caplog.records) == 1
    assert sum("did not finish" in record.message for record in caplog.records) == 1


def test_a_service_that_failed_with_a_full_queue_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(trackers, "QUEUE_SIZE", 3)
    release = threading.Event()

    def opener():
        release.wait()
        raise OSError("no network")

    opened = Trackers({"bad": opener})
    for step in range(10):
        opened.log(step, "train", {"loss": 1.0})
    release.set()
    opened._threads[0]._thread.join()
    begun = time.monotonic()
    opened.close()
    assert time.monotonic() - begun < 5


def test_a_missing_package_is_refused_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'opendeep-jax\[mlflow\]'"):
        check_trackers(_config("mlflow"))
    with pytest.raises(ConfigError):
        open_trackers(_config("mlflow"), tmp_path)


def test_without_trackers_nothing_is_opened_or_written(tmp_path):
    opened = open_trackers(_config(), tmp_path)
    opened.log(1, "train", {"loss": 1.0})
    opened.close()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_of_ids_makes_a_new_run_and_no_failure(tmp_path):
    (tmp_path / trackers.RUN_IDS).write_text('{"wandb": ')
    assert trackers._run_id(tmp_path, "wandb", lambda: "new") == "new"
    assert trackers._run_id(tmp_path, "wandb", lambda: pytest.fail("made twice")) == "new"


def _two_starts(name, workdir):
    """A run that ends after step 2, and goes on from a checkpoint at step 1."""
    for steps in ((1, 2), (2, 3)):
        opened = open_trackers(_config(name), workdir)
        for step in steps:
            opened.log(step, "train", {"loss": 10.0 - step})
        opened.close()


@pytest.mark.filterwarnings("ignore")  # the packages' own
@pytest.mark.slow
def test_mlflow_goes_on_with_the_same_run(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db" if importlib.util.find_spec("alembic") else f"file://{tmp_path}/mlruns"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    _two_starts("mlflow", tmp_path)
    assert [record.message for record in caplog.records if "opendeep" in record.name] == []

    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.info.run_id == json.loads((tmp_path / trackers.RUN_IDS).read_text())["mlflow"]
    assert run.info.status == "FINISHED" and run.data.params["optimizer.kind"] == "adamw"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 9.0), (2, 8.0), (2, 8.0), (3, 7.0)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_wandb_without_a_login_keeps_its_files_in_the_work_directory(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    _two_starts("wandb", tmp_path)
    assert [record.message for record in caplog.records if "opendeep" in record.name] == []
    run_id = json.loads((tmp_path / trackers.RUN_IDS).read_text())["wandb"]
    assert {path.suffixes[-1] for path in tmp_path.glob(f"wandb/offline-run-*/run-{run_id}.wandb")} == {".wandb"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_trackio_goes_on_with_the_same_run(tmp_path, monkeypatch, caplog):
    utils = pytest.importorskip("trackio.utils")
    storage = pytest.importorskip("trackio.sqlite_storage")
    for module in (utils, storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    _two_starts("trackio", tmp_path)
    assert [record.message for record in caplog.records if "opendeep" in record.name] == []
    name = json.loads((tmp_path / trackers.RUN_IDS).read_text())["trackio"]
    logs = storage.SQLiteStorage.get_logs("tests", name)
    assert sorted((log["step"], log["train/loss"]) for log in logs) == [(1, 9.0), (2, 8.0), (2, 8.0), (3, 7.0)]
