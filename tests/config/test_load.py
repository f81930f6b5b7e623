"""Recipes load, configurations survive JSON, and a work directory keeps to one run."""

import collections
import dataclasses
import json
import shutil
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import (
    diff,
    format_diff,
    from_json,
    load_recipe,
    load_run_config,
    recipe_directory,
    recipe_names,
    recipe_title,
    save_run_config,
    to_json,
)
from opendeep_jax.config.schema import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RematConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from opendeep_jax.record.workdir import SMALLEST_FREE_BYTES, check_workdir

DiskUsage = collections.namedtuple("DiskUsage", "total used free")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_loads_by_name_and_by_path_and_survives_json(name):
    config = load_recipe(name)
    assert config == load_recipe(str(recipe_directory() / f"{name}.py"))
    assert from_json(to_json(config)) == config
    assert hash(from_json(to_json(config))) == hash(config)


def test_the_four_recipes_are_there():
    assert {"quickstart", "moe_1b", "deepseek_v2_lite", "deepseek_v3"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_what_it_is_in_a_lab_note(name):
    text = (recipe_directory() / f"{name}.py").read_text()
    note = text.split('"""')[1]
    of_a_run, of_a_corpus = ("Paper", "Hardware", "Time", "Expected"), ("Size", "License", "Citation", "Where")
    parts = of_a_corpus if name.startswith("corpora/") else of_a_run
    assert all(f"\n{part}:" in note for part in ("Command", *parts))
    words = note.split("Command:")[1].split()
    assert f"--config={name}" in [word.partition(":")[0] for word in words]


def test_v3_learns_in_the_phases_of_the_report():
    """Phases begin after warm-up; together they take 14.8T tokens, the cosine starting at 10T."""
    config = load_recipe("deepseek_v3")
    warmup = 2000 * 3072 * 4096
    ends = [warmup + sum(phase.tokens for phase in config.optimizer.phases[: k + 1]) for k in range(3)]
    assert ends == [10_000 * 10**9, 14_300 * 10**9, 14_633 * 10**9]
    assert config.train.total_tokens == 14_800 * 10**9
    rates = [round(phase.to * config.optimizer.learning_rate, 8) for phase in config.optimizer.phases]
    assert rates == [2.2e-4, 2.2e-5, 2.2e-5, 7.3e-6]
    assert sum(stage.tokens for stage in config.train.batch_ramp) == 469 * 10**9
    assert warmup <= config.train.batch_ramp[0].tokens  # the warm-up's batches are all of 3072 rows


def test_an_unknown_recipe_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"quikstart: .*Did you mean quickstart\? Recipes: .*moe_1b"):
        load_recipe("quikstart")


def test_a_recipe_of_a_family_takes_a_size():
    assert load_recipe("llama3:70b").model.num_layers == 80
    assert load_recipe("llama3:70B") == load_recipe("llama3:70b")
    assert load_recipe(f"{recipe_directory() / 'llama3.py'}:70b") == load_recipe("llama3:70b")
    assert load_recipe("llama3") == load_recipe("llama3:8b")


@pytest.mark.parametrize(
    "name, message",
    [
        ("llama3:9b", r"no size '9b'\. Did you mean 8b\? Sizes: 1b, 3b, 8b, 70b, 405b\."),
        ("llama3:", "no size ''"),
        ("llama3:8b:8b", "neither a recipe file nor the name of a recipe"),
        ("lama3:8b", r"--config=lama3:8b: .*Did you mean llama3\?"),
        ("quickstart:8b", "it has no sizes, and '8b' is asked for"),
    ],
)
def test_a_size_that_is_not_there_is_answered_with_those_that_are(name, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(name)


def test_a_path_with_a_colon_is_a_path(tmp_path):
    path = tmp_path / "a:b.py"
    shutil.copy(recipe_directory() / "quickstart.py", path)
    assert load_recipe(str(path)) == load_recipe("quickstart")


def test_a_recipe_has_a_title_that_is_a_directorys_name():
    names = ["llama3:8b", "qwen2_5:0.5B", "quickstart", "mine/run.py", "corpora/dolma3"]
    assert [recipe_title(name) for name in names] == ["llama3-8b", "qwen2_5-0.5b", "quickstart", "run", "dolma3"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\n", "must define get_config"),
        ("def get_config():\n    return {}\n", "must define get_config"),
        ("import nowhere_at_all\n", "line 1: ModuleNotFoundError"),
        ("def get_config(:\n", "SyntaxError"),
        (
            "from opendeep_jax.config.schema import MoEConfig\n\n"
            "def get_config():\n    return MoEConfig(expert_per_token=3)\n",
            "line 4: TypeError.*unexpected keyword argument 'expert_per_token'",
        ),
        (
            "from opendeep_jax.config.schema import RunConfig\n\ndef get_config():\n    return RunConfig(seed=-1)\n",
            r"recipe.py: seed = -1: must be from 0",
        ),
    ],
)
def test_a_recipe_that_fails_says_where_and_why(tmp_path, text, message):
    path = tmp_path / "recipe.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path))


