"""Faults made on purpose in real runs over eight devices: each is found, said, and costs nothing but time.

All runs have the same NaN gradients, which are part of the compiled step, so that they share one program.
"""

import dataclasses
import json
import shutil
import time
import types
from pathlib import Path

import pytest
from processes import tiny_config, write_recipe

from opendeep_jax.checkpoint import checkpoints as checkpoint
from opendeep_jax.checkpoint.tools import checkpoint_path, differences
from opendeep_jax.cli.main import main
from opendeep_jax.config import exits
from opendeep_jax.config.exits import MEND, OK, RESUME, STOPPED
from opendeep_jax.config.operations import DRILLS
from opendeep_jax.config.schema import CheckpointConfig, FaultsConfig, ParallelConfig
from opendeep_jax.record.events import read_events
from opendeep_jax.record.files import SKIPPED_BATCHES, checkpoint_steps, read_jsonl
from opendeep_jax.record.goodput import read_goodput
from opendeep_jax.record.skipped_batches import read_skipped_batches
from opendeep_jax.record.workdir import only_writer

STEPS, SAVED = 28, 4
NAN = ("nan_gradient@3", "nan_gradient@9-11")
SPIKE = ("loss_spike@24",)
TIMES = ("seconds", "first_step_seconds", "step_seconds", "data_seconds", "tokens_per_second", "mfu")


class Run:
    """A work directory, and `opendeep train` in it."""

    def __init__(self, recipe: Path, name: str):
        self.recipe, self.workdir, self.statuses = recipe, recipe.parent / name, []

    def train(self, *drills: str, **faults) -> int:
        flags = [f"--faults.{name}={value}" for name, value in faults.items()]
        flags += ["--faults.drill", *NAN, *drills]
        status = main(["train", f"--config={self.recipe}", f"--workdir={self.workdir}", *flags])
        self.statuses.append(status)
        return status

    def events(self, *kinds: str) -> list[dict]:
        return read_events(self.workdir, *kinds)

    def metrics(self) -> dict[int, dict]:
        """The lines of metrics.jsonl by step, without times."""
        lines = read_jsonl(self.workdir / "metrics.jsonl")
        return {line["step"]: {key: value for key, value in line.items() if key not in TIMES} for line in lines}


