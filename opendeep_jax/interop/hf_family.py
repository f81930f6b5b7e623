"""Model families of the hub: tables that pair their names with ours, and two functions for what tables can't express.

A family lists the keys of config.json that are fields of ours (`fields`), what they mean when they are absent
(`defaults`), the keys that may only have one value (`fixed`), the fields that all its models share (`implied`), and
where the files hold a block's arrays (`block`). `read` and `write` do the rest: rotation, layer types, routing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ModelConfig

Raw = Mapping[str, Any]
"""The contents of a config.json, without the keys that are null."""


class Fused(NamedTuple):
    """One tensor of the files with a layer's experts side by side, in our order of dimensions."""

    name: str
    first: int = 0
    """The first of its columns (its last dimension) that are this array's."""
    step: int = 1
    """Distance from one of them to the next."""


TOP = {
    "embedding.embedding": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "final_norm.bias": "model.norm.bias",
    "head.kernel": "lm_head.weight",
}
"""Names of the arrays outside the blocks in most families."""


@dataclass(frozen=True)
class Family:
    """A family; see the module. Keys are config.json's, fields are ModelConfig's with dots (`attention.num_heads`)."""

    model_type: str
    architecture: str
    fields: Mapping[str, str]
    block: Mapping[str, str | Fused]
    read: Callable[[Raw], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    understood: tuple[str, ...] = ()
    """Further keys that `read` looks at."""
    harmless: tuple[str, ...] = ()
    """Keys that change nothing, whatever their value: settings of training, or what transformers passes over, too."""
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    """Names of the arrays outside the blocks in the files."""
    layers: str = "model.layers."
    """Prefix of a block's tensors, before its number."""
    names_in_files: Callable[[str], str | None] = lambda name: name
    """A tensor's name in the files as the tables have it; None for one that is no part of the language model."""


GROUPED_QUERY_ATTENTION = {
    "attention.query": "self_attn.q_proj.weight",
    "attention.key": "self_attn.k_proj.weight",
    "attention.value": "self_attn.v_proj.weight",
    "attention.out": "self_attn.o_proj.weight",
    "attention.query_bias": "self_attn.q_proj.bias",
    "attention.key_bias": "self_attn.k_proj.bias",
    "attention.value_bias": "self_attn.v_proj.bias",
    "attention.out_bias": "self_attn.o_proj.bias",
    "attention.query_norm.scale": "self_attn.q_norm.weight",
    "attention.key_norm.scale": "self_attn.k_norm.weight",
}
FEED_FORWARD = {
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.down": "mlp.down_proj.weight",
    "mlp.gate_bias": "mlp.gate_proj.bias",
    "mlp.up_bias": "mlp.up_proj.bias",
    "mlp.down_bias": "mlp.down_proj.bias",
}
EXPERTS = {
    "moe.router": "mlp.gate.weight",
    "moe.gate": "mlp.experts.{expert}.gate_proj.weight",
    "moe.up": "mlp.experts.{expert}.up_proj.weight",
    "moe.down": "mlp.experts.{expert}.down_proj.weight",
}
PRE_NORMS = {
    "attention_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
}

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "mlp_size",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_std",
    "max_position_embeddings": "context_length",
    "tie_word_embeddings": "tie_embeddings",
    "num_attention_heads": "attention.num_heads",
}
"""Keys that mean the same in every family of grouped-query attention."""
DEFAULTS = {"initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
IMPLIED = {"attention.kind": "gqa", "attention.rope.interleaved": False}

SLIDING, FULL = "sliding_attention", "full_attention"


def require(raw: Raw, key: str, value: Any) -> None:
    """Raise ConfigError if the key is there with another value."""
    if key in raw and raw[key] != value:
        raise ConfigError(f"{key} = {raw[key]!r}: only {value!r} can be read. This variant is not implemented here.")


def integer(raw: Raw, key: str) -> int:
    """Return the whole number of at least 1 under a key. Raises ConfigError for anything else."""
    value = raw.get(key)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{key} = {value!r}: must be a whole number of at least 1. Correct the key.")
    return value


def number(raw: Raw, key: str, default: float | None = None) -> float:
    """Return the number under a key. Raises ConfigError for anything else."""
    value = raw.get(key, default)
    if type(value) not in (int, float):
        raise ConfigError(f"{key} = {value!r}: must be a number. Correct the key.")
    return value


def boolean(raw: Raw, key: str) -> bool:
    """Return whether a key is there and true. Raises ConfigError for anything but true and false."""
    value = raw.get(key, False)
    if type(value) is not bool:
        raise ConfigError(f"{key} = {value!r}: must be true or false. Correct the key.")
    return value


def read_heads(raw: Raw, head_dim: int = 0) -> dict[str, Any]:
    """Key/value heads and the size of a head, where a config.json may leave both to the others.

    Args:
        head_dim: What the family takes where the key is absent; 0 divides hidden_size among the heads.
    """
    heads = integer(raw, "num_attention_heads")
    if "head_dim" in raw:
        head_dim = integer(raw, "head_dim")
    elif not head_dim:
        head_dim, rest = divmod(integer(raw, "hidden_size"), heads)
        if rest:
            raise ConfigError(
                f"hidden_size = {raw['hidden_size']}: must be a multiple of num_attention_heads = {heads} where "
                "head_dim is absent. Add head_dim."
            )
    kv_heads = integer(raw, "num_key_value_heads") if "num_key_value_heads" in raw else heads
    return {"attention.num_kv_heads": kv_heads, "attention.head_dim": head_dim}


def write_heads(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `read_heads` reads."""
    return {"num_key_value_heads": config.attention.num_kv_heads, "head_dim": config.attention.head_dim}


def read_biases(raw: Raw) -> dict[str, Any]:
    """attention_bias, which stands for all four projections."""
    bias = boolean(raw, "attention_bias")
    return {"attention.qkv_bias": bias, "attention.out_bias": bias}


def write_biases(config: ModelConfig) -> dict[str, Any]:
    """Return the key that `read_biases` reads."""
    return {"attention_bias": config.attention.qkv_bias}


def read_layer_types(raw: Raw, is_sliding: Callable[[int], bool]) -> dict[str, Any]:
    """Return which layers have sliding windows, and their size.

    Args:
        is_sliding: By a layer's index, where config.json doesn't list layer_types.

    Raises:
        ConfigError: another number of layer types than layers, an unknown type, or no window for those that slide.
    """
    layers = integer(raw, "num_hidden_layers")
    types = raw.get("layer_types")
    if types is None:
        # A config.json may claim any number of layers; no list of them is made before the files are looked at.
        sliding = tuple(layer for layer in range(min(layers, 100_000)) if is_sliding(layer))
    else:
        if not isinstance(types, list) or len(types) != layers or not all(t in (SLIDING, FULL) for t in types):
            raise ConfigError(
                f"layer_types: must list {SLIDING!r} or {FULL!r} for each of num_hidden_layers = {layers} layers. "
                "Correct the two keys."
            )
        sliding = tuple(layer for layer, kind in enumerate(types) if kind == SLIDING)
    if not sliding:
        return {}
    return {"attention.sliding_layers": sliding, "attention.window": integer(raw, "sliding_window")}


def write_layer_types(config: ModelConfig) -> dict[str, Any]:
    """The keys that `read_layer_types` reads; without a window, transformers needs its own default rather than none."""
    attention = config.attention
    types = [SLIDING if layer in attention.sliding_layers else FULL for layer in range(config.num_layers)]
    return {"layer_types": types} | ({"sliding_window": attention.window} if attention.window else {})
