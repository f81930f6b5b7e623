"""Qwen2 and 2.5, Qwen3 dense and with experts."""

from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.interop.hf_family import (
    DEFAULTS,
    EXPERTS,
    FEED_FORWARD,
    FIELDS,
    GROUPED_QUERY_ATTENTION,
    IMPLIED,
    PRE_NORMS,
    SLIDING,
    Family,
    Raw,
    boolean,
    integer,
    read_biases,
    read_heads,
    read_layer_types,
    write_biases,
    write_heads,
    write_layer_types,
)
from opendeep_jax.interop.hf_rope import KEYS, read_rope, write_rope

HEAD_DIM_OF_QWEN3 = 128


def _read_window(raw: Raw) -> dict[str, Any]:
    """Return the sliding window, which layers from max_window_layers on have, if any."""
    if not boolean(raw, "use_sliding_window"):
        types = raw.get("layer_types")
        if isinstance(types, list) and SLIDING in types:
            raise ConfigError(
                f"layer_types has {SLIDING!r} and use_sliding_window is false: it is left open whether they slide. "
                "Set use_sliding_window to true, or list full_attention alone."
            )
        return {}
    first = raw.get("max_window_layers", 28)
    if type(first) is not int:
        raise ConfigError(f"max_window_layers = {first!r}: must be a whole number. Correct the key.")
    return read_layer_types(raw, lambda layer: layer >= first)


def _write_window(config: ModelConfig) -> dict[str, Any]:
    sliding = config.attention.sliding_layers
    if not sliding:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "max_window_layers": min(sliding)} | write_layer_types(config)


def qwen2_from(raw: Raw) -> dict[str, Any]:
    """Heads, window and rotation."""
    return read_heads(raw) | _read_window(raw) | read_rope(raw)


def qwen2_to(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `qwen2_from` reads."""
    return write_heads(config) | _write_window(config) | write_rope(config.attention.rope)


def qwen3_from(raw: Raw) -> dict[str, Any]:
    """Heads, biases, window and rotation."""
    return read_heads(raw, HEAD_DIM_OF_QWEN3) | read_biases(raw) | _read_window(raw) | read_rope(raw)


def qwen3_to(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `qwen3_from` reads."""
    return write_heads(config) | write_biases(config) | _write_window(config) | write_rope(config.attention.rope)


def moe_from(raw: Raw) -> dict[str, Any]:
    """Heads, biases, window and rotation, and which layers have experts."""
    layers, dense = integer(raw, "num_hidden_layers"), raw.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ConfigError(f"mlp_only_layers = {dense!r}: must be a list of layer numbers. Correct the key.")
    leading = sorted({layer for layer in dense if layer < layers})
    if leading != list(range(len(leading))):
        raise ConfigError(
            f"mlp_only_layers = {dense}: dense layers can only be the first ones here. This variant is not implemented."
        )
    window = read_layer_types(raw, lambda layer: True) if raw.get("use_sliding_window", False) else {}
    return (
        read_heads(raw)
        | read_biases(raw)
        | window
        | read_rope(raw)
        | {"num_dense_layers": len(leading), "moe.num_experts": integer(raw, _experts_key(raw))}
    )


def _experts_key(raw: Raw) -> str:
    """Return the key of the number of experts: num_experts on the hub, num_local_experts in transformers 5."""
    return "num_experts" if "num_experts" in raw else "num_local_experts"


def moe_to(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `moe_from` reads."""
    attention = config.attention
    window = {"use_sliding_window": bool(attention.sliding_layers), "sliding_window": attention.window or None}
    experts = {
        "num_experts": config.moe.num_experts,
        "mlp_only_layers": list(range(config.num_leading_dense_layers)),
    }
    return write_heads(config) | write_biases(config) | window | experts | write_rope(attention.rope)


WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=FIELDS,
    defaults=DEFAULTS | {"max_position_embeddings": 32768},
    fixed={"hidden_act": "silu", "partial_rotary_factor": 1.0, "use_mrope": False},
    implied=IMPLIED | {"attention.qkv_bias": True},
    block=PRE_NORMS | GROUPED_QUERY_ATTENTION | FEED_FORWARD,
    read=qwen2_from,
    write=qwen2_to,
    understood=("num_key_value_heads", "head_dim", *WINDOW_KEYS, *KEYS),
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=FIELDS,
    defaults=DEFAULTS | {"max_position_embeddings": 32768},
    fixed={"hidden_act": "silu", "partial_rotary_factor": 1.0},
    implied=IMPLIED | {"attention.qk_norm": "head"},
    block=PRE_NORMS | GROUPED_QUERY_ATTENTION | FEED_FORWARD,
    read=qwen3_from,
    write=qwen3_to,
    understood=("num_key_value_heads", "head_dim", "attention_bias", *WINDOW_KEYS, *KEYS),
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields=FIELDS
    | {
        "num_experts_per_tok": "moe.experts_per_token",
        "moe_intermediate_size": "moe.expert_size",
        "norm_topk_prob": "moe.normalize_weights",
    },
    defaults=DEFAULTS | {"max_position_embeddings": 32768, "norm_topk_prob": False},
    fixed={"hidden_act": "silu", "partial_rotary_factor": 1.0, "decoder_sparse_step": 1},
    implied=IMPLIED
    | {
        "attention.qk_norm": "head",
        "moe.scoring": "softmax",
        "moe.use_router_bias": False,
        "moe.num_shared_experts": 0,
    },
    block=PRE_NORMS | GROUPED_QUERY_ATTENTION | FEED_FORWARD | EXPERTS,
    read=moe_from,
    write=moe_to,
    understood=(
        "num_key_value_heads",
        "head_dim",
        "attention_bias",
        "num_experts",
        "num_local_experts",
        "mlp_only_layers",
        *(key for key in WINDOW_KEYS if key != "max_window_layers"),
        *KEYS,
    ),
    harmless=("max_window_layers",),  # all layers slide, or none
)
