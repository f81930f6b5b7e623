"""Hugging Face's config.json of the DeepSeek-V2/V3 family and our ModelConfig, both ways.

Reads the hub's keys (rope_theta, rope_scaling, torch_dtype) and those that transformers 5 writes (rope_parameters,
dtype); writes the hub's, which both understand. Training-only settings have no place in config.json and keep our
defaults.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig

# Hub key -> field of the named part of ModelConfig ("" is ModelConfig itself).
FIELDS = {
    "vocab_size": ("", "vocab_size"),
    "hidden_size": ("", "hidden_size"),
    "num_hidden_layers": ("", "num_layers"),
    "first_k_dense_replace": ("", "num_dense_layers"),
    "intermediate_size": ("", "mlp_size"),
    "rms_norm_eps": ("", "norm_epsilon"),
    "num_attention_heads": ("attention", "num_heads"),
    "q_lora_rank": ("attention", "q_lora_rank"),
    "kv_lora_rank": ("attention", "kv_lora_rank"),
    "qk_nope_head_dim": ("attention", "qk_nope_head_dim"),
    "qk_rope_head_dim": ("attention", "qk_rope_head_dim"),
    "v_head_dim": ("attention", "v_head_dim"),
    "n_routed_experts": ("moe", "num_experts"),
    "num_experts_per_tok": ("moe", "experts_per_token"),
    "n_shared_experts": ("moe", "num_shared_experts"),
    "moe_intermediate_size": ("moe", "expert_size"),
    "n_group": ("moe", "num_groups"),
    "topk_group": ("moe", "groups_per_token"),
    "norm_topk_prob": ("moe", "normalize_weights"),
    "routed_scaling_factor": ("moe", "routed_scaling_factor"),
}
MOE_KEYS = [key for key, (part, _) in FIELDS.items() if part == "moe"]
# What a family's routing is, in our terms and in config.json's.
FAMILIES = {
    "deepseek_v3": {
        "architecture": "DeepseekV3ForCausalLM",
        "moe": {"scoring": "sigmoid", "group_score": "top2_sum", "use_router_bias": True},
        "topk_methods": ("noaux_tc",),
    },
    "deepseek_v2": {
        "architecture": "DeepseekV2ForCausalLM",
        "moe": {"scoring": "softmax", "group_score": "max", "use_router_bias": False},
        "topk_methods": ("greedy", "group_limited_greedy"),
    },
}
# Variants of the family that no released model uses and our decoder does not have; absent means the value here.
# The epsilon: DeepSeek's code gives the latents' norms 1e-6 whatever rms_norm_eps says, ours has one for all.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1, "rms_norm_eps": 1e-6}
FIXED_ROPE = {"attention_factor": None, "partial_rotary_factor": 1.0, "truncate": True}


def config_from_hf(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig that a DeepSeek-V2/V3 config.json describes, in the dtype it names (bfloat16 if none).

    Args:
        source: A directory with a config.json, or its contents as a mapping.

    Raises:
        ConfigError: no readable config.json, another model family, a missing key, or keys that contradict each other.
    """
    if isinstance(source, Mapping):
        return _model_config(source)
    path = Path(source) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist. Name a directory with a Hugging Face config.json and *.safetensors files."
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a JSON {type(raw).__name__}, not an object of settings. Download it again.")
    try:
        return _model_config(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _model_config(raw: Mapping[str, Any]) -> ModelConfig:
    model_type = raw.get("model_type")
    if model_type not in tuple(FAMILIES):
        raise ConfigError(
            f"model_type = {model_type!r}: must be one of {', '.join(FAMILIES)}. No other family is read yet."
        )
    raw = _with_implied_keys(raw, model_type)
    missing = [key for key in FIELDS if key not in raw]
    if missing:
        raise ConfigError(f"{model_type} needs the keys {', '.join(missing)}, which are missing. Add them.")
    for key, value in FIXED.items():
        _require(raw, key, value)
    if raw.get("num_key_value_heads") not in (None, raw["num_attention_heads"]):
        raise ConfigError(
            f"num_key_value_heads = {raw['num_key_value_heads']}: latent attention has one key and value head for each "
            f"of the num_attention_heads = {raw['num_attention_heads']} query heads. Make the two equal."
        )
    parts: dict[str, dict[str, Any]] = {"": {}, "attention": {}, "moe": dict(FAMILIES[model_type]["moe"])}
    for key, (part, field) in FIELDS.items():
        parts[part][field] = raw[key]
    if not parts["moe"]["num_experts"]:
        parts["moe"] = {"num_experts": 0}
    rope = _rope_config(raw)
    return ModelConfig(
        **parts[""],
        init_std=raw.get("initializer_range", 0.02),
        tie_embeddings=raw.get("tie_word_embeddings", False),
        dtype=_dtype(raw),
        attention=AttentionConfig(kind="mla", rope=rope, **parts["attention"]),
        moe=MoEConfig(**parts["moe"]),
        mtp=MTPConfig(depth=raw.get("num_nextn_predict_layers") or raw.get("num_mtp_layers") or 0),
    )


def _with_implied_keys(raw: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The settings with nulls and family defaults spelled out, after checking that the routing is the family's own."""
    raw = dict(raw)
    family = FAMILIES[model_type]
    method = raw.get("topk_method", family["topk_methods"][0])
    if method not in family["topk_methods"]:
        allowed = " or ".join(family["topk_methods"])
        raise ConfigError(f"topk_method = {method!r}: {model_type} chooses experts by {allowed}. Correct the key.")
    _require(raw, "scoring_func", family["moe"]["scoring"])
    if method == "greedy":  # looks at no groups, whatever the keys say
        raw |= {"n_group": 1, "topk_group": 1}
    if model_type == "deepseek_v2":
        # DeepSeek's code normalises when this is set, transformers ignores it: there is no right answer to give.
        _require(raw, "norm_topk_prob", False)
        raw["norm_topk_prob"] = False
    if "q_lora_rank" in raw:
        raw["q_lora_rank"] = raw["q_lora_rank"] or 0
    if "n_shared_experts" in raw:
        raw["n_shared_experts"] = raw["n_shared_experts"] or 0
    if raw.get("n_routed_experts") is None and _has_no_moe_layer(raw):
        raw = dict.fromkeys(MOE_KEYS, 0) | raw
        raw |= {"n_routed_experts": 0, "first_k_dense_replace": raw.get("num_hidden_layers")}
    return raw


def _has_no_moe_layer(raw: Mapping[str, Any]) -> bool:
    layers, dense = raw.get("num_hidden_layers"), raw.get("first_k_dense_replace")
    return "n_routed_experts" in raw or (isinstance(layers, int) and isinstance(dense, int) and dense >= layers)


def _require(raw: Mapping[str, Any], key: str, value: Any) -> None:
    """Raises ConfigError if the key is there with another value."""
    if raw.get(key, value) != value:
        raise ConfigError(f"{key} = {raw[key]!r}: only {value!r} can be read. This variant is not implemented here.")


def _dtype(raw: Mapping[str, Any]) -> str:
    """Compute dtype; float16 weights are read into bfloat16's wider range."""
    name = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    return "float32" if name in ("float32", "float64") else "bfloat16"


def _rope_config(raw: Mapping[str, Any]) -> RopeConfig:
    """Rotation and YaRN from rope_theta and rope_scaling, or from rope_parameters, which holds both."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"rope_scaling = {scaling!r}: must be an object of settings, or null for plain rotation.")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    longest = raw.get("max_position_embeddings", 4096)
    plain = {
        "theta": scaling.get("rope_theta", raw.get("rope_theta", 10_000.0)),
        "interleaved": raw.get("rope_interleave", True),
    }
    if kind == "default":
        return RopeConfig(**plain, yarn_original_length=longest)
    if kind != "yarn":
        raise ConfigError(
            f"rope type = {kind!r}: must be 'yarn' or 'default'. No released DeepSeek model uses another."
        )
    if not isinstance(scaling.get("factor"), int | float):
        raise ConfigError(
            f"rope_scaling.factor = {scaling.get('factor')!r}: YaRN needs the factor of stretching. Add it."
        )
    for key, value in FIXED_ROPE.items():
        _require(scaling, key, value)
    numerator, denominator = scaling.get("mscale") or 0.0, scaling.get("mscale_all_dim") or 0.0
    if bool(numerator) != bool(denominator):
        raise ConfigError(
            f"rope_scaling has mscale = {numerator} and mscale_all_dim = {denominator}: DeepSeek's code and "
            "transformers read this differently. Give both, as every released model does, or neither."
        )
    return RopeConfig(
        **plain,
        yarn_factor=scaling["factor"],
        yarn_original_length=scaling.get("original_max_position_embeddings", longest),
        yarn_beta_fast=scaling.get("beta_fast") or 32.0,
        yarn_beta_slow=scaling.get("beta_slow") or 1.0,
        yarn_mscale=numerator or 1.0,
        yarn_mscale_all_dim=denominator,
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The hub's config.json for a model.

    Raises:
        ConfigError: no DeepSeek family describes the model (grouped-query attention, or routing that mixes V2 and V3).
    """
    moe = config.moe
    if config.attention.kind != "mla":
        raise ConfigError(
            f"model.attention.kind = {config.attention.kind!r}: only 'mla' can be written in DeepSeek's format so far."
        )
    if config.norm_epsilon != FIXED["rms_norm_eps"]:
        raise ConfigError(
            f"model.norm_epsilon = {config.norm_epsilon}: must be {FIXED['rms_norm_eps']} in DeepSeek's format, whose "
            "latent norms have that epsilon always. A model trained with another has no Hugging Face form."
        )
    model_type = _family_of(moe)
    parts = {"": config, "attention": config.attention, "moe": moe}
    raw: dict[str, Any] = {"architectures": [FAMILIES[model_type]["architecture"]], "model_type": model_type}
    raw |= {key: getattr(parts[part], field) for key, (part, field) in FIELDS.items()}
    raw |= FIXED
    raw |= {
        "num_key_value_heads": config.attention.num_heads,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.dtype,
        "num_nextn_predict_layers": config.mtp.depth,
        "q_lora_rank": config.attention.q_lora_rank or None,
        "scoring_func": FAMILIES[model_type]["moe"]["scoring"],
        "topk_method": FAMILIES[model_type]["topk_methods"][-1 if moe.num_groups > 1 else 0],
    }
    if not moe.num_experts:
        raw = {key: value for key, value in raw.items() if key not in MOE_KEYS}
        raw["first_k_dense_replace"] = config.num_layers + config.mtp.depth  # MTP modules count as layers here
    return raw | _rope_to_hf(config.attention.rope)


def _family_of(moe: MoEConfig) -> str:
    """The family whose routing this is. A sigmoid router without bias is V3's with a bias of zero."""
    one_group = moe.num_groups == 1
    if not moe.num_experts or (moe.scoring == "sigmoid" and (one_group or moe.group_score == "top2_sum")):
        return "deepseek_v3"
    v2_router = moe.scoring == "softmax" and not moe.use_router_bias and not moe.normalize_weights
    if v2_router and (one_group or moe.group_score == "max"):
        return "deepseek_v2"
    raise ConfigError(
        f"model.moe has scoring={moe.scoring!r}, group_score={moe.group_score!r}, "
        f"use_router_bias={moe.use_router_bias}, normalize_weights={moe.normalize_weights}: DeepSeek's formats know "
        "sigmoid scores with top2_sum (V3), or softmax scores with max, no bias and no normalisation (V2). "
        "Such a model has no Hugging Face form."
    )


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    raw = {"rope_theta": rope.theta, "rope_interleave": rope.interleaved, "rope_scaling": None}
    if rope.yarn_factor == 1:
        return raw | {"max_position_embeddings": rope.yarn_original_length}
    scaling = {
        "type": "yarn",
        "factor": rope.yarn_factor,
        "original_max_position_embeddings": rope.yarn_original_length,
        "beta_fast": rope.yarn_beta_fast,
        "beta_slow": rope.yarn_beta_slow,
        "mscale": rope.yarn_mscale,
        "mscale_all_dim": rope.yarn_mscale_all_dim,
    }
    if bool(rope.yarn_mscale) != bool(rope.yarn_mscale_all_dim) and rope.yarn_mscale != 1:
        raise ConfigError(
            f"model.attention.rope has yarn_mscale={rope.yarn_mscale} and "
            f"yarn_mscale_all_dim={rope.yarn_mscale_all_dim}: config.json is read in two ways unless both or neither "
            "are set. Such a model has no Hugging Face form."
        )
    if not rope.yarn_mscale_all_dim:
        del scaling["mscale"], scaling["mscale_all_dim"]
    return raw | {
        "max_position_embeddings": int(rope.yarn_factor * rope.yarn_original_length),
        "rope_scaling": scaling,
    }
