"""Sizes and work of a model, from its configuration alone.

Counts are exact for parameters; FLOPs count the matmuls (2 per multiply-add), which is what MFU is measured with.
"""

from typing import NamedTuple

from opendeep_jax.config.schema import ModelConfig


class ParameterCount(NamedTuple):
    """How many parameters, router biases not counted. Embedding and head are counted in both `total` and `active`."""

    total: int
    """All of the main model. V3: 671.03B."""
    active: int
    """Those that one token passes through: all but the routed experts that it did not choose. V3: 37.55B."""
    mtp: int
    """The MTP modules' own, beside the shared embedding and head."""


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
    a, moe, D = config.attention, config.moe, config.hidden_size
    norms = (4 if config.norm_placement == "both" else 2) * _norm_parameters(config, D)
    norms += a.kv_lora_rank + a.q_lora_rank if a.kind == "mla" else _gqa_vectors(config)
    projections = 3 if config.gated_mlp else 2
    if is_moe:
        feed_forward = D * moe.num_experts + 3 * D * moe.expert_size * experts
        feed_forward += projections * D * moe.expert_size * moe.num_shared_experts
        feed_forward += moe.num_experts * moe.router_linear_bias
        feed_forward += experts * (2 * moe.expert_size + D) * moe.expert_bias
    else:
        feed_forward = projections * D * config.mlp_size
    return attention_matmul_parameters(config) + norms + feed_forward


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
        dense = config.num_leading_dense_layers * _block_parameters(config, False, 0)
        return outside + dense + config.num_moe_layers * _block_parameters(config, True, experts)

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
    """Queries against keys and probabilities against values."""

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
    attention, projections = attention_matmul_parameters(config), 3 if config.gated_mlp else 2
    experts = 3 * moe.experts_per_token + projections * moe.num_shared_experts
    moe_feed_forward = D * moe.num_experts + D * moe.expert_size * experts
    dense_block = attention + projections * D * config.mlp_size
    moe_block = attention + moe_feed_forward
    head = D * config.vocab_size
    module = 2 * D * D + (moe_block if moe.num_experts else dense_block) + head
    weights = config.num_leading_dense_layers * dense_block + config.num_moe_layers * moe_block + head
    weights += config.mtp.depth * module
    keys = (length + 1) / 2 if causal else length
    layers = config.num_layers + config.mtp.depth
    sliding = len(a.sliding_layers)
    if a.window:  # of a row's queries the first ones see fewer
        seen = min(a.window, length)
        windowed = (seen * (seen + 1) / 2 + (length - seen) * seen) / length if causal else seen
    seen_by_all = (layers - sliding) * keys + (sliding * windowed if sliding else 0)
    core = seen_by_all * a.num_heads * (a.qk_head_dim + a.value_head_dim)
    times = 3 if backward else 1
    return Flops(weights=2.0 * weights * times, attention=2.0 * core * times)
