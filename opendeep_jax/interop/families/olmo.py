"""OLMo 2, and OLMo 3, whose sliding layers keep the plain rotation."""

from typing import Any

from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.interop.hf_family import (
    DEFAULTS,
    FEED_FORWARD,
    FIELDS,
    FULL,
    GROUPED_QUERY_ATTENTION,
    IMPLIED,
    SLIDING,
    Family,
    Raw,
    read_biases,
    read_heads,
    read_layer_types,
    write_biases,
    write_heads,
    write_layer_types,
)
from opendeep_jax.interop.hf_rope import KEYS, read_rope, read_ropes, write_rope, write_scaling

THETA_OF_OLMO3 = 500_000.0


def olmo2_from(raw: Raw) -> dict[str, Any]:
    """Heads, biases and rotation."""
    return read_heads(raw) | read_biases(raw) | read_rope(raw)


def olmo2_to(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `olmo2_from` reads."""
    return write_heads(config) | write_biases(config) | write_rope(config.attention.rope)


def olmo3_from(raw: Raw) -> dict[str, Any]:
    """Heads, biases, sliding layers and the two rotations.

    Sliding layers have the family's own base unless rope_parameters says another, as in transformers 5: rope_theta is
    of the others.
    """
    return (
        read_heads(raw)
        | read_biases(raw)
        | read_layer_types(raw, lambda layer: (layer + 1) % 4 != 0)
        | read_ropes(raw, THETA_OF_OLMO3, THETA_OF_OLMO3)
    )


def olmo3_to(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `olmo3_from` reads.

    Where a base is not the family's own, rope_parameters says of which layers.
    """
    attention = config.attention
    rope = write_rope(attention.rope)
    sliding_theta = attention.sliding_rope_theta or attention.rope.theta
    if not attention.rope.theta == sliding_theta == THETA_OF_OLMO3:
        full = write_scaling(attention.rope) or {"rope_type": "default"}
        sliding = {"rope_type": "default"} if attention.sliding_rope_theta else full
        rope = {
            "rope_parameters": {
                FULL: full | {"rope_theta": attention.rope.theta},
                SLIDING: sliding | {"rope_theta": sliding_theta},
            }
        }
    return write_heads(config) | write_biases(config) | write_layer_types(config) | rope


OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    fields=FIELDS,
    defaults=DEFAULTS | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    fixed={"hidden_act": "silu", "partial_rotary_factor": 1.0},
    implied=IMPLIED | {"norm_placement": "post", "attention.qk_norm": "all_heads"},
    block=GROUPED_QUERY_ATTENTION
    | FEED_FORWARD
    | {
        "attention_post_norm.scale": "post_attention_layernorm.weight",
        "mlp_post_norm.scale": "post_feedforward_layernorm.weight",
    },
    read=olmo2_from,
    write=olmo2_to,
    understood=("num_key_value_heads", "head_dim", "attention_bias", *KEYS),
)
OLMO3 = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    fields=OLMO2.fields,
    defaults=OLMO2.defaults | {"sliding_window": 4096},
    fixed=OLMO2.fixed,
    implied=OLMO2.implied,
    block=OLMO2.block,
    read=olmo3_from,
    write=olmo3_to,
    understood=(*OLMO2.understood, "layer_types"),
)
