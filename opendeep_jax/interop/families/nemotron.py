"""Nemotron, dense: LayerNorm whose scale is 1 + weight, squared ReLU without a gate, half of each head rotated."""

from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.interop.hf_family import (
    DEFAULTS,
    FEED_FORWARD,
    FIELDS,
    GROUPED_QUERY_ATTENTION,
    IMPLIED,
    Family,
    Raw,
    boolean,
    number,
    read_biases,
    read_heads,
    write_biases,
    write_heads,
)
from opendeep_jax.interop.hf_rope import KEYS, parameters, read_rope, write_rope


def config_from(raw: Raw) -> dict[str, Any]:
    """Heads, biases and rotation, of the first part of each head."""
    heads = read_heads(raw)
    part = number(parameters(raw), "partial_rotary_factor", raw.get("partial_rotary_factor", 0.5))
    if not 0 < part <= 1:
        raise ConfigError(f"partial_rotary_factor = {part}: must be above 0 and at most 1. Correct the key.")
    own = {"attention.rotary_dim": int(heads["attention.head_dim"] * part), "mlp_bias": boolean(raw, "mlp_bias")}
    return heads | read_biases(raw) | read_rope(raw, partial=True) | own


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `config_from` reads."""
    attention = config.attention
    part = (attention.rotary_dim or attention.head_dim) / attention.head_dim
    own = {"partial_rotary_factor": part, "mlp_bias": config.mlp_bias}
    return write_heads(config) | write_biases(config) | write_rope(attention.rope) | own


NEMOTRON = Family(
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    fields={key: field for key, field in FIELDS.items() if key != "rms_norm_eps"} | {"norm_eps": "norm_epsilon"},
    defaults=DEFAULTS | {"max_position_embeddings": 4096, "initializer_range": 0.0134, "norm_eps": 1e-5},
    fixed={"hidden_act": "relu2"},
    implied=IMPLIED | {"norm": "layer_zero_centered", "activation": "relu2", "gated_mlp": False},
    block=GROUPED_QUERY_ATTENTION
    | FEED_FORWARD
    | {
        "attention_norm.scale": "input_layernorm.weight",
        "attention_norm.bias": "input_layernorm.bias",
        "mlp_norm.scale": "post_attention_layernorm.weight",
        "mlp_norm.bias": "post_attention_layernorm.bias",
    },
    read=config_from,
    write=config_to,
    understood=("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", *KEYS),
    harmless=("rms_norm_eps", "rope_percent"),  # norm_eps and partial_rotary_factor count
)