@pytest.fixture(scope="module")
def recipe(text_corpus, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("faults")
    config = tiny_config(text_corpus, directory / "data", steps=STEPS, log_every=2)
    config = dataclasses.replace(
        config,
        parallel=ParallelConfig(data=2),
        checkpoint=CheckpointConfig(every=SAVED, keep=0),
        faults=FaultsConfig(rollback_after=3, spike_zscore=1.5),
    )
    return write_recipe(config, directory / "recipe.py")


@pytest.fixture(scope="module")
def drilled(recipe) -> Run:
    """A run with everything that can befall it; its newest checkpoint is damaged while it is stopped."""
    run, clock = Run(recipe, "drilled"), time.time
    try:
        for _ in range(2):
            run.train("flipped_bit@18", "sigterm@22", "clock_jump@15", *SPIKE)
            if len(run.statuses) == 1:
                for file in (checkpoint_path(run.workdir, 22) / "optimizer").rglob("*"):
                    if file.is_file():  # not one byte of one file, which may be one that nobody reads
                        file.write_bytes(bytes(file.stat().st_size))
    finally:
        time.time = clock
    return run


@pytest.fixture(scope="module")
def calm(recipe) -> Run:
    """The run that leaves the same batches out from the start, and meets no other fault."""
    run = Run(recipe, "calm")
    run.workdir.mkdir()
    (run.workdir / SKIPPED_BATCHES).write_text(
        json.dumps([{"first": 9, "last": 12, "to_step": 8, "reason": "told so"}])
    )
    run.train(*SPIKE)
    return run


def check_same_end(one: Run, other: Run) -> None:
    assert differences(checkpoint_path(one.workdir), checkpoint_path(other.workdir)) == []
    assert checkpoint_steps(one.workdir / "checkpoints")[-1] == STEPS


def test_after_all_faults_a_run_ends_as_one_that_met_none(drilled, calm):
    assert drilled.statuses == [RESUME, OK] and calm.statuses == [OK]
    check_same_end(drilled, calm)
    ours, theirs = drilled.metrics(), calm.metrics()
    assert set(theirs) <= set(ours) and {step: ours[step] for step in theirs} == theirs
    assert list(ours) == sorted(ours)
    summaries = [json.loads((run.workdir / "summary.json").read_text()) for run in (drilled, calm)]
    assert summaries[0]["held_out_bits_per_byte"] == summaries[1]["held_out_bits_per_byte"]


def test_each_fault_is_an_event_in_the_order_it_was_met(drilled):
    kinds = [
        (event["kind"], event["step"])
        for event in drilled.events()
        if event["kind"] not in ("slow", "starved", "rewound")
    ]
    met = [pair for pair in kinds if pair[0] != "recovered_speed"]
    assert met == [
        ("non_finite", 3),
        ("non_finite", 9),
        ("non_finite", 10),
        ("non_finite", 11),
        ("rollback", 12),
        ("rollback", 20),
        ("preempted", 22),
        ("corrupt_checkpoint", 20),
        ("spike", 24),
    ]
    went_back = [*(event["to_step"] for event in drilled.events("rollback")), 20]
    assert [event["step"] for event in drilled.events("rewound")] == went_back


def test_a_nan_gradient_is_skipped_and_its_documents_named(drilled):
    event = drilled.events("non_finite")[0]
    assert event["skipped"] and event["grad_norm"] == "nan" and event["documents"]
    assert f"opendeep data where --workdir={drilled.workdir} --step=2" in event["text"]


def test_after_several_in_a_row_the_run_passes_over_their_batches(drilled):
    (window,) = read_skipped_batches(drilled.workdir)
    assert (window["first"], window["last"], window["to_step"]) == (9, 12, 8)
    assert not {9, 10, 11, 12} & drilled.metrics().keys()
    assert "3 updates in a row, from step 9 on" in drilled.events("rollback")[0]["text"]


def test_a_flipped_bit_is_found_before_it_is_saved_and_undone(drilled):
    event = drilled.events("rollback")[1]
    assert "silent corruption found before step 20 was saved" in event["text"]
    assert "device 7 of process 0" in event["text"]
    assert (event["to_step"], event["first"]) == (16, None)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(drilled):
    (event,) = drilled.events("corrupt_checkpoint")
    assert "The checkpoint of step 22 in " in event["text"] and "quarantine/22-" in event["text"]
    assert len(list((drilled.workdir / "quarantine").glob("22-*"))) == 1


def test_work_that_was_done_twice_is_waste(drilled, calm):
    assert read_goodput(drilled.workdir).starts == 2
    assert read_goodput(drilled.workdir).seconds["waste"] > read_goodput(calm.workdir).seconds["waste"] > 0


def test_a_spike_is_recorded_and_its_update_applied_by_default(calm):
    (event,) = calm.events("spike")
    assert (event["step"], event["skipped"]) == (24, False) and "Its update was applied." in event["text"]
    assert float(event["loss_zscore"]) > 1.5 and event["documents"]


@pytest.fixture(scope="module")
def went_back(recipe) -> Run:
    """A run that goes back for its spike; its disk was full for a while, from its first save on."""
    run, full = Run(recipe, "went_back"), types.SimpleNamespace(free=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "shutil", types.SimpleNamespace(disk_usage=lambda _: full))
        run.train(*SPIKE, spike_policy="rollback")
    run.train(*SPIKE, spike_policy="rollback")
    return run


@pytest.mark.slow
def test_a_full_disk_ends_the_run_until_there_is_space(went_back):
    assert went_back.statuses == [MEND, OK]  # where it ends is compared below
    assert read_goodput(went_back.workdir).starts == 2


@pytest.mark.slow
def test_going_back_for_a_spike_passes_over_its_batch_alone(went_back, drilled):
    assert [(w["first"], w["last"], w["to_step"]) for w in read_skipped_batches(went_back.workdir)] == [
        (9, 12, 8),
        (24, 24, 20),
    ]
    assert differences(checkpoint_path(went_back.workdir), checkpoint_path(drilled.workdir)) != []


@pytest.mark.slow
def test_an_update_that_is_skipped_on_the_device_leaves_what_passing_over_leaves(went_back, recipe):
    run = Run(recipe, "skipped")
    assert run.train(*SPIKE, spike_policy="skip") == OK
    (event,) = run.events("spike")
    assert event["skipped"] and "Its update was skipped." in event["text"]
    check_same_end(run, went_back)


@pytest.mark.slow
def test_a_run_that_goes_back_to_one_place_too_often_stops_and_goes_on_when_told_to(recipe, capsys):
    run = Run(recipe, "stopped")
    assert run.train(rollback_after=1, max_rollbacks=1) == STOPPED
    (event,) = run.events("stopped")
    assert "rolled back to the weights of step 8 once" in event["text"] and event["text"] in capsys.readouterr().err
    assert run.train(rollback_after=1, max_rollbacks=5) == OK
    assert checkpoint_steps(run.workdir / "checkpoints")[-1] == STEPS


def test_a_second_run_in_one_directory_is_refused_at_once(calm, capsys):
    before = {path: path.stat().st_mtime_ns for path in calm.workdir.rglob("*")}
    with only_writer(calm.workdir):
        assert calm.train() == MEND
    assert "another process is training there" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in calm.workdir.rglob("*")} == before


