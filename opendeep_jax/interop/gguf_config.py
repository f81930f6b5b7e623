"""GGUF metadata to our ModelConfig. What an architecture's name implies is in `IMPLIED`; the rest is in keys."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import AttentionConfig, ModelConfig, MoEConfig, RopeConfig

SOFTMAX, SIGMOID = 1, 2
TYPICAL_THETA = 10_000.0  # what llama.cpp takes where a file does not say
GQA_MOE = {"scoring": "softmax", "normalize_weights": True, "use_router_bias": False, "num_shared_experts": 0}
# What a name says without any key: fields of ModelConfig, of its attention, of its experts.
IMPLIED: dict[str, tuple[dict, dict, dict]] = {
    "deepseek2": ({}, {"kind": "mla"}, {}),
    "gpt-oss": (
        {"activation": "clamped_swiglu"},
        {"sinks": True, "qkv_bias": True, "out_bias": True},
        GQA_MOE | {"router_linear_bias": True, "expert_bias": True},
    ),
    "nemotron": ({"norm": "layer_zero_centered", "activation": "relu2", "gated_mlp": False}, {}, GQA_MOE),
    "gemma3": (
        {"norm": "rms_zero_centered", "norm_placement": "both", "activation": "gelu_tanh"},
        {"qk_norm": "head"},
        GQA_MOE,
    ),
    "olmo2": ({"norm_placement": "post"}, {"qk_norm": "all_heads"}, GQA_MOE),
    "qwen3": ({}, {"qk_norm": "head"}, GQA_MOE),
    "qwen3moe": ({}, {"qk_norm": "head"}, GQA_MOE),
    "qwen2": ({}, {"qkv_bias": True}, GQA_MOE),
    "llama": ({}, {}, GQA_MOE),
}
"""Most specific first: the order in which a model of ours tries them."""
# Every nth layer sees everything, where a file does not list the layers that do not.
SLIDING_PERIOD = {"gemma3": 6, "olmo2": 4, "gpt-oss": 2}
WITH_EXPERTS = ("deepseek2", "gpt-oss", "qwen3moe", "llama")
GEMMA_27B_LAYERS = 62
MOST_LAYERS = 10_000
TYPICAL_LENGTH = 8192  # Llama 3's before its stretch
HARMLESS = frozenset(
    "vocab_size tensor_data_layout attention.causal rope.scaling.finetuned rope.scaling.original_context_length "
    "rope.freq_base_swa attention.head_count_kv attention.key_length attention.value_length".split()
)
"""Keys that say nothing more than the tensors and the other keys do, where those are not read."""


class _Keys:
    """The fields of one architecture; what is missing or of another type is a ConfigError."""

    def __init__(self, fields: Mapping[str, Any], architecture: str):
        self.fields, self.architecture, self.read = fields, architecture, set()

    def check_all_read(self) -> None:
        """Raise ConfigError for keys of the architecture that were not read: they may change what it computes."""
        prefix = self.architecture + "."
        names = [key.removeprefix(prefix) for key in self.fields if key.startswith(prefix)]
        unread = [name for name in names if name not in self.read | HARMLESS and self.fields[prefix + name]]
        if unread:
            said = ", ".join(f"{prefix}{name} = {self.fields[prefix + name]!r}"[:100] for name in sorted(unread))
            raise ConfigError(f"{said}: no field that is known here. This variant is not implemented.")

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        key = f"{self.architecture}.{name}"
        self.read.add(name)
        value = self.fields.get(key, default)
        if isinstance(value, list) and kind is not list and value and all(entry == value[0] for entry in value):
            value = value[0]  # one number for each layer, all the same
        if value is None:
            raise ConfigError(f"the field {key} is missing. Convert the model again with a newer converter.")
        if kind is float and isinstance(value, int | float) and math.isfinite(value):
            return _unrounded(value)
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            raise ConfigError(f"the field {key} = {str(value)[:80]}: must be of type {kind.__name__}.")
        return value


def _unrounded(value: float) -> float:
    """Return the short decimal number that a float32 was made of: 1e-06, not 9.99999997e-07."""
    with np.errstate(over="ignore"):
        short = float(str(np.float32(value)))
    return short if math.isfinite(short) else float(value)


def config_from_gguf(
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: np.ndarray | None = None,
    complete: bool = True,
) -> ModelConfig:
    """Return the ModelConfig that a file's metadata describes, in float32.

    Args:
        fields: Metadata by key.
        shapes: The tensors' shapes by name: whether head and router bias are there, and the vocabulary's size.
        rope_factors: `rope_freqs.weight`, which is all that says of Llama 3's stretch.
        complete: Refuse what is not understood; False only tries how a model of ours would be read.

    Raises:
        ConfigError: an architecture that our decoder is not, or metadata that is missing, unknown or contradictory.
    """
    architecture = fields.get("general.architecture")
    if architecture not in tuple(IMPLIED):
        raise ConfigError(
            f"general.architecture = {architecture!r}: must be one of {', '.join(IMPLIED)}. "
            "A model of another family cannot be read."
        )
    keys = _Keys(fields, architecture)
    model, attention, moe = IMPLIED[architecture]
    heads, hidden, layers = keys.get("attention.head_count", int), keys.get("embedding_length", int), _layers(keys)
    if "token_embd.weight" not in shapes or heads < 1:
        raise ConfigError("the file has no token_embd.weight, or no attention heads. Download it again.")
    rope = _rope(keys, architecture)
    if rope_factors is not None:
        size = keys.get("attention.key_length", int, hidden // heads)
        rope = _llama3(rope, np.asarray(rope_factors, np.float64), keys.get("rope.dimension_count", int, size))
    if attention.get("kind") == "mla":
        attention = attention | _latent(keys, shapes)
    else:
        attention = attention | _grouped(keys, architecture, heads, hidden, layers, rope)
    epsilon = "attention.layer_norm_epsilon" if architecture == "nemotron" else "attention.layer_norm_rms_epsilon"
    experts = _experts(keys, architecture, moe, shapes)
    if architecture == "gemma3":
        model = model | {"embedding_scale": math.sqrt(hidden)}
        model |= {"logit_softcap": keys.get("final_logit_softcapping", float, 0.0)}
    dense = keys.get("leading_dense_block_count", int, 0)
    dense = dense if experts.num_experts else layers
    found = ModelConfig(
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=hidden,
        num_layers=layers,
        num_dense_layers=dense,
        mlp_size=keys.get("feed_forward_length", int, experts.expert_size),
        norm_epsilon=keys.get(epsilon, float),
        context_length=keys.get("context_length", int),
        tie_embeddings="output.weight" not in shapes,
        dtype="float32",
        attention=AttentionConfig(num_heads=heads, rope=rope, **attention),
        moe=experts,
        **model,
    ).reaching()
    if complete:
        keys.check_all_read()
    return found


def _layers(keys: _Keys) -> int:
    """Blocks without those of multi-token prediction, which some converters append."""
    layers = keys.get("block_count", int) - keys.get("nextn_predict_layers", int, 0)
    if not 1 <= layers <= MOST_LAYERS:
        raise ConfigError(
            f"block_count says {layers} layers: must be from 1 to {MOST_LAYERS}. Download the file again."
        )
    return layers


def _rope(keys: _Keys, architecture: str) -> RopeConfig:
    plain = {
        "theta": keys.get("rope.freq_base", float, TYPICAL_THETA),
        "interleaved": architecture == "deepseek2",
        "yarn_truncate": architecture != "gpt-oss",
    }
    kind = keys.get("rope.scaling.type", str, "none")
    factor = keys.get("rope.scaling.factor", float, 1.0)
    if kind == "linear":
        return RopeConfig(**plain, linear_factor=factor)
    if kind == "none" or factor == 1:
        return RopeConfig(**plain)
    if kind != "yarn":
        raise ConfigError(f"rope.scaling.type = {kind!r}: must be none, linear or yarn.")
    # llama.cpp's own reading: a temperature in the scores (DeepSeek), or in the rotation (all others).
    in_scores = keys.get("rope.scaling.yarn_log_multiplier", float, 0.0) / 0.1
    in_scores = round(in_scores, 6) if architecture == "deepseek2" else 0.0
    return RopeConfig(
        **plain,
        yarn_factor=factor,
        yarn_original_length=keys.get("rope.scaling.original_context_length", int),
        yarn_beta_fast=keys.get("rope.scaling.yarn_beta_fast", float, 32.0),
        yarn_beta_slow=keys.get("rope.scaling.yarn_beta_slow", float, 1.0),
        yarn_mscale=in_scores or 1.0,
        yarn_mscale_all_dim=in_scores,
    )


def rope_factors(rope: RopeConfig, size: int) -> np.ndarray:
    """Return the factor by which Llama 3's scaling slows each pair, float32 [size / 2]: `rope_freqs.weight`."""
    turns = rope.llama3_original_length * rope.theta ** (-np.arange(0, size, 2) / size) / (2 * math.pi)
    low, high = rope.llama3_low_frequency, rope.llama3_high_frequency
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (kept + (1 - kept) / rope.llama3_factor)).astype(np.float32)


