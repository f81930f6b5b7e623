"""Nemotron-H, Nemotron Nano 2 and 3: hybrids of Mamba-2, attention without rotation, squared ReLU and experts.

Time steps are bounded by time_step_limit, as NVIDIA's own code, vLLM and llama.cpp have it. Transformers bounds them by
time_step_min instead (0.001 in published files) where it computes a text at once, and not at all where it takes single
tokens in; the difference is in the fifth digit.
"""

import math
from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.interop.hf_family import FIELDS, Family, Fused, Raw, boolean, integer, read_heads, write_heads

HEAD_DIM = 128
LETTERS = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "mlp": "-",
    "moe": "E",
}
"""Names of the layers in layers_block_type, by transformers 5 and before it."""

MAMBA_FIELDS = {
    "mamba_num_heads": "mamba.num_heads",
    "mamba_head_dim": "mamba.head_dim",
    "ssm_state_size": "mamba.state_size",
    "n_groups": "mamba.num_groups",
    "conv_kernel": "mamba.conv_kernel",
    "use_conv_bias": "mamba.conv_bias",
    "chunk_size": "mamba.chunk_size",
}
OLDER_NAMES = {
    "mamba_n_groups": "mamba.num_groups",
    "mamba_d_conv": "mamba.conv_kernel",
    "mamba_conv_bias": "mamba.conv_bias",
    "mamba_chunk_size": "mamba.chunk_size",
}
"""Keys that stand for one of MAMBA_FIELDS."""
MOE_FIELDS = {
    "n_routed_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.experts_per_token",
    "moe_intermediate_size": "moe.expert_size",
    "moe_shared_expert_intermediate_size": "moe.shared_expert_size",
    "n_group": "moe.num_groups",
    "topk_group": "moe.groups_per_token",
    "norm_topk_prob": "moe.normalize_weights",
    "routed_scaling_factor": "moe.routed_scaling_factor",
}
ELSEWHERE = ("rms_norm_eps", "num_hidden_layers", "tie_word_embeddings")
"""Keys that mean something else here, or nothing: transformers gives every model of the family a head of its own."""
MOE_DEFAULTS = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0}


def _pattern(raw: Raw) -> str:
    """Return the layers' letters, which three keys may hold."""
    kinds = raw.get("layers_block_type", raw.get("layer_types"))
    if kinds is None:
        pattern = raw.get("hybrid_override_pattern")
        if not isinstance(pattern, str) or not pattern or set(pattern) - set("M*-E"):
            shown = repr(pattern)[:100]
            raise ConfigError(
                f"hybrid_override_pattern = {shown}: must have a letter for each layer, M, *, - or E. Correct the key."
            )
        return pattern
    if not isinstance(kinds, list) or not kinds or not all(isinstance(k, str) and k in LETTERS for k in kinds):
        raise ConfigError(
            f"layers_block_type = {repr(kinds)[:100]}: must list {', '.join(LETTERS)} for each layer. Correct the key."
        )
    return "".join(LETTERS[kind] for kind in kinds)


def config_from(raw: Raw) -> dict[str, Any]:
    """Layers and their kinds, heads, and the experts of layers that have any."""
    pattern = _pattern(raw)
    layers = raw.get("num_hidden_layers", len(pattern))
    if layers != len(pattern):
        raise ConfigError(
            f"num_hidden_layers = {layers!r}: the pattern of layers has {len(pattern)} of them. Correct the two keys."
        )
    if "head_dim" not in raw and "attention_head_dim" in raw:
        raw = {**raw, "head_dim": raw["attention_head_dim"]}
    fields = {"layer_pattern": pattern, "num_layers": len(pattern), "mlp_bias": boolean(raw, "mlp_bias")}
    fields |= read_heads(raw, HEAD_DIM)
    fields |= {field: raw[key] for key, field in OLDER_NAMES.items() if key in raw} | _time_steps_from(raw)
    return fields | (_experts_from(raw) if "E" in pattern else {})


def _time_steps_from(raw: Raw) -> dict[str, Any]:
    """Read the bounds of time steps."""
    key = "mamba_dt_limit" if "mamba_dt_limit" in raw else "time_step_limit"
    limit = raw.get(key, [0.0, math.inf])
    numbers = isinstance(limit, list | tuple) and len(limit) == 2 and all(type(x) in (int, float) for x in limit)
    if not numbers or not 0 <= limit[0] < limit[1]:
        raise ConfigError(
            f"{key} = {limit!r}: must be two numbers, the shortest time step and a longer longest one (Infinity for no "
            "bound). Correct the key."
        )
    low, high = limit
    return {"mamba.time_step_min": float(low), "mamba.time_step_max": 0.0 if math.isinf(high) else float(high)}


