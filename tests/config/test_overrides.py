"""The command line changes what it names, checks only the result, and answers mistakes with the fix."""

import dataclasses
import re

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import diff, load_recipe, save_run_config
from opendeep_jax.config.overrides import Launch, apply, resolve
from opendeep_jax.config.schema import DataConfig, DataPhase, RunConfig, SourceConfig
from opendeep_jax.config.source_paths import same_text
from opendeep_jax.record.workdir import check_workdir


def changed(*arguments: str) -> dict:
    """What `arguments` change about the quickstart recipe."""
    config, launch = resolve(["--config=quickstart", *arguments])
    return {name: value for name, _, value in diff(launch.recipe, config)}


def test_nothing_given_is_the_recipe_itself():
    config, launch = resolve(["--config=quickstart"])
    recipe = load_recipe("quickstart")
    assert config == recipe
    assert launch == Launch("quickstart", "runs/quickstart", -1, recipe, config="quickstart")


def test_flags_of_the_process_are_found_anywhere_between_the_overrides():
    arguments = ["--seed", "3", "--config", "quickstart", "--parallel.fsdp=-1", "--workdir=runs/a", "--verbosity=1"]
    config, launch = resolve(arguments)
    assert (config.seed, launch.workdir, launch.verbosity) == (3, "runs/a", 1)


def test_a_recipe_by_path_names_its_directory_after_the_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from opendeep_jax.config.schema import RunConfig\n\n\ndef get_config():\n    return RunConfig()\n")
    assert resolve([f"--config={path}"])[1].workdir == "runs/mine"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--optimizer.learning_rate=3e-4"], {"optimizer.learning_rate": 3e-4}),
        (["--optimizer.learning-rate=3e-4"], {"optimizer.learning_rate": 3e-4}),
        (["--model.tie_embeddings=true"], {"model.tie_embeddings": True}),
        (["--model.attention.rope.interleaved", "False"], {"model.attention.rope.interleaved": False}),
        (["--name=true"], {"name": "true"}),
        (["--train.compilation_cache="], {"train.compilation_cache": ""}),
        (["--train.sample_prompts", "a", "b c"], {"train.sample_prompts": ("a", "b c")}),
        (["--train.sample_prompts=a"], {"train.sample_prompts": ("a",)}),
        (["--data.sources.0.weight=2"], {"data.sources.0.weight": 2.0}),
        (["--seed=1", "--seed=2"], {"seed": 2}),
    ],
)
def test_an_override_changes_the_field_it_names_and_no_other(arguments, expected):
    assert changed(*arguments) == expected


@settings(max_examples=15, deadline=None)
@given(st.permutations(["num_experts=6", "num_groups=3", "groups_per_token=3", "experts_per_token=5"]))
def test_fields_that_only_fit_together_change_in_any_order(arguments):
    routing = apply(load_recipe("quickstart"), [f"--model.moe.{argument}" for argument in arguments]).model.moe
    assert (routing.num_experts, routing.num_groups, routing.experts_per_token) == (6, 3, 5)


@settings(max_examples=15, deadline=None)
@given(st.floats(min_value=1e-300, max_value=1e300), st.integers(0, 2**32 - 1))
def test_numbers_arrive_exactly(rate, seed):
    config = apply(RunConfig(), [f"--optimizer.learning_rate={rate!r}", f"--seed={seed}"])
    assert (config.optimizer.learning_rate, config.seed) == (rate, seed)


