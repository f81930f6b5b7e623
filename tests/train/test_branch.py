"""A branch begins with another run's checkpoint, weights and moments, and goes on with settings of its own."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from processes import tiny_config
from rich.console import Console
from small_models import DENSE, run_config

from opendeep_jax.checkpoint.files import flat, read_record, to_items
from opendeep_jax.checkpoint.tools import average, differences, open_arrays
from opendeep_jax.cli.main import main
from opendeep_jax.cli.train import check_start
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import diff, load_run_config, save_run_config
from opendeep_jax.config.overrides import resolve
from opendeep_jax.config.schema import CheckpointConfig, ParallelConfig
from opendeep_jax.jobs.watch import terminal as watch_terminal
from opendeep_jax.models.parameters import model_definition
from opendeep_jax.parallel.mesh import make_mesh
from opendeep_jax.record.files import checkpoint_steps, read_jsonl
from opendeep_jax.record.origin import read_imported_from, read_origin, write_imported_from, write_origin
from opendeep_jax.record.run_view import RunView
from opendeep_jax.record.skipped_batches import read_skipped_batches
from opendeep_jax.text.files import train_bpe
from opendeep_jax.train import branch, loop
from opendeep_jax.train.branch import STAGED, begin_branch, content_digest
from opendeep_jax.train.branch_state import plan_move
from opendeep_jax.train.feed import with_own_tokenizer
from opendeep_jax.train.optimizer import learning_rate_schedule, make_optimizer
from opendeep_jax.train.state import init_state


@pytest.fixture(scope="module")
def trunk(text_corpus, tmp_path_factory) -> Path:
    """The work directory of a finished run of 8 steps on one device, every other of which is saved."""
    directory = tmp_path_factory.mktemp("branches")
    config = tiny_config(text_corpus, directory / "data", steps=8)
    model = dataclasses.replace(config.model, num_layers=2, num_dense_layers=1, hidden_size=16, vocab_size=300)
    config = dataclasses.replace(
        config,
        model=model,
        parallel=ParallelConfig(fsdp=1),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=2),
        checkpoint=CheckpointConfig(every=2, keep=0),
    )
    with devices(1):
        loop.train(config, directory / "trunk")
    return directory / "trunk"


@contextlib.contextmanager
def devices(count: int):
    """Runs inside have so many devices."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (loop, branch):
            patch.setattr(module, "make_mesh", lambda parallel: make_mesh(parallel, jax.devices()[:count]))
        yield


@pytest.fixture(autouse=True)
def one_device():
    with devices(1):
        yield


def start(*arguments: str) -> tuple:
    """What `opendeep train` does before it trains; returns configuration and launch."""
    config, launch = resolve(arguments, trains=True)
    check_start(config, launch)
    if launch.parent:
        begin_branch(config, launch.recipe, launch.workdir, launch.parent)
    return config, launch


def train(*arguments: str) -> Path:
    config, launch = start(*arguments)
    loop.train(config, launch.workdir, recipe=launch.recipe)
    return Path(launch.workdir)


def losses(workdir) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_jsonl(workdir / "metrics.jsonl")}


def arrays(workdir, step) -> dict[str, str]:
    """The digest of every array of a checkpoint."""
    record = read_record(workdir / "checkpoints" / str(step))
    return {name: array["digest"] for name, array in record["arrays"].items()}


def test_a_branch_with_no_other_setting_is_its_parent_going_on_to_the_bit(trunk, tmp_path):
    parent = shutil.copytree(trunk, tmp_path / "trunk")
    command = f"--from={parent}@4", f"--workdir={tmp_path / 'branch'}"
    start(*command)
    shutil.rmtree(parent)  # the branch has all that it needs, and the same command goes on with it
    workdir = train(*command)
    assert arrays(workdir, 8) == arrays(trunk, 8)
    assert checkpoint_steps(workdir / "checkpoints") == [4, 6, 8]
    assert losses(workdir) == {step: loss for step, loss in losses(trunk).items() if step > 4}
    assert [entry for entry in diff(load_run_config(trunk), load_run_config(workdir)) if entry[0] != "name"] == []
    assert "Began with: branch of" in (workdir / "report.html").read_text()


