"""Nemotron-H's config.json in all its spellings, and the published sizes."""

import dataclasses
import math

import numpy as np
import pytest
from hf_directories import arrays_of, assert_same_bits, changed_copy, expected, family, raw_config, tensors_of

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_recipe
from opendeep_jax.interop import config_from_hf, config_to_hf, load_hf
from opendeep_jax.models.accounting import count_parameters

CASE = family("nemotron_h")


def without(*keys: str, **changes) -> dict:
    return {key: value for key, value in (raw_config(CASE) | changes).items() if key not in keys}


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"]},
        {"layer_types": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"]},
    ],
)
def test_layers_are_read_by_any_of_their_names(changes):
    raw = without("hybrid_override_pattern", "num_hidden_layers", **changes)
    assert config_from_hf(raw) == config_from_hf(CASE)


def test_older_names_of_keys_are_read():
    older = {"mamba_n_groups": 3, "mamba_d_conv": 4, "mamba_chunk_size": 16, "mamba_conv_bias": True}
    raw = without("n_groups", "conv_kernel", "chunk_size", "use_conv_bias", "head_dim", attention_head_dim=7, **older)
    assert config_from_hf(raw) == config_from_hf(CASE)


def test_the_head_is_never_the_embedding_whatever_the_config_says():
    assert config_from_hf(without(tie_word_embeddings=True)) == config_from_hf(CASE)


def test_stale_keys_of_experts_change_nothing_where_no_layer_has_any():
    dense = raw_config(family("nemotron_h_dense"))
    stale = {"n_routed_experts": 8, "moe_latent_size": 64, "num_nextn_predict_layers": 1}
    assert config_from_hf(dense | stale) == config_from_hf(dense)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_override_pattern": "MX*-M"}, "hybrid_override_pattern = 'MX"),
        ({"hybrid_override_pattern": ""}, "must have a letter for each layer"),
        ({"hybrid_override_pattern": 5}, "must have a letter for each layer"),
        ({"hybrid_override_pattern": "ME*-"}, "num_hidden_layers = 5: the pattern of layers has 4"),
        ({"layers_block_type": ["mamba", "conv"]}, "layers_block_type"),
        ({"layers_block_type": [["mamba"]]}, "layers_block_type"),
        ({"moe_latent_size": 12}, "moe_latent_size = 12: experts of a latent"),
        ({"moe_shared_expert_intermediate_size": 0}, "moe_shared_expert_intermediate_size = 0"),
        ({"n_routed_experts": "many"}, "n_routed_experts = 'many'"),
        ({"mamba_num_heads": 7}, "mamba.num_heads = 7: must be a multiple of num_groups"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act = 'gelu'"),
        ({"use_bias": True}, "use_bias = True"),
        ({"sliding_window": 8}, "sliding_window = 8"),
        ({"time_step_limit": "nonsense"}, "time_step_limit = 'nonsense'"),
        ({"time_step_limit": [0.1]}, "time_step_limit = [0.1]"),
        ({"time_step_limit": [0.2, 0.1]}, "time_step_limit = [0.2, 0.1]"),
        ({"mamba_dt_limit": [-1.0, 0.1]}, "mamba_dt_limit = [-1.0, 0.1]"),
    ],
)
def test_what_cannot_be_read_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        config_from_hf(without(**changes))
    assert message in str(caught.value)


def test_names_as_transformers_has_them_in_memory_are_read_and_other_modules_passed_over(tmp_path):
    renamed = {name: None for name in tensors_of(CASE) if name.startswith("backbone.")}
    renamed |= {
        "model." + name.removeprefix("backbone."): array
        for name, array in tensors_of(CASE).items()
        if name.startswith("backbone.")
    }
    renamed["mtp.layers.0.eh_proj.weight"] = np.zeros((2, 2), np.float32)
    directory = changed_copy(CASE, tmp_path / "model", **renamed)
    assert_same_bits(arrays_of(load_hf(directory)), arrays_of(load_hf(CASE)))


def test_a_missing_state_is_named(tmp_path):
    directory = changed_copy(CASE, tmp_path / "model", **{"backbone.layers.4.mixer.A_log": None})
    with pytest.raises(ConfigError, match=r"1 missing: backbone.layers.4.mixer.A_log"):
        load_hf(directory)


def test_shared_experts_are_written_as_one_of_their_width():
    config = config_from_hf(CASE)
    several = dataclasses.replace(
        config, moe=dataclasses.replace(config.moe, num_shared_experts=3, shared_expert_size=6)
    )
    assert config_to_hf(several) == config_to_hf(config)


def test_a_hybrid_that_rotates_has_no_hub_form():
    config = config_from_hf(CASE)
    attention = dataclasses.replace(config.attention, rotated=True, head_dim=8)
    with pytest.raises(ConfigError, match="attention.rotated=True"):
        config_to_hf(dataclasses.replace(config, attention=attention))


@pytest.mark.parametrize(("bound", "without"), [("time_step_min", 0.0), ("time_step_max", 0.0)])
def test_each_bound_of_time_steps_is_at_work_in_the_golden_logits(bound, without):
    # Else a family member that leaves it out would pass unseen.
    case = family("nemotron_h_dense")
    mamba = config_from_hf(case).mamba
    assert (mamba.time_step_min, mamba.time_step_max) == (0.3, 1.0)
    tokens = expected(case)["tokens"][:1]
    unbounded = load_hf_with(case, **{bound: without})
    assert np.abs(np.asarray(load_hf(case)(tokens)) - np.asarray(unbounded(tokens))).max() > 1e-3


def test_time_steps_have_no_bound_where_config_json_names_none():
    mamba = config_from_hf(CASE).mamba
    assert (mamba.time_step_min, mamba.time_step_max) == (0.0, 0.0)
    assert config_to_hf(config_from_hf(CASE))["time_step_limit"] == [0.0, math.inf]
    as_transformers_writes_it = without(time_step_limit=[0.25, {"__float__": "Infinity"}])
    assert config_from_hf(as_transformers_writes_it).mamba.time_step_min == 0.25


def load_hf_with(case, **mamba):
    """The case's arrays in a model of other settings of Mamba-2."""
    from opendeep_jax.models.parameters import model_definition, split

    config = config_from_hf(case)
    _, params, router_bias = split(load_hf(case))
    changed = dataclasses.replace(config, mamba=dataclasses.replace(config.mamba, **mamba))
    return model_definition(changed).model(params, router_bias)


@pytest.mark.parametrize(
    ("size", "total", "active"),
    [
        ("8b", 8.1e9, 8.1e9),
        ("47b", 46.8e9, 46.8e9),
        ("56b", 56.3e9, 56.3e9),
        ("nano2_9b", 8.89e9, 8.89e9),
        ("nano2_12b", 12.31e9, 12.31e9),
        ("nano3_30b", 31.6e9, 3.6e9),
    ],
)
def test_recipes_have_the_published_sizes(size, total, active):
    config = load_recipe(f"nemotron_h:{size}").model
    count = count_parameters(config)
    assert count.total == pytest.approx(total, rel=2e-3)
    assert count.active == pytest.approx(active, rel=6e-3)
    assert config_from_hf(config_to_hf(config)).layer_pattern == config.layer_pattern
