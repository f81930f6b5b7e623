"""gpt-oss: sinks, biases, clamped SwiGLU; gate and up of all experts in one tensor, their columns in turn.

OpenAI's own files hold the experts in MXFP4, under the names `…_blocks` and `…_scales`; they are read, not written.
"""

from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.interop.hf_family import (
    DEFAULTS,
    FIELDS,
    GROUPED_QUERY_ATTENTION,
    IMPLIED,
    PRE_NORMS,
    Family,
    Fused,
    Raw,
    read_biases,
    read_heads,
    read_layer_types,
    write_biases,
    write_heads,
    write_layer_types,
)
from opendeep_jax.interop.hf_rope import KEYS, read_rope, write_rope

THETA, HEAD_DIM = 150_000.0, 64
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The family's rotation where config.json has none."""


def config_from(raw: Raw) -> dict[str, Any]:
    """Heads, biases, sliding layers and rotation; the experts are as wide as intermediate_size."""
    chosen = raw["num_experts_per_tok"]
    if raw.get("experts_per_token", chosen) != chosen:
        raise ConfigError(
            f"experts_per_token = {raw['experts_per_token']!r}: contradicts num_experts_per_tok = {chosen!r}. "
            "Correct the two keys."
        )
    if "rope_scaling" not in raw and "rope_parameters" not in raw:
        raw = {**raw, "rope_scaling": YARN}
    return (
        read_heads(raw, HEAD_DIM)
        | read_biases(raw)
        | read_layer_types(raw, lambda layer: layer % 2 == 0)
        | read_rope(raw, THETA)
        | {"mlp_size": raw["intermediate_size"]}
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `config_from` reads."""
    rope = write_rope(config.attention.rope)
    if not rope["rope_scaling"]:
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": config.attention.rope.theta}}
    return write_heads(config) | write_biases(config) | write_layer_types(config) | rope


GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    fields={key: field for key, field in FIELDS.items() if key != "intermediate_size"}
    | {
        "intermediate_size": "moe.expert_size",
        "num_local_experts": "moe.num_experts",
        "num_experts_per_tok": "moe.experts_per_token",
        "swiglu_alpha": "swiglu_alpha",
        "swiglu_limit": "swiglu_limit",
    },
    defaults=DEFAULTS
    | {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "attention_bias": True,
        "sliding_window": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    fixed={"hidden_act": "silu", "partial_rotary_factor": 1.0},
    implied=IMPLIED
    | {
        "num_dense_layers": 0,
        "activation": "clamped_swiglu",
        "attention.sinks": True,
        "moe.scoring": "softmax",
        "moe.normalize_weights": True,
        "moe.use_router_bias": False,
        "moe.num_shared_experts": 0,
        "moe.router_linear_bias": True,
        "moe.expert_bias": True,
    },
    block=PRE_NORMS
    | GROUPED_QUERY_ATTENTION
    | {
        "attention.sinks": "self_attn.sinks",
        "moe.router": "mlp.router.weight",
        "moe.router_linear_bias": "mlp.router.bias",
        "moe.gate": Fused("mlp.experts.gate_up_proj", first=0, step=2),
        "moe.up": Fused("mlp.experts.gate_up_proj", first=1, step=2),
        "moe.gate_bias": Fused("mlp.experts.gate_up_proj_bias", first=0, step=2),
        "moe.up_bias": Fused("mlp.experts.gate_up_proj_bias", first=1, step=2),
        "moe.down": Fused("mlp.experts.down_proj"),
        "moe.down_bias": Fused("mlp.experts.down_proj_bias"),
    },
    read=config_from,
    write=config_to,
    understood=("num_key_value_heads", "head_dim", "layer_types", "experts_per_token", *KEYS),
    harmless=("initial_context_length",),  # rope_scaling has it, too
)
