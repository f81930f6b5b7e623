"""config.json of the DeepSeek family: every key where it belongs, and no variant read as what it is not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig
from opendeep_jax.interop import config_from_hf, config_to_hf

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}


def v3(**changes) -> dict:
    return json.loads((GOLDEN / "v3_yarn" / "config.json").read_text()) | changes


def test_deepseek_v2_lite_is_read_key_by_key():
    assert config_from_hf(V2_LITE) == ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_layers=27,
        num_dense_layers=1,
        mlp_size=10944,
        norm_epsilon=1e-6,
        init_std=0.02,
        dtype="bfloat16",
        attention=AttentionConfig(
            num_heads=16,
            q_lora_rank=0,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope=RopeConfig(yarn_factor=40, yarn_mscale=0.707, yarn_mscale_all_dim=0.707),
        ),
        moe=MoEConfig(
            num_experts=64,
            experts_per_token=6,
            num_shared_experts=2,
            expert_size=1408,
            scoring="softmax",
            normalize_weights=False,
            group_score="max",
            use_router_bias=False,
        ),
    )


@pytest.mark.parametrize("case", CASES)
def test_a_config_survives_the_way_out_and_back(case):
    config = config_from_hf(GOLDEN / case)
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_was_read(case):
    original = json.loads((GOLDEN / case / "config.json").read_text())
    written = config_to_hf(config_from_hf(original))
    assert {key: written[key] for key in written.keys() & original.keys()} == {
        key: original[key] for key in written.keys() & original.keys()
    }


heads = st.integers(1, 4)
models = st.builds(
    lambda dense, experts, kept, **fields: ModelConfig(
        num_layers=3,
        num_dense_layers=dense,
        moe=MoEConfig(num_experts=8 * experts, num_groups=4, groups_per_token=kept, normalize_weights=False, **fields),
        mtp=MTPConfig(depth=min(dense, experts)),
    ),
    dense=st.integers(0, 3),
    experts=st.integers(1, 2),
    kept=st.integers(1, 4),
    routed_scaling_factor=st.floats(0.5, 16),
    num_shared_experts=st.integers(0, 2),
)


@given(models, st.booleans())
def test_any_model_of_the_family_survives_the_way_out_and_back(model, softmax):
    if softmax:
        moe = replace(model.moe, scoring="softmax", group_score="max", use_router_bias=False)
        model = replace(model, moe=moe)
    written = json.loads(json.dumps(config_to_hf(model)))
    assert replace(config_from_hf(written), init_std=model.init_std) == model


def test_a_dense_model_survives_the_way_out_and_back():
    dense = config_from_hf(config_to_hf(ModelConfig(num_layers=2)))
    assert (dense.moe.num_experts, dense.num_leading_dense_layers, dense.num_moe_layers) == (0, 2, 0)


def test_the_keys_of_transformers_5_are_read_too():
    hub = v3()
    new = {key: value for key, value in hub.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    scaling = {key: value for key, value in hub["rope_scaling"].items() if key != "type"}
    new["rope_parameters"] = scaling | {"rope_type": "yarn", "rope_theta": hub["rope_theta"]}
    new["dtype"] = "float32"
    new["num_mtp_layers"] = new.pop("num_nextn_predict_layers")
    assert config_from_hf(new) == config_from_hf(hub)


def test_yarn_without_mscales_turns_the_whole_temperature_into_the_rotation():
    scaling = {key: value for key, value in YARN.items() if "mscale" not in key}
    rope = config_from_hf(v3(rope_scaling=scaling)).attention.rope
    assert (rope.yarn_mscale, rope.yarn_mscale_all_dim) == (1.0, 0.0)


def test_greedy_choice_looks_at_no_groups():
    moe = config_from_hf(V2_LITE | {"n_group": 8, "topk_group": 3}).moe
    assert (moe.num_groups, moe.groups_per_token) == (1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama'.*deepseek_v3"),
        ({"model_type": None}, "model_type = None"),
        ({"model_type": ["deepseek_v3"]}, "model_type = "),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05"),
        ({"num_hidden_layers": "3"}, "num_layers = '3'"),
        ({"rope_theta": None}, "theta = None"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ({"num_experts_per_tok": 9}, "experts_per_token = 9"),
        ({"n_group": 3}, "num_groups, which is 3"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type = 'linear'"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn'"),
        ({"rope_scaling": {"type": "yarn"}}, "factor"),
        ({"rope_scaling": YARN | {"mscale_all_dim": 0}}, "mscale_all_dim = 0"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate"),
        ({"rope_scaling": YARN | {"attention_factor": 2.0}}, "attention_factor"),
    ],
)
def test_a_variant_that_cannot_be_read_is_refused_by_its_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(v3(**changes))


def test_v2_with_normalised_weights_is_refused_because_its_readers_disagree():
    with pytest.raises(ConfigError, match="norm_topk_prob"):
        config_from_hf(V2_LITE | {"norm_topk_prob": True})


def test_every_missing_key_is_named():
    config = v3()
    del config["hidden_size"], config["n_group"]
    with pytest.raises(ConfigError, match="hidden_size, n_group"):
        config_from_hf(config)


@pytest.mark.parametrize("content", [None, "{", "[]", b"\xff\xfe{}"])
def test_an_unreadable_config_json_is_refused_by_its_path(tmp_path, content):
    path = tmp_path / "config.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="config.json"):
        config_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": AttentionConfig(kind="gqa")}, "gqa"),
        ({"norm_epsilon": 1e-5}, "norm_epsilon = 1e-05"),
        (
            {"attention": AttentionConfig(rope=RopeConfig(yarn_factor=4, yarn_mscale=0.7, yarn_mscale_all_dim=0))},
            "two ways",
        ),
        ({"moe": MoEConfig(num_experts=4, scoring="softmax", use_router_bias=True)}, "use_router_bias=True"),
        ({"moe": MoEConfig(num_experts=8, num_groups=2, group_score="max")}, "group_score='max'"),
    ],
)
def test_a_model_outside_the_family_has_no_config_json(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_to_hf(replace(ModelConfig(), **changes))
