"""config.json of all families: every key where it belongs, and no variant read as what it is not."""

import json
from dataclasses import replace

import pytest
from hf_directories import ALL, FAMILIES, GOLDEN, family, name_of, raw_config
from hypothesis import given
from hypothesis import strategies as st

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig
from opendeep_jax.interop import config_from_hf, config_to_hf
from opendeep_jax.interop.families import BY_MODEL_TYPE
from opendeep_jax.interop.hf_config import differences, family_of

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
    return raw_config(GOLDEN / "v3_yarn", **changes)


def test_deepseek_v2_lite_is_read_key_by_key():
    assert config_from_hf(V2_LITE) == ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_layers=27,
        num_dense_layers=1,
        mlp_size=10944,
        norm_epsilon=1e-6,
        context_length=163840,
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


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_a_config_survives_the_way_out_and_back(case):
    config = config_from_hf(case)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_what_is_written_is_what_was_read(case):
    original = raw_config(case)
    written = config_to_hf(config_from_hf(original))
    other_words = {"model_type"} if case.name == "kimi_k2" else set()
    if case.name in ("llama_tied", "olmo3", "qwen3_bias"):
        other_words.add("rope_scaling")  # "type" for "rope_type", or a default spelled out
    for key in written.keys() & original.keys() - other_words:
        assert written[key] == original[key], key


@pytest.mark.parametrize("case", FAMILIES, ids=name_of)
def test_what_transformers_5_writes_is_read_as_the_hubs_keys_are(case):
    assert config_from_hf(json.loads((case / "transformers.json").read_text())) == config_from_hf(case)


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_a_model_is_written_as_the_family_that_it_came_from(case):
    model_type = raw_config(case)["model_type"]
    assert family_of(config_from_hf(case)).model_type == {"kimi_k2": "deepseek_v3"}.get(model_type, model_type)


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
    assert not differences(config_from_hf(written), model)


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
        ({"model_type": "mamba"}, "model_type = 'mamba'.*deepseek_v3"),
        ({"model_type": None}, "model_type = None"),
        ({"model_type": ["deepseek_v3"]}, "model_type = "),
        ({"num_hidden_layers": "3"}, "num_hidden_layers = '3'"),
        ({"rope_theta": "large"}, "rope_theta = 'large'"),
        ({"attention_multiplier": 0.5}, "attention_multiplier = 0.5: no key of deepseek_v3"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method = 'awq'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 128]}}, "weight_block_size"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ({"num_experts_per_tok": 9}, "experts_per_token = 9"),
        ({"n_group": 3}, "num_groups, which is 3"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope type = 'dynamic'"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mscale_all_dim": 1.0}}, "mscale_all_dim = 1.0"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        (V2_LITE | {"rope_interleave": False}, "rope_interleave = False"),
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


def test_v2_with_normalized_weights_is_refused_because_its_readers_disagree():
    with pytest.raises(ConfigError, match="norm_topk_prob"):
        config_from_hf(V2_LITE | {"norm_topk_prob": True})


@pytest.mark.parametrize("keys", [("hidden_size", "vocab_size"), ("n_group", "topk_group")])
def test_every_missing_key_is_named(keys):
    config = v3()
    for key in keys:
        del config[key]
    with pytest.raises(ConfigError, match=", ".join(sorted(keys))) as error:
        config_from_hf(config)
    assert "missing" in str(error.value)


def test_a_moe_model_without_its_number_of_experts_is_not_taken_for_a_dense_one():
    config = v3()
    del config["n_routed_experts"]
    with pytest.raises(ConfigError, match="n_routed_experts"):
        config_from_hf(config)