@pytest.mark.parametrize(
    "argument, answer",
    [
        ("--optimzer.learning_rate=1", "Did you mean --optimizer.learning_rate?"),
        ("--learning_rate=1", "Did you mean --optimizer.learning_rate?"),
        ("--model.expert_size=1", "Did you mean --model.moe.expert_size?"),
        ("--optimizer.lr=1", "Did you mean --optimizer.learning_rate?"),
        ("--sead=1", "Did you mean --seed?"),
        ("--work_dir=x", "Did you mean --workdir?"),
        ("--model.moe=1", "is a group of settings; set one of them, such as --model.moe.num_experts."),
        ("--optimizer.phases.0.tokens=1", "Entries of optimizer.phases are added in a recipe file"),
        ("--data.sources.3.weight=1", "A further one begins with its path: --data.sources.1.path=FILE"),
        ("--data.sources.3.path=a.txt", "A further one begins with its path: --data.sources.1.path=FILE"),
        ("--data.sources.0.wait=1", "Did you mean --data.sources.0.weight?"),
        ("--zzz.qqq=1", "there is no such setting. See --help"),
        ("--seed", "a value is missing; expected a whole number."),
        ("moe_1b", "settings are written --name=value. Did you mean --config=moe_1b?"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_one(argument, answer):
    with pytest.raises(ConfigError) as error:
        resolve(["--config=quickstart", argument])
    message = str(error.value)
    assert message.startswith(argument.partition("=")[0]) and answer in message, message
    assert len(message) < 400


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("--train.steps=1e3", "a whole number"),
        ("--seed=many", "a whole number"),
        ("--optimizer.learning_rate=fast", "a finite number"),
        ("--model.dtype=int8", "one of 'float32', 'bfloat16'"),
        ("--model.tie_embeddings=yes", "True or False"),
    ],
)
def test_a_wrong_type_is_answered_with_the_value_and_what_is_expected(argument, expected, capsys):
    with pytest.raises(ConfigError, match=re.escape(f"{argument}: expected {expected}.")):
        resolve(["--config=quickstart", argument])
    assert capsys.readouterr() == ("", "")


def test_several_wrong_values_are_answered_together():
    with pytest.raises(ConfigError) as error:
        resolve(["--config=quickstart", "--seed=x", "--name=fine", "--train.steps=y"])
    assert str(error.value).splitlines() == [
        "--seed=x: expected a whole number.",
        "--train.steps=y: expected a whole number.",
    ]


def test_contradictions_in_several_parts_are_reported_together():
    with pytest.raises(ConfigError) as error:
        resolve(["--config=quickstart", "--model.moe.num_experts=10", "--train.batch_size=0"])
    assert "model.moe.num_experts = 10" in str(error.value) and "train.batch_size = 0" in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--config is missing.*quickstart"),
        (["--confg=quickstart"], "--confg.*Did you mean --config"),
        (["--config"], "Missing value for flag --config"),
        (["--config=quickstart", "--verbosity=loud"], "--verbosity=loud"),
        (["--config=quikstart"], "Did you mean quickstart"),
    ],
)
def test_mistakes_in_the_flags_of_the_process_are_explained(arguments, message):
    with pytest.raises(ConfigError, match=message):
        resolve(arguments)


def test_nothing_global_remembers_a_command_line():
    before = set(flags.FLAGS)
    resolve(["--config=quickstart", "--workdir=a"])
    assert resolve(["--config=quickstart"])[1].workdir == "runs/quickstart"
    assert set(flags.FLAGS) == before