def test_a_branch_on_other_devices_has_its_parents_losses_to_rounding(trunk, tmp_path):
    with devices(2):
        workdir = train(f"--from={trunk}@4", f"--workdir={tmp_path / 'branch'}", "--parallel.fsdp=2")
    np.testing.assert_allclose(list(losses(workdir).values()), list(losses(trunk).values())[4:], rtol=1e-5)
    assert arrays(workdir, 4) == arrays(trunk, 4)


def test_a_finished_run_goes_on_with_longer_rows_yarn_and_a_schedule_by_its_own_steps(trunk, tmp_path, capsys):
    settings = "--model.attention.rope.yarn_factor=2", "--data.sequence_length=64", "--train.steps=10"
    workdir = train(f"--from={trunk}", f"--workdir={tmp_path / 'branch'}", *settings, "--checkpoint.every=0")
    lines = read_jsonl(workdir / "metrics.jsonl")
    config = load_run_config(workdir)
    assert config.model.attention.rope.yarn_factor == 2
    rates = [float(config.optimizer.learning_rate * learning_rate_schedule(config)(step)) for step in (8, 9)]
    assert [line["step"] for line in lines] == [9, 10]
    np.testing.assert_allclose([line["learning_rate"] for line in lines], rates, rtol=1e-6)
    weights = {name: digest for name, digest in arrays(workdir, 8).items() if not name.startswith(".health")}
    assert weights.items() <= arrays(trunk, 8).items()
    said = capsys.readouterr().out
    assert "branch of" in said and "losses are judged anew" in said and "batches from step 9 on are those" in said
    assert f"learning rate of step 9: {rates[0]:.4g}" in said and "AdamW's moments are kept" in said
    assert "model.attention.rope.yarn_factor  1.0 -> 2.0" in said


@pytest.mark.parametrize(
    "settings",
    [
        "--optimizer.learning_rate=1e-3",
        "--optimizer.schedule=constant",
        "--optimizer.schedule=wsd --train.steps=16",
        "--optimizer.schedule=wsd --optimizer.decay_fraction=0.5",
        "--train.steps=16",
    ],
)
def test_the_schedule_of_a_branch_goes_by_the_runs_step_and_its_rate_is_said(settings, trunk, tmp_path, capsys):
    config, launch = start(f"--from={trunk}@4", f"--workdir={tmp_path / 'branch'}", *settings.split())
    rate = float(config.optimizer.learning_rate * learning_rate_schedule(config)(4))
    assert f"learning rate of step 5: {rate:.4g}; by the parent's schedule" in capsys.readouterr().out
    assert arrays(tmp_path / "branch", 4) == arrays(trunk, 4)


