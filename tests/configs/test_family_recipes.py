"""Recipes of the released families are those very models, and can be trained as they are."""

import pytest
from hub_settings import HUB, PARAMETERS

from opendeep_jax.config.checks import check_devices
from opendeep_jax.config.load import load_recipe, recipe_directory
from opendeep_jax.interop import config_from_hf
from opendeep_jax.interop.hf_config import differences
from opendeep_jax.models.accounting import count_parameters

FAMILIES = sorted({name.partition(":")[0] for name in HUB})


def sizes_of(family: str) -> dict:
    """The recipe's table."""
    names: dict = {}
    exec((recipe_directory() / f"{family}.py").read_text("utf-8"), names)
    return names["SIZES"]


@pytest.mark.parametrize("name", HUB)
def test_a_recipe_is_the_released_model(name):
    assert differences(load_recipe(name).model, config_from_hf(HUB[name])) == []


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_has_as_many_parameters_as_transformers_counts(name):
    assert count_parameters(load_recipe(name).model).total == PARAMETERS[name]


def test_the_counts_are_those_of_the_released_files():
    """Of models whose pages state the exact number; a tied head and routers' biases are in some of the files too."""
    stated = {
        "llama3:8b": 8_030_261_248,
        "llama3:70b": 70_553_706_496,
        "smollm2:135m": 134_515_008,
        "qwen2_5:7b": 7_615_616_512,
        "qwen3:0.6b": 751_632_384 - 151_936 * 1024,
        "qwen3:30b-a3b": 30_532_122_624,
        "gemma3:1b": 999_885_952,
        "gemma3:270m": 268_098_176,
        "olmo2:7b": 7_298_617_344,
        "gpt_oss:20b": 20_914_757_184,
        "gpt_oss:120b": 116_829_156_672,
        "deepseek:v2": 235_741_434_880,
        "deepseek:v3": 671_026_419_200 - 58 * 256,
    }
    assert {name: PARAMETERS[name] for name in stated} == stated


@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_is_checked_here_and_its_run_fits_eight_devices(family):
    sizes = sizes_of(family)
    assert {f"{family}:{size}" for size in sizes} == {name for name in HUB if name.startswith(f"{family}:")}
    assert load_recipe(family) in [load_recipe(f"{family}:{size}") for size in sizes]
    for size in sizes:
        config = load_recipe(f"{family}:{size}")
        check_devices(config, 8)
        assert config.name == f"{family}-{size}"
