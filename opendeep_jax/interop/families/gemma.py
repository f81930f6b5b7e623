"""Gemma 3: the text models, and the text part of those that also see images (read only).

attn_logit_softcapping is a key of Gemma 2's that no program applies to Gemma 3, whatever its value, transformers
included; so it is passed over.
"""

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
    integer,
    number,
    read_biases,
    read_heads,
    read_layer_types,
    write_biases,
    write_heads,
    write_layer_types,
)
from opendeep_jax.interop.hf_rope import KEYS, read_ropes, write_rope

THETA, SLIDING_THETA, HEAD_DIM, PATTERN = 1_000_000.0, 10_000.0, 256, 6
NAMES = {  # of the models that see images, in files of either age
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
IMAGE_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def config_from(raw: Raw) -> dict[str, Any]:
    """Heads, local and global layers, the two rotations, and the factors that Gemma alone has."""
    pattern = integer(raw, "sliding_window_pattern" if "sliding_window_pattern" in raw else "_sliding_window_pattern")
    scale = number(raw, "query_pre_attn_scalar")
    if scale <= 0:
        raise ConfigError(f"query_pre_attn_scalar = {scale}: must be above 0. Correct the key.")
    return (
        read_heads(raw, HEAD_DIM)
        | read_biases(raw)
        | read_layer_types(raw, lambda layer: (layer + 1) % pattern != 0)
        | read_ropes(raw, THETA, number(raw, "rope_local_base_freq", SLIDING_THETA))
        | {
            "embedding_scale": integer(raw, "hidden_size") ** 0.5,
            "attention.query_scale": scale**-0.5,
            "logit_softcap": number(raw, "final_logit_softcapping", 0.0),
        }
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `config_from` reads."""
    attention = config.attention
    return (
        write_heads(config)
        | write_biases(config)
        | write_layer_types(config)
        | write_rope(attention.rope)
        | {
            "rope_local_base_freq": attention.sliding_rope_theta or attention.rope.theta,
            "query_pre_attn_scalar": round((attention.query_scale or attention.head_dim**-0.5) ** -2),
            "final_logit_softcapping": config.logit_softcap or None,
        }
    )


def names_in_files(name: str) -> str | None:
    """A tensor's name without what the models that see images put before it; None for a tensor of the image encoder."""
    if name.startswith(IMAGE_PARTS):
        return None
    for prefix, replacement in NAMES.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    fields=FIELDS,
    defaults=DEFAULTS
    | {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "_sliding_window_pattern": PATTERN,
    },
    fixed={
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": False,
        "partial_rotary_factor": 1.0,
    },
    implied=IMPLIED
    | {
        "norm": "rms_zero_centered",
        "norm_placement": "both",
        "activation": "gelu_tanh",
        "attention.qk_norm": "head",
    },
    block=GROUPED_QUERY_ATTENTION
    | FEED_FORWARD
    | {
        "attention_norm.scale": "input_layernorm.weight",
        "attention_post_norm.scale": "post_attention_layernorm.weight",
        "mlp_norm.scale": "pre_feedforward_layernorm.weight",
        "mlp_post_norm.scale": "post_feedforward_layernorm.weight",
    },
    read=config_from,
    write=config_to,
    understood=(
        "head_dim",
        "attention_bias",
        "layer_types",
        "sliding_window_pattern",
        "rope_local_base_freq",
        "final_logit_softcapping",
        *KEYS,
    ),
    harmless=(
        "attn_logit_softcapping",  # see above
        "hidden_act",  # older files repeat the activation here
    ),
    names_in_files=names_in_files,
)