def test_lineage_is_recorded_and_shown(trunk, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "branch"
    monkeypatch.chdir(tmp_path)
    given = os.path.relpath(trunk)
    start(f"--from={given}@4", "--workdir=branch", "--optimizer.learning_rate=1e-3")
    origin = read_origin(workdir)
    assert (origin["kind"], origin["step"], origin["parent"]) == ("branch", 4, given)
    assert origin["parent_absolute"] == str(trunk.resolve())
    assert origin["differences"] == [["optimizer.learning_rate", 1e-2, 1e-3]]
    assert origin["parent_checkpoint"] == content_digest(read_record(workdir / "checkpoints" / "4"))
    assert (workdir / "config_diff.txt").read_text() == "optimizer.learning_rate  0.01 -> 0.001\n"
    capsys.readouterr()
    assert main(["checkpoints", "list", f"--workdir={workdir}"]) == 0
    assert f"began with: branch of {given} at step 4" in capsys.readouterr().out
    watched = RunView(workdir)
    watched.refresh()
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(watch_terminal.frame([watched], ["branch"], console))
    assert f"branch of {given} at step 4" in console.export_text()


def moments(workdir, step, of: str) -> dict[str, np.ndarray]:
    opened = open_arrays(workdir / "checkpoints" / str(step))
    return {name: array.read().result() for name, array in opened.items() if of in name}


def test_moments_are_cast_where_they_are_stored_otherwise_and_the_weights_stay(trunk, tmp_path, capsys):
    workdir = tmp_path / "branch"
    start(f"--from={trunk}@4", f"--workdir={workdir}", "--optimizer.first_moment_dtype=bfloat16")
    assert "AdamW's moments are kept, cast from float32 to bfloat16" in capsys.readouterr().out
    here, there = moments(workdir, 4, ".mu["), moments(trunk, 4, ".mu[")
    assert here.keys() == there.keys() and here
    for name, array in here.items():
        assert str(array.dtype) == "bfloat16"
        np.testing.assert_array_equal(array, there[name].astype(array.dtype))
    assert moments(workdir, 4, "params.").keys() == moments(trunk, 4, "params.").keys()
    assert [
        x for x in differences(workdir / "checkpoints" / "4", trunk / "checkpoints" / "4") if ".mu[" not in x.name
    ] == []


def test_another_optimizer_keeps_what_it_had_and_says_what_begins_anew(trunk, tmp_path, capsys):
    muon, back = tmp_path / "muon", tmp_path / "back"
    start(f"--from={trunk}@4", f"--workdir={muon}", "--optimizer.kind=muon")
    said = capsys.readouterr().out
    assert "AdamW's moments are kept" in said and "Muon's moments begin anew" in said
    (embedding,) = moments(muon, 4, ".nu['embed").values()
    np.testing.assert_array_equal(embedding, *moments(trunk, 4, ".nu['embed").values())
    assert not any(np.any(array) for array in moments(muon, 4, "['muon'].inner_state[0].mu").values())
    start(f"--from={muon}", f"--workdir={back}", "--optimizer.kind=adamw")
    assert "AdamW's moments begin anew" in capsys.readouterr().out
    assert not any(np.any(array) for array in moments(back, 4, ".opt_state[0]").values())
    names = [name for name in arrays(back, 4) if name.startswith(("params", "router_bias", ".health", ".step"))]
    assert {name: arrays(back, 4)[name] for name in names} == {name: arrays(trunk, 4)[name] for name in names}


def test_an_average_of_weights_can_be_trained_on_with_new_moments(trunk, tmp_path, capsys):
    average(trunk, [4, 6], tmp_path / "mean")
    start(f"--from={tmp_path / 'mean'}", f"--workdir={tmp_path / 'branch'}")
    assert "AdamW's moments begin anew" in capsys.readouterr().out
    assert checkpoint_steps(tmp_path / "branch" / "checkpoints") == [6]
    state = moments(tmp_path / "branch", 6, ".step")
    assert int(state[".step"]) == 6


class Killed(BaseException):
    """Nothing cleans up after it."""


def killed(*_, **__):
    raise Killed


@pytest.mark.parametrize(
    "at", ["make_state", "Writer.save", "save_run_config", "write_origin", "finish_branch", "replace"]
)
def test_killed_while_branching_the_same_command_does_the_rest_and_nothing_is_half_there(at, trunk, tmp_path):
    workdir, other = tmp_path / "branch", tmp_path / "other"
    command = f"--from={trunk}@4", f"--workdir={workdir}", "--optimizer.learning_rate=1e-3"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        if at == "Writer.save":
            patch.setattr(branch.Writer, "save", killed)
        elif at == "finish_branch":  # after origin.json is written
            write = branch.write_origin
            patch.setattr(branch, "write_origin", lambda *a, **k: [write(*a, **k), killed()])
        elif at == "replace":  # when the checkpoint is in its place, and nothing else
            replace = os.replace
            begun = []

            def counted(source, target):
                if STAGED in Path(source).parts and Path(target).parent.name != STAGED:
                    begun.append(target)
                    if len(begun) == 2:
                        raise Killed
                replace(source, target)

            patch.setattr(branch.os, "replace", counted)
        else:
            patch.setattr(branch, at, killed)
        start(*command)
    whole = at in ("finish_branch", "replace")
    assert (workdir / "origin.json").exists() == whole and not (workdir / "config.json").exists()
    assert checkpoint_steps(workdir / "checkpoints") == ([4] if at == "replace" else [])
    shutil.copytree(workdir, other)
    start(*command)
    assert arrays(workdir, 4) == arrays(trunk, 4) and not (workdir / STAGED).exists()
    assert load_run_config(workdir).optimizer.learning_rate == 1e-3
    # Another parent's command does not get this one's checkpoint.
    if whole:
        with pytest.raises(ConfigError, match=f"began as a branch of {trunk}@4"):
            start(f"--from={trunk}@6", f"--workdir={other}")
    else:
        start(f"--from={trunk}@6", f"--workdir={other}")
        assert checkpoint_steps(other / "checkpoints") == [6] and arrays(other, 6) == arrays(trunk, 6)


def test_what_is_left_of_a_branch_that_never_was_does_not_reach_another_run(trunk, tmp_path):
    workdir = tmp_path / "branch"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(branch, "write_origin", killed)
        start(f"--from={trunk}@4", f"--workdir={workdir}")
    assert (workdir / STAGED / "4").is_dir()
    loop._finish_branch(load_run_config(trunk), workdir)  # as every start of training does
    assert not (workdir / STAGED).exists() and not (workdir / "checkpoints").exists()


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as error:
        start(*arguments)
    return str(error.value)


REFUSALS = [
    ("{trunk}@5", "", "has no checkpoint of step 5; there are: 2, 4, 6, 8."),
    ("{trunk}@x", "", "after the @ comes the step of a checkpoint"),
    ("{trunk}@-1", "", "after the @ comes the step of a checkpoint"),
    ("{here}/nowhere", "", "no run can be read there"),
    ("{trunk}", "", "train.steps = 8 leaves none to do. Set --train.steps above 8"),
    ("{trunk}@6", "--train.steps=6", "Set --train.steps above 6"),
    ("{trunk}@6", "--train.steps=0 --train.total_tokens=1000", "Set --train.total_tokens above 1536"),
    ("{trunk}@4", "--model.hidden_size=32", "kv_down is [1, 32, 12] here and [1, 16, 12] there"),
    ("{trunk}@4", "--model.hidden_size=32", "model.hidden_size  16 -> 32"),
    ("{trunk}@4", "--model.num_layers=3 --model.mlp_size=48", "\n  model.num_layers  2 -> 3\n  model.mlp_size"),
    ("{trunk}@4", "--data.sources.0.path={here}/none/*.md", "Point the source's path to some text"),
    ("{trunk}@4", "--model.tie_embeddings=True", "params.head.kernel is only there"),
    ("{trunk}@4", "--model.mtp.depth=1", "is not there"),
    ("{trunk}@4", "--data.tokenizer=bpe:300", "Set it as it is there"),
]


@pytest.mark.parametrize("parent, settings, message", REFUSALS)
def test_what_no_branch_can_begin_with_is_refused_before_anything_is_compiled(
    parent, settings, message, trunk, tmp_path, monkeypatch
):
    monkeypatch.setattr(branch, "make_state", lambda *_: pytest.fail("reads the parent's arrays"))
    parent = parent.format(trunk=trunk, here=tmp_path)
    assert message in refused(
        f"--from={parent}", f"--workdir={tmp_path / 'branch'}", *settings.format(here=tmp_path).split()
    )
    assert not (tmp_path / "branch" / "config.json").exists()


def test_a_branch_needs_a_directory_of_its_own(trunk, tmp_path):
    assert "--workdir is missing" in refused(f"--from={trunk}@4")
    assert "Leave --from out" in refused(f"--from={trunk}@4", f"--workdir={trunk}")
    run = shutil.copytree(trunk, tmp_path / "run")
    assert "did not begin as a branch" in refused(f"--from={trunk}@4", f"--workdir={run}")
    start(f"--from={trunk}@4", f"--workdir={tmp_path / 'branch'}")
    for parent in (f"{trunk}@6", f"{run}@4"):
        assert f"began as a branch of {trunk}@4" in refused(f"--from={parent}", f"--workdir={tmp_path / 'branch'}")
    start(f"--from={trunk}", f"--workdir={tmp_path / 'branch'}")  # the step is that of its beginning
    said = refused(f"--from={trunk}@4", f"--workdir={tmp_path / 'branch'}", "--optimizer.learning_rate=1")
    assert "optimizer.learning_rate  0.01 -> 1.0" in said and "--workdir=NEW` goes on" in said
    assert f"Nothing has been trained there yet: delete {tmp_path / 'branch'}" in said


def test_a_damaged_parent_is_refused_with_its_other_checkpoints_and_none_is_taken_in_its_place(trunk, tmp_path):
    parent, workdir = shutil.copytree(trunk, tmp_path / "trunk"), tmp_path / "branch"
    largest = max(
        (parent / "checkpoints" / "8" / "model").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    said = refused(f"--from={parent}", f"--workdir={workdir}", "--train.steps=9")
    assert "the checkpoint of step 8 is not sound" in said and "there are: 2, 4, 6." in said
    (parent / "checkpoints" / "6" / "digests" / "metadata").write_text("{")
    assert "the checkpoint of step 6 is not sound" in refused(f"--from={parent}@6", f"--workdir={workdir}")
    assert not (workdir / "config.json").exists() and checkpoint_steps(workdir / "checkpoints") == []
    start(f"--from={parent}@4", f"--workdir={workdir}")


def test_a_parents_passed_over_batches_count_as_long_as_the_batches_are_the_same(trunk, tmp_path, capsys):
    parent = shutil.copytree(trunk, tmp_path / "trunk")
    windows = [{"first": first, "last": first + 1, "to_step": first - 1, "reason": "test"} for first in (4, 6)]
    (parent / "passed_over.json").write_text(json.dumps(windows))
    start(f"--from={parent}@4", f"--workdir={tmp_path / 'same'}", "--optimizer.learning_rate=1e-3")
    same = read_skipped_batches(tmp_path / "same")
    assert [(window["first"], window["last"], window["last_update"]) for window in same] == [(4, 5, -1), (6, 7, -1)]
    assert "its own order, and counts" not in capsys.readouterr().out
    start(f"--from={parent}@4", f"--workdir={tmp_path / 'other'}", "--seed=5")
    assert [(window["first"], window["last"]) for window in read_skipped_batches(tmp_path / "other")] == [(4, 4)]
    assert "what the parent skips is of its own order, and counts no more" in capsys.readouterr().out


def test_a_branch_reads_other_text_with_its_parents_tokenizer(trunk, tmp_path):
    parent, workdir = shutil.copytree(trunk, tmp_path / "trunk"), tmp_path / "branch"
    config = load_run_config(trunk)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="bpe:300"))
    save_run_config(config, config, parent)
    (parent / "data.json").unlink()
    (parent / "tokenizer.json").write_text(train_bpe(["import value\n" * 9], 264))
    (tmp_path / "other.md").write_text("import another\n")
    config, _ = start(f"--from={parent}@4", f"--workdir={workdir}", f"--data.sources.0.path={tmp_path}/*.md")
    assert config.data.tokenizer == "bpe:300"
    own = Path(with_own_tokenizer(config, workdir).data.tokenizer)
    assert own == workdir / "tokenizer.json" and own.read_text() == (parent / "tokenizer.json").read_text()
    same = f"--data.tokenizer={parent / 'tokenizer.json'}"
    start(f"--from={parent}@4", f"--workdir={tmp_path / 'named'}", same)
    assert with_own_tokenizer(load_run_config(parent), parent).data.tokenizer == "bpe:300"


