"""Llama 2 and 3, and SmolLM2, which has the same architecture."""

from typing import Any

from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.interop.hf_family import (
    DEFAULTS,
    FEED_FORWARD,
    FIELDS,
    GROUPED_QUERY_ATTENTION,
    IMPLIED,
    PRE_NORMS,
    Family,
    Raw,
    boolean,
    read_biases,
    read_heads,
    write_biases,
    write_heads,
)
from opendeep_jax.interop.hf_rope import KEYS, read_rope, write_rope


def config_from(raw: Raw) -> dict[str, Any]:
    """Heads, biases and rotation."""
    return read_heads(raw) | read_biases(raw) | read_rope(raw) | {"mlp_bias": boolean(raw, "mlp_bias")}


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `config_from` reads."""
    rope = write_rope(config.attention.rope)
    return write_heads(config) | write_biases(config) | rope | {"mlp_bias": config.mlp_bias}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=FIELDS,
    defaults=DEFAULTS | {"max_position_embeddings": 2048},
    fixed={"hidden_act": "silu", "rope_interleaved": False, "partial_rotary_factor": 1.0},
    implied=IMPLIED,
    block=PRE_NORMS | GROUPED_QUERY_ATTENTION | FEED_FORWARD,
    read=config_from,
    write=config_to,
    understood=("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", *KEYS),
    harmless=("is_llama_config",),
)
