"""DeepSeek-V2, V2-Lite, V3 and R1; Kimi K2 and Moonlight, which are V3 by architecture.

Training-only settings have no place in config.json and keep our defaults.
"""

from collections.abc import Mapping
from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ModelConfig, RopeConfig
from opendeep_jax.interop.hf_family import (
    EXPERTS,
    FEED_FORWARD,
    FIELDS,
    PRE_NORMS,
    Family,
    Raw,
    boolean,
    integer,
    number,
    require,
)
from opendeep_jax.interop.hf_rope import KEYS, parameters, read_rope, write_scaling

MOE_FIELDS = {
    "num_experts_per_tok": "moe.experts_per_token",
    "moe_intermediate_size": "moe.expert_size",
    "n_group": "moe.num_groups",
    "topk_group": "moe.groups_per_token",
    "norm_topk_prob": "moe.normalize_weights",
    "routed_scaling_factor": "moe.routed_scaling_factor",
}
# What a version's routing is, in our terms and in config.json's.
ROUTING = {
    "deepseek_v3": {
        "fields": {"moe.scoring": "sigmoid", "moe.group_score": "top2_sum", "moe.use_router_bias": True},
        "topk_methods": ("noaux_tc",),
    },
    "deepseek_v2": {
        "fields": {"moe.scoring": "softmax", "moe.group_score": "max", "moe.use_router_bias": False},
        "topk_methods": ("greedy", "group_limited_greedy"),
    },
}
BLOCK = (
    PRE_NORMS
    | FEED_FORWARD
    | EXPERTS
    | {
        "attention.q_proj": "self_attn.q_proj.weight",
        "attention.q_down": "self_attn.q_a_proj.weight",
        "attention.q_norm.scale": "self_attn.q_a_layernorm.weight",
        "attention.q_up": "self_attn.q_b_proj.weight",
        "attention.kv_down": "self_attn.kv_a_proj_with_mqa.weight",
        "attention.kv_norm.scale": "self_attn.kv_a_layernorm.weight",
        "attention.kv_up": "self_attn.kv_b_proj.weight",
        "attention.out": "self_attn.o_proj.weight",
        "moe.router_bias": "mlp.gate.e_score_correction_bias",
        "moe.shared.gate": "mlp.shared_experts.gate_proj.weight",
        "moe.shared.up": "mlp.shared_experts.up_proj.weight",
        "moe.shared.down": "mlp.shared_experts.down_proj.weight",
        "moe.shared.gate_bias": "mlp.shared_experts.gate_proj.bias",
        "moe.shared.up_bias": "mlp.shared_experts.up_proj.bias",
        "moe.shared.down_bias": "mlp.shared_experts.down_proj.bias",
    }
)


def config_from(raw: Raw) -> dict[str, Any]:
    """Routing, MTP depth and rotation."""
    if raw.get("num_key_value_heads", raw["num_attention_heads"]) != raw["num_attention_heads"]:
        raise ConfigError(
            f"num_key_value_heads = {raw['num_key_value_heads']}: latent attention has one key and value head for each "
            f"of the num_attention_heads = {raw['num_attention_heads']} query heads. Make the two equal."
        )
    rotated = integer(raw, "qk_rope_head_dim")
    derived = {
        "head_dim": rotated,
        "qk_head_dim": integer(raw, "qk_nope_head_dim") + rotated,
        "partial_rotary_factor": 1.0,
    }
    for key, value in derived.items():  # which transformers writes out; another value would be another rotation
        require(raw, key, value)
    depth = {"mtp.depth": raw.get("num_nextn_predict_layers") or raw.get("num_mtp_layers") or 0}
    return _read_routing(raw) | depth | _read_rope(raw) | {"mlp_bias": boolean(raw, "mlp_bias")}


def _read_routing(raw: Raw) -> dict[str, Any]:
    """Return the experts and how they are chosen, after checking that it is the version's own way."""
    model_type = raw["model_type"]
    routing = ROUTING[model_type]
    method = raw.get("topk_method", routing["topk_methods"][0])
    if method not in routing["topk_methods"]:
        allowed = " or ".join(routing["topk_methods"])
        raise ConfigError(f"topk_method = {method!r}: {model_type} chooses experts by {allowed}. Correct the key.")
    require(raw, "scoring_func", routing["fields"]["moe.scoring"])
    layers, dense = integer(raw, "num_hidden_layers"), raw.get("first_k_dense_replace", 0)
    experts = raw.get("n_routed_experts", 0)
    if not experts:
        if "moe_intermediate_size" in raw and (type(dense) is not int or dense < layers):
            raise ConfigError(f"{model_type} needs the keys n_routed_experts, which are missing. Add them.")
        return {"num_dense_layers": layers}
    if method == "greedy":  # looks at no groups, whatever the keys say
        raw = {**raw, "n_group": 1, "topk_group": 1}
    if model_type == "deepseek_v2":
        # DeepSeek's code normalizes when this is set, transformers ignores it: there is no right answer to give.
        require(raw, "norm_topk_prob", False)
        raw = {**raw, "norm_topk_prob": False}
    missing = [key for key in MOE_FIELDS if key not in raw]
    if missing:
        raise ConfigError(f"{model_type} needs the keys {', '.join(missing)}, which are missing. Add them.")
    return {
        **routing["fields"],
        **{field: raw[key] for key, field in MOE_FIELDS.items()},
        "num_dense_layers": dense,
        "moe.num_experts": experts,
        "moe.num_shared_experts": raw.get("n_shared_experts", 0),
    }