def test_a_rule_added_later_keeps_its_moments_or_begins_anew_by_its_own_name():
    config = run_config(DENSE)
    template = jax.eval_shape(lambda: init_state(config, make_optimizer(config, model_definition(DENSE).axes())))
    saved = {
        name: {"shape": list(array.shape), "dtype": str(array.dtype)}
        for name, array in flat(to_items(template)).items()
    }
    later = SimpleNamespace(optimizer=SimpleNamespace(kind="later"))  # all that is read of it
    record = {"step": 3, "arrays": saved}
    said = [plan_move(record, there, later, template, keep_health=True).notes[0] for there in (later, config)]
    assert said[0] == "later's moments are kept" and said[1].startswith("later's moments begin anew")


def test_an_imported_run_is_branched_from_and_its_source_is_known_in_any_directory(trunk, tmp_path, monkeypatch):
    home = shutil.copytree(trunk, tmp_path / "tuned")
    config = load_run_config(home)
    own = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(home / "tokenizer.json")))
    save_run_config(own, own, home)
    (home / "tokenizer.json").write_text(train_bpe(["import value\n" * 9], 264))
    write_origin(home, "import")
    write_imported_from(home, {"source": "organization/model"})
    monkeypatch.chdir(tmp_path)
    start("--from=tuned@4", "--workdir=branch")
    assert checkpoint_steps(tmp_path / "branch" / "checkpoints") == [4]
    monkeypatch.chdir(tmp_path.parent)
    assert read_imported_from(tmp_path / "branch") == {"source": "organization/model"}