LAYERS = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama3", {"mlp_bias": "yes"}, "mlp_bias = 'yes'"),
        ("llama3", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama3", {"rope_scaling": {"rope_type": "longrope"}}, "rope type = 'longrope'"),
        ("llama3", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor = None"),
        ("llama3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama3", {"head_dim": None, "hidden_size": 31}, "hidden_size = 31.*num_attention_heads = 6"),
        ("llama3", {"num_key_value_heads": 4}, "num_kv_heads, which is 4"),
        ("llama3", {"attention_bias": "yes"}, "attention_bias = 'yes'"),
        ("llama3", {"logits_scaling": 8.0}, "logits_scaling = 8.0"),
        ("qwen2", {"use_sliding_window": True, "layer_types": LAYERS}, "layer_types.*num_hidden_layers = 3"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["chunked"] * 3}, "layer_types"),
        ("qwen2_sliding", {"sliding_window": None}, "sliding_window = None"),
        ("qwen2_sliding", {"max_window_layers": "all"}, "max_window_layers = 'all'"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers = \\[1\\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts = 0"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gpt_oss", {"experts_per_token": 4}, "experts_per_token = 4"),
        ("gpt_oss", {"sliding_window": 0}, "sliding_window = 0"),
        ("nemotron", {"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5"),
        ("nemotron", {"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ("nemotron", {"norm_eps": None, "num_hidden_layers": -1}, "num_layers"),
    ],
)
def test_a_key_that_a_family_cannot_have_is_refused(case, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(raw_config(family(case), **changes))


def test_sliding_layers_with_a_stretch_of_their_own_are_refused():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    rope = {"sliding_attention": rope, "full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    with pytest.raises(ConfigError, match="sliding layers"):
        config_from_hf(raw_config(family("gemma3"), rope_parameters=rope, rope_scaling=None))


def test_the_rotation_of_sliding_layers_means_nothing_where_no_layer_slides():
    config = config_from_hf(raw_config(family("gemma3"), layer_types=["full_attention"] * 7))
    assert (config.attention.sliding_layers, config.attention.sliding_rope_theta) == ((), 0)


def test_a_gemma_that_sees_images_must_say_what_its_language_model_is():
    with pytest.raises(ConfigError, match="text_config"):
        config_from_hf({"model_type": "gemma3", "vision_config": {}})


def test_published_gemma_3_says_little_and_means_its_familys_defaults():
    published = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eoi_token_index": 256000,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152},
    }
    config = config_from_hf(published)
    attention = config.attention
    assert (config.vocab_size, config.max_length, config.tie_embeddings) == (262_208, 131_072, True)
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (8, 4, 256)
    assert (attention.query_scale, config.embedding_scale) == (1 / 16, 2560**0.5)
    assert (attention.rope.theta, attention.rope.linear_factor, attention.sliding_rope_theta) == (1e6, 8.0, 1e4)
    assert attention.window == 1024
    assert [layer for layer in range(34) if layer not in attention.sliding_layers] == [5, 11, 17, 23, 29]


def test_published_gpt_oss_is_read():
    raw = raw_config(family("gpt_oss_mxfp4"), head_dim=64, hidden_size=2880, num_hidden_layers=24, layer_types=None)
    raw |= {"num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4, "swiglu_limit": 7.0}
    raw |= {"initial_context_length": 4096, "rope_scaling": None, "rope_theta": 150_000, "sliding_window": 128}
    config = config_from_hf(raw)
    assert config.attention.rope == RopeConfig(
        theta=150_000,
        interleaved=False,
        yarn_factor=32.0,
        yarn_original_length=4096,
        yarn_mscale_all_dim=0.0,
        yarn_truncate=False,
    )
    assert config.attention.sliding_layers == tuple(range(0, 24, 2))


def test_a_temperature_of_yarn_that_is_not_the_usual_one_survives():
    scaling = raw_config(family("gpt_oss"))["rope_scaling"] | {"attention_factor": 1.25}
    raw = raw_config(family("gpt_oss"), rope_scaling=scaling)
    config = config_from_hf(raw)
    assert config.attention.rope.yarn_mscale == pytest.approx(0.25 / (0.1 * 1.3862943611))
    assert config_to_hf(config)["rope_scaling"]["attention_factor"] == pytest.approx(1.25)


PLAIN = ModelConfig(
    attention=AttentionConfig(kind="gqa", num_kv_heads=2, rope=RopeConfig(interleaved=False)), norm_epsilon=1e-5
)


def test_a_plain_model_of_our_own_is_written_as_llama():
    written = config_to_hf(PLAIN)
    assert (written["model_type"], written["rms_norm_eps"]) == ("llama", 1e-5)


@pytest.mark.parametrize(
    ("changes", "model_type"),
    [
        ({"attention": replace(PLAIN.attention, qkv_bias=True)}, "qwen2"),
        ({"attention": replace(PLAIN.attention, qk_norm="head")}, "qwen3"),
        ({"attention": replace(PLAIN.attention, sliding_layers=(2, 3), window=9, qkv_bias=True)}, "qwen2"),
        ({"attention": replace(PLAIN.attention, qk_norm="all_heads"), "norm_placement": "post"}, "olmo2"),
    ],
)
def test_what_a_model_has_chooses_its_family(changes, model_type):
    assert config_to_hf(replace(PLAIN, **changes))["model_type"] == model_type


@pytest.mark.parametrize(
    "content", [None, "{", "[]", b"\xff\xfe{}", "[" * 200_000, '{"a": ' * 100_000, '{"a": ' + "9" * 10_000 + "}"]
)
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
        ({"attention": replace(PLAIN.attention, sinks=True)}, "as llama it would lose attention.sinks=True"),
        ({"attention": replace(PLAIN.attention, qk_norm="all_heads")}, "attention.qk_norm='all_heads'"),
        ({"attention": AttentionConfig(kind="gqa")}, "attention.rope.interleaved=True"),
        ({"attention": AttentionConfig(latent_norm_epsilon=1e-5)}, "attention.latent_norm_epsilon=1e-05"),
        ({"gated_mlp": False}, "gated_mlp=False"),
        (
            {"attention": AttentionConfig(rope=RopeConfig(yarn_factor=4, yarn_mscale=0.7, yarn_mscale_all_dim=0))},
            "two ways",
        ),
        ({"moe": MoEConfig(num_experts=4, scoring="softmax", use_router_bias=True)}, "moe.scoring='softmax'"),
        ({"moe": MoEConfig(num_experts=8, num_groups=2, group_score="max")}, "moe.group_score='max'"),
    ],
)
def test_a_model_outside_all_families_has_no_config_json(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_to_hf(replace(ModelConfig(), **changes))


PROBES = ("nonsense", 0, 3, 0.123, True, False, ["sliding_attention"], {"factor": 2}, None)
# Keys that count only beside others.
BESIDE = (
    {},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
    {"head_dim": None},
    {"n_routed_experts": None},
    {"num_experts": None, "num_local_experts": 6},
)


def _read(raw: dict) -> ModelConfig | str:
    try:
        return config_from_hf(raw)
    except ConfigError:
        return "refused"


@pytest.mark.parametrize("model_type", sorted({raw_config(case)["model_type"] for case in ALL}))
def test_every_known_key_of_a_family_counts_or_is_listed_as_harmless(model_type):
    known = BY_MODEL_TYPE[model_type]
    raws = [raw_config(case) for case in ALL if raw_config(case)["model_type"] == model_type]
    raws = [raw | beside for raw in raws for beside in BESIDE]
    read = [(raw, _read(raw)) for raw in raws]
    for key in {*known.understood, *known.fields, *known.fixed}:
        assert any(_read(raw | {key: probe}) != config for raw, config in read for probe in PROBES), key
    for key in known.harmless:
        assert all(_read(raw | {key: probe}) == config for raw, config in read for probe in PROBES), key


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_an_unknown_key_is_refused_at_any_depth(case):
    for changes in ({"residual_gain": 2.0}, {"rope_scaling": {"type": "linear", "factor": 2.0, "finetuned_by": 3}}):
        assert _read(raw_config(case) | changes) == "refused", changes
