"""Sizes and work of a model, from its configuration alone.

Counts are exact for parameters; FLOPs count the matmuls (2 per multiply-add), which is what MFU is measured with.
"""

from collections import Counter
from typing import NamedTuple

from opendeep_jax.config.schema import ModelConfig


class ParameterCount(NamedTuple):
    """Numbers of parameters, without router biases. Embedding and head are counted in both `total` and `active`."""

    total: int
    """All of the main model. V3: 671.03B."""
    active: int
    """Those that one token passes through: all but the routed experts that it did not choose. V3: 37.55B."""
    mtp: int
    """The MTP modules' own, beside the shared embedding and head."""


def layer_kinds(config: ModelConfig) -> tuple[tuple[str, int], ...]:
    """Kinds of layers with their number, MTP's included: the letters of `layer_pattern` that a layer consists of.

    A usual block is of two, attention and a feed-forward: DeepSeek-V3 has (("*-", 3), ("*E", 59)).
    """
    if config.layer_pattern:
        return tuple(Counter(config.layer_pattern).items())
    mtp = config.mtp.depth
    dense, moe = config.num_leading_dense_layers, config.num_moe_layers
    kinds = (("*-", dense), ("*E", moe + mtp)) if config.moe.num_experts else (("*-", dense + mtp),)
    return tuple((kind, count) for kind, count in kinds if count)


def remat_field(kind: str) -> str:
    """The field of RematConfig that a kind of layer, one of `layer_kinds`, goes by."""
    return "moe" if "E" in kind else "dense"


def mixer_matmul_parameters(config: ModelConfig, mixer: str, experts: int) -> int:
    """Weights of the matrices of the mixer with this letter, so many of a mixture's routed experts counted."""
    return {
        "M": lambda: mamba_matmul_parameters(config),
        "*": lambda: attention_matmul_parameters(config),
        "-": lambda: feed_forward_matmul_parameters(config),
        "E": lambda: experts_matmul_parameters(config, experts),
    }[mixer]()


def attention_matmul_parameters(config: ModelConfig) -> int:
    """Weights of one attention's projections, norms not counted."""
    a, D = config.attention, config.hidden_size
    if a.kind == "gqa":
        return D * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)
    query = a.num_heads * a.qk_head_dim
    queries = D * a.q_lora_rank + a.q_lora_rank * query if a.q_lora_rank else D * query
    latent = D * (a.kv_lora_rank + a.qk_rope_head_dim)
    return queries + latent + a.num_heads * (a.kv_lora_rank * (a.qk_nope_head_dim + a.v_head_dim) + a.v_head_dim * D)


def _block_parameters(config: ModelConfig, is_moe: bool, experts: int) -> int:
    """One block's parameters with so many routed experts counted."""
    norms = (4 if config.norm_placement == "both" else 2) * _norm_parameters(config, config.hidden_size)
    feed_forward = _experts_parameters(config, experts) if is_moe else _feed_forward_parameters(config)
    return _attention_parameters(config) + norms + feed_forward


def _attention_parameters(config: ModelConfig) -> int:
    a = config.attention
    vectors = a.kv_lora_rank + a.q_lora_rank if a.kind == "mla" else _gqa_vectors(config)
    return attention_matmul_parameters(config) + vectors


def _experts_parameters(config: ModelConfig, experts: int) -> int:
    """Return the parameters of a mixture of experts, with this many routed experts counted."""
    moe, D = config.moe, config.hidden_size
    vectors = moe.num_experts * moe.router_linear_bias + experts * (2 * moe.expert_size + D) * moe.expert_bias
    shared = _feed_forward_biases(config, moe.shared_size) if moe.num_shared_experts else 0
    return experts_matmul_parameters(config, experts) + vectors + shared


def _feed_forward_parameters(config: ModelConfig) -> int:
    return feed_forward_matmul_parameters(config) + _feed_forward_biases(config, config.mlp_size)


def _feed_forward_biases(config: ModelConfig, size: int) -> int:
    return ((1 + config.gated_mlp) * size + config.hidden_size) * config.mlp_bias


def feed_forward_matmul_parameters(config: ModelConfig) -> int:
    """Weights of a dense feed-forward."""
    return (3 if config.gated_mlp else 2) * config.hidden_size * config.mlp_size


def experts_matmul_parameters(config: ModelConfig, experts: int) -> int:
    """Weights of a mixture's router, shared experts and so many routed ones."""
    moe, D = config.moe, config.hidden_size
    projections = 3 if config.gated_mlp else 2
    return D * moe.num_experts + projections * D * (moe.shared_size + moe.expert_size * experts)