def _llama3(rope: RopeConfig, factors: np.ndarray, size: int) -> RopeConfig:
    """Return the rotation with a stretch that gives these factors: the usual bound of 1 turn, if it can be that."""
    if factors.shape != (size // 2,) or not (np.isfinite(factors).all() and factors.min() >= 1):
        raise ConfigError(f"rope_freqs.weight {list(factors.shape)}: must be {size // 2} numbers of 1 or more.")
    stretch = _unrounded(factors.max())
    if stretch == 1:
        return rope
    # In between the bounds, the share that is kept is a straight line in a pair's own frequency.
    frequency = rope.theta ** (-np.arange(0, size, 2) / size)
    kept = (1 / factors - 1 / stretch) / (1 - 1 / stretch)
    between = (kept > 1e-4) & (kept < 1 - 1e-4)
    fast, slow = frequency[kept >= 1 - 1e-4].min(initial=math.pi), frequency[kept <= 1e-4].max(initial=0)
    if between.sum() > 1:
        slope, least = np.polyfit(frequency[between], kept[between], 1)
    elif between.any():
        middle, share = frequency[between][0], kept[between][0]
        slope = max((1 - share) / (fast - middle), share / (middle - slow))
        least = share - slope * middle
    else:
        slope, least = 1 / (fast - slow), -slow / (fast - slow)
    low, high = (turns / slope / (2 * math.pi) for turns in (-least, 1 - least))  # turns for each token of the original
    whole = round(1 / low) if low > 1e-9 else 0  # of tokens, where the lower bound is 1 turn
    for length, digits in ((whole, 3), (TYPICAL_LENGTH, 3), (TYPICAL_LENGTH, 15)):
        bounds = [float(round(length * bound, digits)) for bound in (low, high)]
        if length < 1 or bounds[0] >= bounds[1]:
            continue
        names = dict(zip(("llama3_low_frequency", "llama3_high_frequency"), bounds, strict=True))
        found = dataclasses.replace(rope, llama3_factor=stretch, llama3_original_length=length, **names)
        if np.allclose(rope_factors(found, size), factors, rtol=1e-5):
            return found
    raise ConfigError("rope_freqs.weight is not Llama 3's stretch, and no other that is given by factors is known.")


def _latent(keys: _Keys, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    rotated = keys.get("rope.dimension_count", int)
    old = "deepseek2.attention.key_length_mla" not in keys.fields
    key_size = keys.get("attention.key_length" if old else "attention.key_length_mla", int)
    value_size = keys.get("attention.value_length" if old else "attention.value_length_mla", int)
    return {
        # V2-Lite's files may name a rank that it does not have.
        "q_lora_rank": keys.get("attention.q_lora_rank", int, 0) if "blk.0.attn_q_a.weight" in shapes else 0,
        "kv_lora_rank": keys.get("attention.kv_lora_rank", int),
        "qk_nope_head_dim": key_size - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": value_size,
    }


def _grouped(keys: _Keys, architecture: str, heads: int, hidden: int, layers: int, rope: RopeConfig) -> dict[str, Any]:
    size = keys.get("attention.key_length", int, hidden // heads)
    if keys.get("attention.value_length", int, size) != size:
        raise ConfigError("attention.key_length and attention.value_length differ: only equal ones can be read.")
    rotated = keys.get("rope.dimension_count", int, size)
    settings = {
        "kind": "gqa",
        "num_kv_heads": keys.get("attention.head_count_kv", int, heads),
        "head_dim": size,
        "rotary_dim": 0 if rotated == size else rotated,
    }
    if architecture == "gemma3" and layers == GEMMA_27B_LAYERS:
        settings["query_scale"] = (hidden / heads) ** -0.5
    window = keys.get("attention.sliding_window", int, 0) if architecture in SLIDING_PERIOD else 0
    if not window:
        return settings
    settings |= {"window": window, "sliding_layers": _sliding_layers(keys, architecture, layers)}
    if architecture == "gemma3":
        settings["sliding_rope_theta"] = keys.get("rope.freq_base_swa", float, TYPICAL_THETA)
    elif architecture == "olmo2" and rope.yarn_factor > 1:
        settings["sliding_rope_theta"] = keys.get("rope.freq_base_swa", float, rope.theta)
    return settings


def _sliding_layers(keys: _Keys, architecture: str, layers: int) -> tuple[int, ...]:
    keys.read.add("attention.sliding_window_pattern")
    pattern = keys.fields.get(f"{architecture}.attention.sliding_window_pattern", SLIDING_PERIOD[architecture])
    if isinstance(pattern, list):
        if len(pattern) < layers:
            raise ConfigError(f"attention.sliding_window_pattern has {len(pattern)} entries for {layers} layers.")
        return tuple(layer for layer in range(layers) if pattern[layer])
    if not isinstance(pattern, int) or pattern < 1:
        raise ConfigError(f"attention.sliding_window_pattern = {pattern!r}: must be a list, or a period of 1 or more.")
    return tuple(layer for layer in range(layers) if layer % pattern < pattern - 1)


def _experts(keys: _Keys, architecture: str, implied: dict, shapes: Mapping[str, tuple[int, ...]]) -> MoEConfig:
    count = keys.get("expert_count", int, 0) if architecture in WITH_EXPERTS else 0
    if not count:
        return MoEConfig()
    size = keys.get("feed_forward_length", int, 0)
    settings = implied | {
        "num_experts": count,
        "experts_per_token": keys.get("expert_used_count", int),
        "expert_size": keys.get("expert_feed_forward_length", int, size),
    }
    if architecture == "deepseek2":
        gating = keys.get("expert_gating_func", int, 0) or SOFTMAX
        if gating not in (SOFTMAX, SIGMOID):
            raise ConfigError(f"deepseek2.expert_gating_func = {gating}: must be 1 (softmax) or 2 (sigmoid).")
        settings |= {
            "scoring": "sigmoid" if gating == SIGMOID else "softmax",
            "group_score": "top2_sum" if gating == SIGMOID else "max",
            "normalize_weights": keys.get("expert_weights_norm", bool, False),
            "use_router_bias": any(name.endswith("exp_probs_b.bias") for name in shapes),
            "num_shared_experts": keys.get("expert_shared_count", int, 0),
            "routed_scaling_factor": keys.get("expert_weights_scale", float, 0.0) or 1.0,
            "num_groups": keys.get("expert_group_count", int, 0) or 1,
            "groups_per_token": keys.get("expert_group_used_count", int, 0) or 1,
        }
    return MoEConfig(**settings)