sources = st.builds(
    SourceConfig, name=st.text(min_size=1).filter(str.strip), path=st.text(min_size=1), weight=st.floats(1e-6, 1e6)
)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rate=st.floats(1e-300, 1e3),
    prompts=st.lists(st.text()),
    mixture=st.lists(sources, min_size=1, max_size=3, unique_by=lambda source: source.name),
)
def test_any_configuration_survives_json_and_differs_by_what_was_changed(seed, rate, prompts, mixture):
    config = RunConfig(
        seed=seed,
        optimizer=OptimizerConfig(learning_rate=rate),
        train=TrainConfig(sample_prompts=tuple(prompts)),
        data=DataConfig(sources=tuple(mixture)),
    )
    assert from_json(to_json(config)) == config
    assert diff(config, config) == []
    changed = {name for name, _, _ in diff(RunConfig(), config)}
    assert ("seed" in changed) == (seed != 0)
    assert ("optimizer.learning_rate" in changed) == (rate != 3e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda values: values["model"]["moe"].update(expert_sizes=3), "no field model.moe.expert_sizes. Did you mean"),
        (lambda values: values.update(modle={}), "no field modle. Did you mean model"),
        (lambda values: values["model"].update(moe=3), "model.moe = 3 must be an object"),
        (lambda values: values["train"].update(steps="7"), "train.steps = '7': must be a whole number"),
        (lambda values: values["data"]["sources"][0].update(wieght=1), "no field data.sources.0.wieght"),
    ],
)
def test_json_with_what_the_schema_does_not_know_is_refused(change, message):
    values = json.loads(to_json(RunConfig()))
    change(values)
    with pytest.raises(ConfigError, match=message):
        from_json(json.dumps(values))


def test_truncated_json_is_refused_with_its_origin():
    with pytest.raises(ConfigError, match="runs/a/config.json: not JSON"):
        from_json(to_json(RunConfig())[:100], "runs/a/config.json")


def test_a_difference_reads_as_aligned_lines():
    a = RunConfig()
    b = dataclasses.replace(a, seed=7, data=DataConfig(sources=(SourceConfig(weight=2.0, license="PSF-2.0"),)))
    assert format_diff(diff(a, b)) == "seed                   0 -> 7\ndata.sources.0.weight  1.0 -> 2.0\n"


def test_a_tuple_that_grew_is_one_difference():
    b = RunConfig(data=DataConfig(sources=(SourceConfig(), SourceConfig(name="web", path="web"))))
    assert [name for name, _, _ in diff(RunConfig(), b)] == ["data.sources"]


def test_a_run_saves_its_configuration_and_how_it_differs_from_the_recipe(tmp_path):
    recipe = RunConfig()
    config = dataclasses.replace(recipe, seed=3)
    save_run_config(config, recipe, tmp_path)
    assert load_run_config(tmp_path) == config
    assert (tmp_path / "config_diff.txt").read_text() == "seed  0 -> 3\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "config_diff.txt"]


