import dataclasses
import math

import pytest
from small_models import run_config

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_recipe, recipe_names
from opendeep_jax.config.overrides import apply
from opendeep_jax.jobs.sweep.axes import combinations, parse_axes, run_name
from opendeep_jax.jobs.sweep.recipe import recipe_source

RATE, EXPERTS = "optimizer.learning_rate", "model.moe.experts_per_token"


def _axes(method="grid", **settings):
    return parse_axes(run_config(), {name.replace("__", "."): text for name, text in settings.items()}, method)


def _two(method, rates, experts):
    return parse_axes(run_config(), {RATE: rates, EXPERTS: experts}, method)


def test_a_grid_has_every_combination_the_last_axis_fastest():
    found = combinations(_two("grid", "1e-4,3e-4", "2,4,8"), "grid", 0)
    assert [tuple(one.values()) for one in found] == [
        ("1e-4", "2"), ("1e-4", "4"), ("1e-4", "8"), ("3e-4", "2"), ("3e-4", "4"), ("3e-4", "8")
    ]  # fmt: skip


def test_zip_goes_along_all_lists_at_once():
    found = combinations(_two("zip", "1e-4,3e-4", "2,4"), "zip", 0)
    assert found == [{RATE: "1e-4", EXPERTS: "2"}, {RATE: "3e-4", EXPERTS: "4"}]
    with pytest.raises(ConfigError, match="learning_rate has 2, .*experts_per_token has 3"):
        combinations(_two("zip", "1e-4,3e-4", "1,2,4"), "zip", 0)


def test_a_larger_random_search_begins_with_the_smaller_one_and_repeats_nothing():
    axes = _two("random", "1e-4:1e-2:log", "1:3")
    few, many = combinations(axes, "random", 5), combinations(axes, "random", 40)
    assert many[:5] == few
    assert len({tuple(one.values()) for one in many}) == 40
    assert combinations(axes, "random", 5, seed=1) != few


def test_random_draws_stay_inside_their_ranges_and_reach_both_ends():
    drawn = combinations(_axes("random", train__loss_chunk="1:9:log", optimizer__beta1="0.81234:0.9"), "random", 300)
    chunks = [int(one["train.loss_chunk"]) for one in drawn]
    assert set(chunks) == set(range(1, 10))
    assert sum(chunk <= 3 for chunk in chunks) > 150  # half of the logarithmic way
    assert all(0.81234 <= float(one["optimizer.beta1"]) <= 0.9 for one in drawn)
    rates = [math.log10(float(one[RATE])) for one in combinations(_two("random", "1e-4:1e-2:log", "2"), "random", 200)]
    assert -4 <= min(rates) < -3.8 and -2.2 < max(rates) <= -2 and 70 < sum(rate < -3 for rate in rates) < 130


def test_more_trials_than_combinations_are_refused():
    with pytest.raises(ConfigError, match="more than 6 combinations"):
        combinations(_two("random", "1e-4,3e-4", "1:3"), "random", 7)


@pytest.mark.parametrize(
    "text", ["2:", ":8", "8:2", "2:2", "2:8:linear", "2:8:log:log", "0:8:log", "a:b", "2.5:8", "2:inf", "-1:4:log"]
)
def test_a_range_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="Write it as 2:8"):
        _axes("random", model__moe__experts_per_token=text)


@pytest.mark.parametrize(
    "field, text, message",
    [
        (RATE, "1e-4:1e-2", "takes lists"),
        (RATE, "1e-4,,3e-4", "a value is missing"),
        (RATE, "", "a value is missing"),
        (RATE, "1e-4,1e-4", "more than once"),
        ("optimizer.learning_rat", "1", "Did you mean --optimizer.learning_rate"),
        ("model.moe", "1", "is a group of settings"),
        ("learning_rate", "1", "Did you mean --optimizer.learning_rate"),
        ("seed", "1,2", "--seeds=3"),
        ("name", "a,b", "names its runs itself"),
        ("model.remat.moe", "full:none", None),
    ],
)
def test_settings_that_cannot_be_swept_are_refused_and_explained(field, text, message):
    if message is None:  # a colon in a text's value is no range
        assert parse_axes(run_config(), {field: text}, "grid")[0].values == (text,)
        return
    with pytest.raises(ConfigError, match=message):
        parse_axes(run_config(), {field: text}, "grid")


def test_no_axis_at_all_is_refused():
    with pytest.raises(ConfigError, match="one setting or more"):
        parse_axes(run_config(), {}, "grid")


def test_a_run_is_named_by_what_tells_it_from_the_others():
    axes = _two("grid", "1e-4", "2")
    config = apply(run_config(), [f"--{RATE}=3.0e-4", f"--{EXPERTS}=2", "--seed=7"])
    assert run_name(config, axes) == "learning_rate=0.0003,experts_per_token=2,seed=7"


def test_axes_with_one_last_name_get_longer_aliases():
    axes = _axes(model__remat__dense="none,full", model__remat__moe="none,full", model__attention__kind="mla",
                 optimizer__kind="adamw,muon")  # fmt: skip
    assert [axis.alias for axis in axes] == ["dense", "moe", "attention.kind", "optimizer.kind"]


def test_names_are_safe_for_a_file_system_and_still_differ():
    axes = _axes(data__directory="a/b,a_b,a b")
    base = run_config()
    names = {
        run_name(dataclasses.replace(base, data=dataclasses.replace(base.data, directory=value)), axes)
        for value in ("a/b", "a_b", "a b", "../..", "x" * 500, "x" * 501, "ä")
    }
    assert len(names) == 7
    assert all(len(name) < 200 and not set(name) & set('/\\ :*?"<>|') and not name.startswith(".") for name in names)


def test_elements_of_a_tuple_are_divided_by_spaces_and_commas_can_be_escaped():
    (axis,) = _axes(train__sample_prompts="import def,class,a\\,b")
    assert axis.values == ("import def", "class", "a,b")
    assert apply(run_config(), axis.arguments("import def")).train.sample_prompts == ("import", "def")


@pytest.mark.parametrize("name", [name for name in recipe_names()])
def test_a_written_recipe_gives_back_its_configuration(name, tmp_path):
    config = load_recipe(name)
    path = tmp_path / "best.py"
    path.write_text(recipe_source(config, 'Says """this""" and C:\\that.', named=[RATE]), encoding="utf-8")
    assert load_recipe(str(path)) == config
    assert "learning_rate=" in path.read_text(encoding="utf-8")