def test_a_run_without_a_sound_checkpoint_never_starts_anew(calm, capsys, tmp_path):
    run = Run(calm.recipe, "unsound")
    shutil.copytree(calm.workdir, run.workdir)
    (run.workdir / "summary.json").unlink()
    for step in checkpoint_steps(run.workdir / "checkpoints"):
        (run.workdir / "checkpoints" / str(step) / "digests" / "metadata").write_text("{}")
    lines = (run.workdir / "metrics.jsonl").read_bytes()
    assert run.train() == MEND and "none of its checkpoints is sound" in capsys.readouterr().err
    assert "none of its checkpoints is sound" in read_events(run.workdir, "corrupt_checkpoint")[-1]["text"]
    assert run.train() == MEND
    assert (run.workdir / "metrics.jsonl").read_bytes() == lines
    assert len(list((run.workdir / "quarantine").iterdir())) == STEPS // SAVED


@pytest.mark.slow
def test_a_run_whose_last_batches_are_passed_over_saves_its_last_step_all_the_same(calm):
    run = Run(calm.recipe, "tail")
    shutil.copytree(calm.workdir, run.workdir)
    (run.workdir / "summary.json").unlink()
    shutil.rmtree(run.workdir / "checkpoints" / str(STEPS))
    windows = [*read_skipped_batches(run.workdir), {"first": STEPS - 3, "last": STEPS, "to_step": STEPS - 4}]
    (run.workdir / SKIPPED_BATCHES).write_text(json.dumps(windows))
    assert run.train() == OK
    before, after = (checkpoint_path(run.workdir, step) for step in (STEPS - SAVED, STEPS))
    assert [difference.name for difference in differences(before, after)] == [".step"]
    assert list(run.metrics())[-1] == STEPS - SAVED
    assert json.loads((run.workdir / "summary.json").read_text())["steps"] == STEPS


def test_the_page_about_faults_names_every_setting_drill_status_and_event(drilled):
    page = (Path(__file__).parents[2] / "docs" / "faults.md").read_text(encoding="utf-8")
    settings = [f"`--faults.{field.name}" for field in dataclasses.fields(FaultsConfig)]
    kinds = DRILLS[1 : DRILLS.index(")")].split("|") + [event["kind"] for event in drilled.events()]
    statuses = [value for name, value in vars(exits).items() if name.isupper()]
    wanted = [*settings, *(f"`{kind}`" for kind in kinds), *(f"\n| {status} |" for status in statuses)]
    assert len(wanted) > 25 and [text for text in wanted if text not in page] == []
