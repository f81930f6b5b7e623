"""Variants of the families that few or no released models are, read as transformers computes them or refused."""

from dataclasses import replace

import pytest
from hf_directories import GOLDEN, family, raw_config

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import RopeConfig
from opendeep_jax.interop import config_from_hf, config_to_hf
from opendeep_jax.interop.hf_config import family_of
from opendeep_jax.models.accounting import count_parameters
from opendeep_jax.models.parameters import model_definition

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("scaling", "field"),
    [
        ({"rope_type": "linear", "factor": 2.5}, {"linear_factor": 2.5}),
        (LLAMA3 | {"original_max_position_embeddings": 64}, {"llama3_factor": 8.0, "llama3_original_length": 64}),
    ],
)
def test_latent_attention_may_be_stretched_as_other_attention_is(scaling, field):
    config = config_from_hf(raw_config(GOLDEN / "v3_yarn", rope_scaling=scaling))
    assert config.attention.rope == replace(RopeConfig(theta=config.attention.rope.theta), **field)
    assert config_to_hf(config)["rope_scaling"] == scaling


def test_version_2_may_have_biases_in_its_feed_forwards():
    config = config_from_hf(raw_config(GOLDEN / "v2_lite", mlp_bias=True))
    assert config.mlp_bias and family_of(config).model_type == "deepseek_v2"
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize("case", ["gemma3", "olmo3"])
@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "must have a set for 'full_attention'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "truncate = False"),
    ],
)
def test_a_rotation_that_transformers_passes_over_is_refused(case, rope, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(raw_config(family(case), **rope))


@pytest.mark.parametrize("case", ["gpt_oss", "gemma3", "olmo3"])
def test_a_model_without_sliding_layers_names_no_window_and_leaves_it_to_its_family(case):
    layers = raw_config(family(case))["num_hidden_layers"]
    config = config_from_hf(raw_config(family(case), layer_types=["full_attention"] * layers))
    written = config_to_hf(config)
    assert "sliding_window" not in written  # transformers' gpt-oss does not start where it is null
    assert config_from_hf(written) == config


def test_the_rope_theta_of_olmo_3_is_of_the_layers_that_see_all_and_written_so_that_transformers_finds_both():
    written = config_to_hf(config_from_hf(raw_config(family("olmo3"), rope_theta=10_000.0)))
    assert "rope_theta" not in written
    assert written["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 500_000.0}
    assert written["rope_parameters"]["full_attention"]["rope_theta"] == 10_000.0


@pytest.mark.parametrize("case", ["llama_biases", "nemotron_h_biases"])
def test_the_biases_of_feed_forwards_are_counted(case):
    config = config_from_hf(family(case))
    assert config.mlp_bias
    sizes = {name: array.size for name, array in model_definition(config).shapes().items()}
    assert count_parameters(config).total == sum(size for name, size in sizes.items() if "router_bias" not in name)


def test_a_temperature_below_one_is_read_and_written_as_it_is():
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "attention_factor": 0.7}
    config = config_from_hf(raw_config(family("llama3"), rope_scaling=scaling))
    assert config.attention.rope.yarn_mscale < 0
    assert config_to_hf(config)["rope_scaling"]["attention_factor"] == pytest.approx(0.7)