def _read_rope(raw: Raw) -> dict[str, Any]:
    """Rotation and YaRN. DeepSeek's temperature is in the softmax too, which no other family's is."""
    found = parameters(raw)
    if raw["model_type"] == "deepseek_v2":
        require(raw, "rope_interleave", True)
    interleaved = {"attention.rope.interleaved": raw.get("rope_interleave", True)}
    if found["rope_type"] != "yarn":
        require(found, "mscale_all_dim", 0)  # transformers would have it in the softmax for these kinds, too
        return interleaved | read_rope(raw)
    fields = {"theta": number(found, "rope_theta", raw.get("rope_theta", 10_000.0)), **_read_yarn(raw, found)}
    return interleaved | {f"attention.rope.{name}": value for name, value in fields.items()}


def _read_yarn(raw: Raw, found: Mapping[str, Any]) -> dict[str, Any]:
    if "factor" not in found:
        raise ConfigError("rope_scaling.factor = None: YaRN needs the factor of stretching. Add it.")
    for key, value in {"attention_factor": None, "partial_rotary_factor": 1.0, "truncate": True}.items():
        require(found, key, value)
    numerator, denominator = found.get("mscale") or 0.0, found.get("mscale_all_dim") or 0.0
    if bool(numerator) != bool(denominator):
        raise ConfigError(
            f"rope_scaling has mscale = {numerator} and mscale_all_dim = {denominator}: DeepSeek's code and "
            "transformers read this differently. Give both, as every released model does, or neither."
        )
    return {
        "yarn_factor": found["factor"],
        "yarn_original_length": found.get("original_max_position_embeddings", raw.get("max_position_embeddings")),
        "yarn_beta_fast": found.get("beta_fast") or 32.0,
        "yarn_beta_slow": found.get("beta_slow") or 1.0,
        "yarn_mscale": numerator or 1.0,
        "yarn_mscale_all_dim": denominator,
    }


def config_to(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """Return the keys that `config_from` reads, for one version."""
    moe = config.moe
    raw = {
        "num_key_value_heads": config.attention.num_heads,
        "num_nextn_predict_layers": config.mtp.depth,
        "q_lora_rank": config.attention.q_lora_rank or None,
        "mlp_bias": config.mlp_bias,
        "scoring_func": ROUTING[model_type]["fields"]["moe.scoring"],
        "topk_method": ROUTING[model_type]["topk_methods"][-1 if moe.num_groups > 1 else 0],
    }
    if not moe.num_experts:
        raw["first_k_dense_replace"] = config.num_layers + config.mtp.depth  # MTP modules count as layers here
    else:
        values = {"moe." + name: getattr(moe, name) for name in moe.__dataclass_fields__}
        raw |= {key: values[field] for key, field in MOE_FIELDS.items()}
        raw |= {
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.num_shared_experts,
            "first_k_dense_replace": config.num_dense_layers,
        }
    return raw | _write_rope(config.attention.rope)


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    raw = {"rope_theta": rope.theta, "rope_interleave": rope.interleaved, "rope_scaling": write_scaling(rope)}
    if rope.yarn_factor == 1:
        return raw
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
    return raw | {"rope_scaling": scaling}


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    fields=FIELDS
    | {
        "q_lora_rank": "attention.q_lora_rank",
        "kv_lora_rank": "attention.kv_lora_rank",
        "qk_nope_head_dim": "attention.qk_nope_head_dim",
        "qk_rope_head_dim": "attention.qk_rope_head_dim",
        "v_head_dim": "attention.v_head_dim",
    },
    defaults={
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "q_lora_rank": 0,
    },
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1},
    # DeepSeek's code gives the latents' norms this epsilon whatever rms_norm_eps says.
    implied={"attention.kind": "mla", "attention.latent_norm_epsilon": 1e-6},
    block=BLOCK,
    read=config_from,
    write=lambda config: config_to(config, "deepseek_v3"),
    understood=(
        "num_key_value_heads",
        "first_k_dense_replace",
        "n_routed_experts",
        "n_shared_experts",
        *MOE_FIELDS,
        "scoring_func",
        "topk_method",
        "num_nextn_predict_layers",
        "num_mtp_layers",
        "rope_interleave",
        "head_dim",
        "qk_head_dim",
        *KEYS,
    ),
    harmless=("aux_loss_alpha", "seq_aux", "ep_size"),
)
DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    fields=DEEPSEEK_V3.fields,
    defaults=DEEPSEEK_V3.defaults,
    fixed={key: value for key, value in DEEPSEEK_V3.fixed.items() if key != "mlp_bias"},
    implied=DEEPSEEK_V3.implied,
    block=BLOCK,
    read=config_from,
    write=lambda config: config_to(config, "deepseek_v2"),
    understood=(*DEEPSEEK_V3.understood, "mlp_bias"),
    harmless=DEEPSEEK_V3.harmless,
)