def _experts_from(raw: Raw) -> dict[str, Any]:
    """Return the number of experts and their routing, as in DeepSeek-V3."""
    if "moe_latent_size" in raw:
        raise ConfigError(
            f"moe_latent_size = {raw['moe_latent_size']!r}: experts of a latent (Nemotron 3 Super and Ultra) can't be "
            "read. This variant is not implemented here."
        )
    raw = MOE_DEFAULTS | dict(raw)
    if "num_local_experts" in raw:
        raw.setdefault("n_routed_experts", raw["num_local_experts"])
    missing = [key for key in MOE_FIELDS if key not in raw]
    if missing:
        raise ConfigError(f"nemotron_h needs the keys {', '.join(missing)}, which are missing. Add them.")
    for key in ("n_routed_experts", "moe_shared_expert_intermediate_size"):
        integer(raw, key)
    # The shared experts are as wide together as their key says, however many n_shared_experts counts.
    return {field: raw[key] for key, field in MOE_FIELDS.items()} | {"moe.num_shared_experts": 1}


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `config_from` reads."""
    raw = {
        "hybrid_override_pattern": config.layer_pattern or "*" * config.num_layers,  # not what other models are
        "num_hidden_layers": config.num_layers,
        "tie_word_embeddings": False,
        "mlp_bias": config.mlp_bias,
        "time_step_limit": [config.mamba.time_step_min, config.mamba.time_step_max or math.inf],
    } | write_heads(config)
    if "E" in config.layer_pattern:
        moe = {"moe." + name: getattr(config.moe, name) for name in config.moe.__dataclass_fields__}
        raw |= {key: moe[field] for key, field in MOE_FIELDS.items()}
        raw |= {"moe_shared_expert_intermediate_size": config.moe.shared_size, "n_shared_experts": 1}
    return raw


def names_in_files(name: str) -> str | None:
    """Return a tensor's name in files: transformers' `model` is `backbone` there. MTP layers are not read."""
    if name.startswith("mtp."):
        return None
    return "backbone." + name.removeprefix("model.") if name.startswith("model.") else name


NEMOTRON_H = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    fields={key: field for key, field in FIELDS.items() if key not in ELSEWHERE}
    | {"layer_norm_epsilon": "norm_epsilon"}
    | MAMBA_FIELDS,
    defaults={
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "layer_norm_epsilon": 1e-5,
        "intermediate_size": 21504,
        "ssm_state_size": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "chunk_size": 128,
    },
    fixed={
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "use_bias": False,
        "attention_bias": False,
        "mamba_proj_bias": False,
    },
    implied={
        "attention.kind": "gqa",
        "tie_embeddings": False,
        "attention.rotated": False,
        "attention.rope.interleaved": False,
        "activation": "relu2",
        "gated_mlp": False,
    },
    block={
        "norm.scale": "norm.weight",
        "mamba.input": "mixer.in_proj.weight",
        "mamba.conv": Fused("mixer.conv1d.weight"),
        "mamba.conv_bias": "mixer.conv1d.bias",
        "mamba.decay_log": "mixer.A_log",
        "mamba.step_bias": "mixer.dt_bias",
        "mamba.skip": "mixer.D",
        "mamba.norm.scale": "mixer.norm.weight",
        "mamba.output": "mixer.out_proj.weight",
        "attention.query": "mixer.q_proj.weight",
        "attention.key": "mixer.k_proj.weight",
        "attention.value": "mixer.v_proj.weight",
        "attention.out": "mixer.o_proj.weight",
        "mlp.up": "mixer.up_proj.weight",
        "mlp.down": "mixer.down_proj.weight",
        "mlp.up_bias": "mixer.up_proj.bias",
        "mlp.down_bias": "mixer.down_proj.bias",
        "moe.router": "mixer.gate.weight",
        "moe.router_bias": "mixer.gate.e_score_correction_bias",
        "moe.up": "mixer.experts.{expert}.up_proj.weight",
        "moe.down": "mixer.experts.{expert}.down_proj.weight",
        "moe.shared.up": "mixer.shared_experts.up_proj.weight",
        "moe.shared.down": "mixer.shared_experts.down_proj.weight",
        "moe.shared.up_bias": "mixer.shared_experts.up_proj.bias",
        "moe.shared.down_bias": "mixer.shared_experts.down_proj.bias",
    },
    top={
        "embedding.embedding": "backbone.embeddings.weight",
        "final_norm.scale": "backbone.norm_f.weight",
        "head.kernel": "lm_head.weight",
    },
    layers="backbone.layers.",
    names_in_files=names_in_files,
    read=config_from,
    write=config_to,
    understood=(
        *OLDER_NAMES,
        *MOE_FIELDS,
        "hybrid_override_pattern",
        "layers_block_type",
        "layer_types",
        "num_hidden_layers",
        "num_key_value_heads",
        "head_dim",
        "mlp_bias",
        "attention_head_dim",
        "num_local_experts",
        "moe_latent_size",
        "time_step_limit",
        "mamba_dt_limit",
    ),
    harmless=(
        "n_shared_experts",  # one of their width together
        "moe_shared_expert_overlap",
        "tie_word_embeddings",
        "rms_norm_eps",
        "expand",
        "mamba_expand",
        "time_step_min",
        "time_step_max",
        "time_step_floor",
        "mamba_dt_min",
        "mamba_dt_max",
        "mamba_dt_init_floor",
        "mamba_ssm_cache_dtype",
        "use_mamba_kernels",
        "residual_in_fp32",
        "rescale_prenorm_residual",
        "num_logits_to_keep",
        "num_nextn_predict_layers",
        "mtp_layers_block_type",
        "mtp_hybrid_override_pattern",
    ),
)
