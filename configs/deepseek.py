"""DeepSeek's released models and those of the same architecture, with their long contexts. A fine-tuning run.

Paper:     DeepSeek-V2 (arXiv:2405.04434), V3 (arXiv:2412.19437), R1 (arXiv:2501.12948), Moonlight (arXiv:2502.16982),
           Kimi K2 (arXiv:2507.20534).
Text:      yours: jsonl files with a field `text` under corpus/ (--data.sources.0.path=... says otherwise).
Command:   opendeep import hf moonshotai/Moonlight-16B-A3B --config=deepseek:moonlight --out=runs/deepseek
           opendeep train --config=runs/deepseek/recipe.py --workdir=runs/deepseek
Hardware:  8 accelerators or a multiple that divides 64, which share the experts; 12 bytes for each parameter.
Time:      not measured yet.
Expected:  not measured yet.

R1 has V3's architecture. The pretraining runs of V2-Lite and V3 are the recipes deepseek_v2_lite and deepseek_v3.

`import` brings the weights and the tokenizer; trained as it stands, `--config=deepseek`, the recipe starts from random
weights and takes corpus/tokenizer.json. The settings of training are a cautious start for fine-tuning: a rate of 1e-5
with a short warm-up, 1000 steps of 64 rows.
"""

from typing import NamedTuple

from opendeep_jax.config.fine_tuning import fine_tuning
from opendeep_jax.config.schema import (
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    ParallelConfig,
    RematConfig,
    RopeConfig,
    RunConfig,
)


class Size(NamedTuple):
    """Settings that differ between the models."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    mlp_size: int
    num_heads: int
    moe: MoEConfig
    rope: RopeConfig
    num_dense_layers: int = 1
    q_lora_rank: int = 0
    norm_epsilon: float = 1e-6
    context_length: int = 163_840
    mtp_depth: int = 0


def v2_experts(count: int, groups: int, groups_per_token: int, size: int, scale: float) -> MoEConfig:
    """V2's experts: softmax, balanced by a loss."""
    return MoEConfig(
        num_experts=count,
        experts_per_token=6,
        num_shared_experts=2,
        expert_size=size,
        num_groups=groups,
        groups_per_token=groups_per_token,
        scoring="softmax",
        normalize_weights=False,
        routed_scaling_factor=scale,
        group_score="max",
        use_router_bias=False,
        balance_loss_weight=0.001,
    )


V2_ROPE = RopeConfig(yarn_factor=40.0, yarn_mscale=0.707, yarn_mscale_all_dim=0.707)
V3 = Size(
    vocab_size=129_280,
    hidden_size=7168,
    num_layers=61,
    num_dense_layers=3,
    mlp_size=18_432,
    num_heads=128,
    q_lora_rank=1536,
    moe=MoEConfig(
        num_experts=256,
        experts_per_token=8,
        expert_size=2048,
        num_groups=8,
        groups_per_token=4,
        routed_scaling_factor=2.5,
    ),
    rope=RopeConfig(yarn_factor=40.0),
    mtp_depth=1,
)
SIZES = {
    "v2-lite": Size(
        vocab_size=102_400,
        hidden_size=2048,
        num_layers=27,
        mlp_size=10_944,
        num_heads=16,
        moe=v2_experts(count=64, groups=1, groups_per_token=1, size=1408, scale=1.0),
        rope=V2_ROPE,
    ),
    "v2": Size(
        vocab_size=102_400,
        hidden_size=5120,
        num_layers=60,
        mlp_size=12_288,
        num_heads=128,
        q_lora_rank=1536,
        moe=v2_experts(count=160, groups=8, groups_per_token=3, size=1536, scale=16.0),
        rope=V2_ROPE,
    ),
    "v3": V3,
    "r1": V3,
    "moonlight": Size(
        vocab_size=163_840,
        hidden_size=2048,
        num_layers=27,
        mlp_size=11_264,
        num_heads=16,
        moe=MoEConfig(
            num_experts=64, experts_per_token=6, num_shared_experts=2, expert_size=1408, routed_scaling_factor=2.446
        ),
        rope=RopeConfig(theta=50_000.0),
        norm_epsilon=1e-5,
        context_length=8192,
    ),
    "kimi-k2": Size(
        vocab_size=163_840,
        hidden_size=7168,
        num_layers=61,
        mlp_size=18_432,
        num_heads=64,
        q_lora_rank=1536,
        moe=MoEConfig(num_experts=384, experts_per_token=8, expert_size=2048, routed_scaling_factor=2.827),
        rope=RopeConfig(theta=50_000.0, yarn_factor=32.0, yarn_beta_fast=1.0),
        context_length=131_072,
    ),
}


def get_config(size: str = "moonlight") -> RunConfig:
    """Fine-tuning of one of SIZES."""
    s = SIZES[size]
    model = ModelConfig(
        vocab_size=s.vocab_size,
        hidden_size=s.hidden_size,
        num_layers=s.num_layers,
        num_dense_layers=s.num_dense_layers,
        mlp_size=s.mlp_size,
        norm_epsilon=s.norm_epsilon,
        context_length=s.context_length,
        attention=AttentionConfig(
            num_heads=s.num_heads,
            q_lora_rank=s.q_lora_rank,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope=s.rope,
        ),
        moe=s.moe,
        mtp=MTPConfig(depth=s.mtp_depth),
        remat=RematConfig(dense="full", moe="full"),
    )
    return fine_tuning(f"deepseek-{size}", model, parallel=ParallelConfig(fsdp=-1, expert=8), moments="bfloat16")
