"""Our ModelConfig to GGUF metadata.

Whether a model of ours is an architecture that llama.cpp knows is decided by trying: the metadata is read back, and if
that describes another computation, it is not.
"""

from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ModelConfig, RopeConfig
from opendeep_jax.interop.gguf_config import IMPLIED, SIGMOID, SLIDING_PERIOD, SOFTMAX, config_from_gguf
from opendeep_jax.interop.hf_config import differences

ONLY_EXPERTS = ("gpt-oss", "qwen3moe")
HEADS_FILL_WIDTH = ("nemotron", "olmo2")
"""Architectures whose heads together are as wide as the model; llama.cpp refuses others."""
IGNORED = ("tie_embeddings", "mtp.", "attention.latent_norm_epsilon")
"""Fields of which a file says nothing: llama.cpp has one epsilon for all norms, where DeepSeek's latents have 1e-6."""
IGNORED_OF_LLAMA = ("attention.rope.llama3_", "attention.rope.interleaved")
"""What `llama` says by rope_freqs.weight, and by the order of a tensor's rows."""


def config_to_gguf(config: ModelConfig) -> dict[str, Any]:
    """Return the metadata of a model of ours, `general.architecture` first: the first of `IMPLIED` that it is.

    Raises:
        ConfigError: it is none of them; the message says what keeps it from the likeliest.
    """
    kind = config.attention.kind
    likely = [name for name, (_, attention, _) in IMPLIED.items() if attention.get("kind", "gqa") == kind]
    tried = []
    for architecture in likely:
        if architecture in ONLY_EXPERTS and not config.moe.num_experts:
            continue
        fields = _fields(config, architecture)
        lost = _not_described(config, fields, architecture)
        if not lost:
            return fields
        tried.append((len(lost), architecture, lost))
    _, architecture, lost = min(tried)
    raise ConfigError(
        f"This model has no GGUF form: it is most like {architecture}, which has other values of "
        + "; ".join(f"model.{name} (here {here!r}, there {there!r})" for name, here, there in lost)
        + ". Export it as a Hugging Face directory instead."
    )


def _not_described(config: ModelConfig, fields: dict[str, Any], architecture: str) -> list[tuple[str, Any, Any]]:
    """Return what the metadata does not describe of a model: (field, value here, value there)."""
    shapes = {"token_embd.weight": (config.vocab_size, config.hidden_size)}
    if config.attention.q_lora_rank:
        shapes["blk.0.attn_q_a.weight"] = ()
    if config.moe.use_router_bias:
        shapes["exp_probs_b.bias"] = ()
    try:
        there = config_from_gguf(fields, shapes, complete=False)
    except ConfigError as error:
        return [("attention", config.attention.kind, str(error))]
    lost = differences(config, there, IGNORED + (IGNORED_OF_LLAMA if architecture == "llama" else ()), tolerance=1e-6)
    size = config.hidden_size / config.attention.num_heads
    if architecture in HEADS_FILL_WIDTH and config.attention.head_dim != size:
        lost.append(("attention.head_dim", config.attention.head_dim, size))
    return lost


def _fields(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """All that the keys can say of a model, as if it were of this architecture."""
    attention, moe = config.attention, config.moe
    mlp = config.mlp_size if config.num_leading_dense_layers else moe.expert_size
    fields = {
        "block_count": config.num_layers,
        "context_length": config.max_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": mlp,
        "vocab_size": config.vocab_size,
        "attention.head_count": attention.num_heads,
        "rope.freq_base": float(attention.rope.theta),
        **(_latent_fields(config) if attention.kind == "mla" else _grouped_fields(config, architecture)),
        **_rope_fields(attention.rope, architecture),
        **(_expert_fields(config, architecture) if moe.num_experts else {}),
    }
    epsilon = "attention.layer_norm_epsilon" if architecture == "nemotron" else "attention.layer_norm_rms_epsilon"
    fields[epsilon] = float(config.norm_epsilon)
    if config.logit_softcap:
        fields["final_logit_softcapping"] = float(config.logit_softcap)
    return {"general.architecture": architecture} | {f"{architecture}.{name}": value for name, value in fields.items()}


def _latent_fields(config: ModelConfig) -> dict[str, Any]:
    """The cache that llama.cpp keeps is one head of the latent and the rotated part; the heads proper are `_mla`."""
    attention = config.attention
    fields = {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": attention.kv_lora_rank,
        "attention.key_length": attention.kv_lora_rank + attention.qk_rope_head_dim,
        "attention.value_length": attention.kv_lora_rank,
        "attention.key_length_mla": attention.qk_head_dim,
        "attention.value_length_mla": attention.v_head_dim,
        "rope.dimension_count": attention.qk_rope_head_dim,
        "leading_dense_block_count": config.num_leading_dense_layers,
        "expert_feed_forward_length": config.moe.expert_size if config.moe.num_experts else config.mlp_size,
        "expert_shared_count": config.moe.num_shared_experts if config.moe.num_experts else 0,
    }
    return fields | {"attention.q_lora_rank": attention.q_lora_rank}  # llama.cpp asks for it even where there is none


def _grouped_fields(config: ModelConfig, architecture: str) -> dict[str, Any]:
    attention = config.attention
    fields = {
        "attention.head_count_kv": attention.num_kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "rope.dimension_count": attention.rotary_dim or attention.head_dim,
    }
    if attention.sliding_layers and architecture in SLIDING_PERIOD:
        fields |= {
            "attention.sliding_window": attention.window,
            "attention.sliding_window_pattern": [n in attention.sliding_layers for n in range(config.num_layers)],
        }
        if attention.sliding_rope_theta:
            fields["rope.freq_base_swa"] = float(attention.sliding_rope_theta)
    return fields


def _rope_fields(rope: RopeConfig, architecture: str) -> dict[str, Any]:
    if rope.linear_factor > 1:
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.linear_factor)}
    if rope.yarn_factor == 1:
        return {}
    fields = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope.yarn_factor),
        "rope.scaling.original_context_length": rope.yarn_original_length,
        "rope.scaling.yarn_beta_fast": float(rope.yarn_beta_fast),
        "rope.scaling.yarn_beta_slow": float(rope.yarn_beta_slow),
    }
    if architecture == "deepseek2" and rope.yarn_mscale_all_dim:
        fields["rope.scaling.yarn_log_multiplier"] = 0.1 * rope.yarn_mscale_all_dim
    return fields


def _expert_fields(config: ModelConfig, architecture: str) -> dict[str, Any]:
    moe = config.moe
    fields = {
        "expert_count": moe.num_experts,
        "expert_used_count": moe.experts_per_token,
        "expert_feed_forward_length": moe.expert_size,
    }
    if architecture == "deepseek2":
        fields |= {
            "expert_gating_func": SIGMOID if moe.scoring == "sigmoid" else SOFTMAX,
            "expert_weights_norm": moe.normalize_weights,
            "expert_weights_scale": float(moe.routed_scaling_factor),
            "expert_group_count": moe.num_groups,
            "expert_group_used_count": moe.groups_per_token,
        }
    return fields