def mamba_matmul_parameters(config: ModelConfig) -> int:
    """Weights of a Mamba-2 mixer's two projections."""
    mamba = config.mamba
    return config.hidden_size * (2 * mamba.size + mamba.conv_size + mamba.num_heads)


def _mamba_parameters(config: ModelConfig) -> int:
    mamba = config.mamba
    convolution = mamba.conv_size * (mamba.conv_kernel + mamba.conv_bias)
    return mamba_matmul_parameters(config) + convolution + 3 * mamba.num_heads + mamba.size


def _layers_parameters(config: ModelConfig, experts: int) -> int:
    """All layers with so many of each mixture's routed experts counted."""
    if not config.layer_pattern:
        dense = config.num_leading_dense_layers * _block_parameters(config, False, 0)
        return dense + config.num_moe_layers * _block_parameters(config, True, experts)
    mixers = {
        "M": _mamba_parameters(config),
        "*": _attention_parameters(config),
        "-": _feed_forward_parameters(config),
        "E": _experts_parameters(config, experts),
    }
    norms = config.num_layers * _norm_parameters(config, config.hidden_size)
    return norms + sum(mixers[kind] for kind in config.layer_pattern)


def _norm_parameters(config: ModelConfig, size: int) -> int:
    return 2 * size if config.norm == "layer_zero_centered" else size


def _gqa_vectors(config: ModelConfig) -> int:
    """Biases, norms of queries and keys, and sinks."""
    a = config.attention
    normed = {"none": 0, "head": 2, "all_heads": a.num_heads + a.num_kv_heads}[a.qk_norm] * a.head_dim
    biases = a.qkv_bias * (a.num_heads + 2 * a.num_kv_heads) * a.head_dim + a.out_bias * config.hidden_size
    return biases + a.sinks * a.num_heads + (_norm_parameters(config, normed) if normed else 0)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of the model that `Decoder(config)` builds."""
    D, moe = config.hidden_size, config.moe
    outside = config.vocab_size * D * (1 if config.tie_embeddings else 2) + _norm_parameters(config, D)

    def main_model(experts: int) -> int:
        return outside + _layers_parameters(config, experts)

    module = (
        2 * D * D + 3 * _norm_parameters(config, D) + _block_parameters(config, moe.num_experts > 0, moe.num_experts)
    )
    return ParameterCount(
        total=main_model(moe.num_experts),
        active=main_model(moe.experts_per_token),
        mtp=config.mtp.depth * module,
    )


class Flops(NamedTuple):
    """FLOPs per token of a training step's matmuls."""

    weights: float
    """Tokens against weights: routed experts only as chosen, head included, embedding look-up free."""
    attention: float
    """Queries against keys and probabilities against values, and Mamba-2's positions against positions and states."""

    @property
    def total(self) -> float:
        """Both parts."""
        return self.weights + self.attention


def flops_per_token(config: ModelConfig, length: int, backward: bool = True, causal: bool = True) -> Flops:
    """FLOPs per token at a sequence length, MTP modules included.

    Args:
        length: tokens in a row, taken as one document.
        backward: count forward and backward (three times the forward), or the forward alone.
        causal: count the (length + 1) / 2 keys that a query sees on average; False counts all `length` keys.
    """
    D, moe, a = config.hidden_size, config.moe, config.attention
    head = D * config.vocab_size
    mixers = "".join(kind * count for kind, count in layer_kinds(config))
    weights = sum(
        mixer_matmul_parameters(config, mixer, moe.experts_per_token) * mixers.count(mixer) for mixer in set(mixers)
    )
    weights += head + config.mtp.depth * (2 * D * D + head)
    keys = (length + 1) / 2 if causal else length
    sliding = len(a.sliding_layers)
    if a.window:  # of a row's queries the first ones see fewer
        seen = min(a.window, length)
        windowed = (seen * (seen + 1) / 2 + (length - seen) * seen) / length if causal else seen
    seen_by_all = (mixers.count("*") - sliding) * keys + (sliding * windowed if sliding else 0)
    core = seen_by_all * a.num_heads * (a.qk_head_dim + a.value_head_dim)
    core += mixers.count("M") * _state_space_products(config, length)
    times = 3 if backward else 1
    return Flops(weights=2.0 * weights * times, attention=2.0 * core * times)


def _state_space_products(config: ModelConfig, length: int) -> float:
    """Multiply-adds per token of Mamba-2's matmuls: a chunk's positions against each other, and the states."""
    mamba = config.mamba
    positions = min(mamba.chunk_size, length)
    return positions * (mamba.num_groups * mamba.state_size + mamba.size) + 2 * mamba.size * mamba.state_size