def test_help_shows_every_field_with_its_meaning_and_the_recipes_value(capsys):
    with pytest.raises(SystemExit) as end:
        resolve(["--help", "--config=quickstart"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    recipe = load_recipe("quickstart")
    for name in ("--config", "--workdir", "--verbosity", "--seed", "--data.sources.0.path"):
        assert f"{name} " in text
    for name in _scalars(recipe):
        assert f"--{name} " in text, name
    assert "Peak learning rate" in text and f"(default: {recipe.model.vocab_size})" in text


def _scalars(config, name=""):
    for field in dataclasses.fields(config):
        value, dotted = getattr(config, field.name), f"{name}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(value):
            yield from _scalars(value, dotted)
        elif not isinstance(value, tuple):
            yield dotted


@pytest.mark.parametrize(
    "arguments, title",
    [
        ([], "quickstart"),
        (["--workdir=runs/quickstart"], "quickstart"),
        (["--workdir=runs/mine"], "quickstart/mine"),
        (["--workdir=runs/mine/"], "quickstart/mine"),
        (["--workdir", "runs/mine", "--name=trial"], "trial"),
        (["--workdir=runs/mine", "--name", "quickstart"], "quickstart"),
        (["--workdir=sweeps/a/seed=0", "--name=quickstart/seed=0"], "quickstart/seed=0"),
    ],
)
def test_a_runs_title_tells_it_from_others_of_its_recipe(arguments, title):
    config, launch = resolve(["--config=quickstart", *arguments])
    assert config.name == title
    named = any("--name" in argument for argument in arguments)
    assert launch.recipe.name == ("quickstart" if named else title)
    assert named or launch.recipe == config  # a title that nobody gave is no difference from the recipe


def test_a_work_directory_alone_goes_on_with_its_own_configuration_and_its_recipes_differences(tmp_path):
    recipe = load_recipe("quickstart")
    ran = dataclasses.replace(recipe, seed=3)
    (tmp_path / "run").mkdir()
    save_run_config(ran, recipe, tmp_path / "run")
    config, launch = resolve([f"--workdir={tmp_path / 'run'}", "--train.log_every=7", "--seed=3"], trains=True)
    assert (config.seed, config.train.log_every, launch.recipe) == (3, 7, None)
    check_workdir(config, launch.workdir)
    save_run_config(config, launch.recipe, launch.workdir)
    lines = (tmp_path / "run" / "config_diff.txt").read_text().splitlines()
    assert lines == ["seed             0 -> 3", f"train.log_every  {recipe.train.log_every} -> 7"]
    back, _ = resolve([f"--workdir={tmp_path / 'run'}", f"--train.log_every={recipe.train.log_every}"], trains=True)
    save_run_config(back, None, launch.workdir)
    assert (tmp_path / "run" / "config_diff.txt").read_text() == "seed  0 -> 3\n"


@pytest.mark.parametrize("place", ["--workdir={}/run", "--from={}/run@5 --workdir={}/branch"])
def test_without_a_recipe_the_entries_of_the_runs_own_configuration_are_set_as_its_recipes_are(place, tmp_path):
    phases = DataPhase("a", tokens=10**6), DataPhase("b", sequence_length=128)
    recipe = load_recipe("quickstart")
    ran = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, phases=phases))
    (tmp_path / "run").mkdir()
    save_run_config(ran, recipe, tmp_path / "run")
    config, _ = resolve([*place.format(tmp_path, tmp_path).split(), "--data.phases.1.sequence_length=64"], trains=True)
    assert config.data.phases == (phases[0], DataPhase("b", sequence_length=64))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workdir={}/new"], r"--config is missing, and --workdir=.*/new holds no run to go on with. To start one"),
        (["--workdir={}/runn"], r"Did you mean run\?"),
        (["--workdir={}/run", "--seeed=1"], r"Did you mean --seed\?"),
        ([], "--config is missing: say what to run"),
        (["--from={}/run"], "--workdir is missing"),
        (["--from={}/nowhere", "--workdir={}/new"], "--from=.*/nowhere: no run can be read there"),
        (["--from={}/run@last", "--workdir={}/new"], "comes the step of a checkpoint"),
        (["--form={}/run", "--workdir={}/new"], r"Did you mean --from\?"),
        (["--config=quickstart", "--from=", "--workdir={}/new"], "--from=: it has no value"),
        (["--config=quickstart", "--from", "", "--workdir={}/new"], "--from=: it has no value"),
        (["--config=quickstart", "--workdir="], "--workdir=: it has no value"),
        (["--config=", "--workdir={}/run"], "--config=: it has no value"),
    ],
)
def test_what_can_be_neither_begun_nor_gone_on_with_is_said(arguments, message, tmp_path):
    config = load_recipe("quickstart")
    (tmp_path / "run").mkdir()
    save_run_config(config, config, tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        resolve([argument.format(tmp_path) for argument in arguments], trains=True)


def test_only_what_trains_in_a_directory_takes_its_configuration_or_branches(tmp_path):
    config = load_recipe("quickstart")
    save_run_config(config, config, tmp_path)
    with pytest.raises(ConfigError, match="--config is missing: say what to run"):
        resolve([f"--workdir={tmp_path}"], "opendeep plan")
    with pytest.raises(ConfigError, match="opendeep plan has no use for it"):
        resolve([f"--from={tmp_path}", f"--workdir={tmp_path}/new"], "opendeep plan")


def test_a_path_on_the_command_line_clears_what_belonged_to_the_old_text():
    old = SourceConfig("old", "old/*.jsonl", 2.0, "MIT", "A paper", text_field="body", id_field="id", epochs=3.0)
    recipe = dataclasses.replace(RunConfig(), data=DataConfig((old,)))
    for argument, expected in {
        "mine.jsonl": SourceConfig("mine", "mine.jsonl", 2.0, epochs=3.0),
        "old/part.jsonl": dataclasses.replace(old, path="old/part.jsonl"),
        "old/*.jsonl": old,
    }.items():
        for given_as in ([f"--data.sources.0.path={argument}"], ["--data.sources.0.path", argument]):
            assert apply(recipe, given_as).data.sources == (expected,)
    (found,) = apply(recipe, ["--data.sources.0.license=CC0-1.0", "--data.sources.0.path=x.txt"]).data.sources
    assert found == SourceConfig("x", "x.txt", 2.0, "CC0-1.0", epochs=3.0)
    (found,) = apply(RunConfig(), ["--data.sources.0.path=x.txt"]).data.sources
    assert found == SourceConfig("x", "x.txt")


def test_a_further_source_begins_with_its_path():
    arguments = ["--data.sources.2.path=b/mine.txt", "--data.sources.1.path=a/mine.txt", "--data.sources.1.weight=3"]
    assert apply(RunConfig(), arguments).data.sources == (
        *RunConfig().data.sources,
        SourceConfig("mine", "a/mine.txt", 3.0),
        SourceConfig("mine-2", "b/mine.txt"),
    )


@pytest.mark.parametrize(
    "old, new, same",
    [
        ("", "mine.jsonl", False),
        ("hf://datasets/o/n/data/*.parquet", "hf://datasets/o/n/sample/10BT/*.parquet", True),
        ("hf://datasets/o/n@main/*", "hf://datasets/o/other/*", False),
        ("datasets:o/n?split=train", "datasets:o/n?split=test", True),
        ("datasets:o/n", "datasets:o/m", False),
        ("data/*.jsonl", "./data/x/y.jsonl", True),
        ("data", "data/../other", False),
        ("data/a", "data/ab", False),
        ("*.jsonl", "mine.jsonl", False),
    ],
)
def test_the_same_text_is_told_by_its_path(old, new, same):
    assert same_text(old, new) == same