def test_saving_that_fails_leaves_the_old_configuration(tmp_path, monkeypatch):
    save_run_config(RunConfig(), RunConfig(), tmp_path)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="No space"):
        save_run_config(RunConfig(seed=1), RunConfig(), tmp_path)
    assert load_run_config(tmp_path) == RunConfig()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "config_diff.txt"]


def test_a_directory_without_a_run_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="no run can be read there.*opendeep train --workdir"):
        load_run_config(tmp_path)


def test_a_new_and_an_own_work_directory_are_accepted(tmp_path):
    check_workdir(RunConfig(), tmp_path / "a" / "b")
    save_run_config(RunConfig(), RunConfig(), tmp_path / "a" / "b")
    check_workdir(RunConfig(), tmp_path / "a" / "b")


def test_a_work_directory_of_another_run_is_refused_with_the_difference(tmp_path):
    save_run_config(RunConfig(), RunConfig(), tmp_path)
    with pytest.raises(ConfigError, match=r"another configuration.*\n  seed +0 -> 1\n.*another --workdir"):
        check_workdir(RunConfig(seed=1, train=TrainConfig(log_every=3)), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "another title"},
        {"train": TrainConfig(log_every=1, sample_every=5, compilation_cache="")},
        {"checkpoint": CheckpointConfig(every=7, keep=1)},
        {"evaluation": EvaluationConfig(every=9, batches=1)},
        {"data": DataConfig(directory="elsewhere")},
    ],
)
def test_fields_that_cannot_change_the_computed_run_may_change_on_resume(tmp_path, changes):
    save_run_config(RunConfig(), RunConfig(), tmp_path)
    check_workdir(dataclasses.replace(RunConfig(), **changes), tmp_path)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("parallel.fsdp -1 -> 2", {"parallel": ParallelConfig(fsdp=2)}),
        ("train.loss_chunk 1024 -> 64", {"train": TrainConfig(loss_chunk=64)}),
        ("train.accumulation_steps 1 -> 4", {"train": TrainConfig(accumulation_steps=4)}),
        ("model.remat.dense 'named' -> 'full'", {"model": ModelConfig(remat=RematConfig(dense="full"))}),
    ],
)
def test_what_changes_rounding_alone_may_change_on_resume_and_is_said(tmp_path, capsys, name, changes):
    save_run_config(RunConfig(), RunConfig(), tmp_path)
    check_workdir(RunConfig(), tmp_path)
    assert capsys.readouterr().out == ""
    check_workdir(dataclasses.replace(RunConfig(), **changes), tmp_path)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "may differ in rounding" in out and name in out
    with pytest.raises(ConfigError, match="another configuration"):
        check_workdir(dataclasses.replace(RunConfig(), seed=1, **changes), tmp_path)


def test_only_a_constant_schedule_lets_a_run_grow_longer(tmp_path):
    constant = RunConfig(optimizer=OptimizerConfig(schedule="constant"))
    longer = TrainConfig(steps=2000)
    save_run_config(constant, constant, tmp_path)
    check_workdir(dataclasses.replace(constant, train=longer), tmp_path)
    with pytest.raises(ConfigError, match="train.steps  1000 -> 500"):
        check_workdir(dataclasses.replace(constant, train=TrainConfig(steps=500)), tmp_path)
    cosine = RunConfig()
    save_run_config(cosine, cosine, tmp_path)
    with pytest.raises(ConfigError, match="train.steps  1000 -> 2000"):
        check_workdir(dataclasses.replace(cosine, train=longer), tmp_path)


def test_a_work_directory_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ConfigError, match="it is a file"):
        check_workdir(RunConfig(), path)
    with pytest.raises(ConfigError, match="cannot write there"):
        check_workdir(RunConfig(), path / "below")


def test_a_work_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def denied(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)  # the tests may run as root, who may write anywhere
    with pytest.raises(ConfigError, match=r"cannot write there \(Permission denied\)"):
        check_workdir(RunConfig(), tmp_path)


def test_a_full_disk_is_refused_with_what_is_free_and_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10**12, 10**12, SMALLEST_FREE_BYTES - 1))
    with pytest.raises(ConfigError, match="256 MiB are free on this disk, and a run needs 256 MiB"):
        check_workdir(RunConfig(), tmp_path)
