"""Qwen3: dense models from 0.6B to 32B parameters, and mixtures of experts of 30B and 235B. A fine-tuning run.

Paper:     Qwen3 Technical Report (arXiv:2505.09388).
Text:      yours: jsonl files with a field `text` under corpus/ (--data.sources.0.path=... says otherwise).
Command:   opendeep import hf Qwen/Qwen3-8B --config=qwen3:8b --out=runs/qwen3
           opendeep train --config=runs/qwen3/recipe.py --workdir=runs/qwen3
Hardware:  dense: accelerators that share the weights and the optimizer's state, 16 bytes for each parameter, a
           number that divides 64. With experts 8 of them, or a multiple.
Time:      not measured yet.
Expected:  not measured yet.

The 0.6B's and 1.7B's files hold the head beside the embedding; it is the same array. The base models' context_length is
32,768.

`import` brings the weights and the tokenizer; trained as it stands, `--config=qwen3`, the recipe starts from random
weights and takes corpus/tokenizer.json. The settings of training are a cautious start for fine-tuning: a rate of 1e-5
with a short warm-up, 1000 steps of 64 rows.
"""

from typing import NamedTuple

from opendeep_jax.config.fine_tuning import fine_tuning
from opendeep_jax.config.schema import (
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    RematConfig,
    RopeConfig,
    RunConfig,
)


class Size(NamedTuple):
    """Settings that differ between the models; mlp_size is an expert's where there are experts."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_size: int
    tied: bool = False
    num_experts: int = 0


SIZES = {
    "0.6b": Size(hidden_size=1024, num_layers=28, num_heads=16, num_kv_heads=8, mlp_size=3072, tied=True),
    "1.7b": Size(hidden_size=2048, num_layers=28, num_heads=16, num_kv_heads=8, mlp_size=6144, tied=True),
    "4b": Size(hidden_size=2560, num_layers=36, num_heads=32, num_kv_heads=8, mlp_size=9728, tied=True),
    "8b": Size(hidden_size=4096, num_layers=36, num_heads=32, num_kv_heads=8, mlp_size=12_288),
    "14b": Size(hidden_size=5120, num_layers=40, num_heads=40, num_kv_heads=8, mlp_size=17_408),
    "32b": Size(hidden_size=5120, num_layers=64, num_heads=64, num_kv_heads=8, mlp_size=25_600),
    "30b-a3b": Size(hidden_size=2048, num_layers=48, num_heads=32, num_kv_heads=4, mlp_size=768, num_experts=128),
    "235b-a22b": Size(hidden_size=4096, num_layers=94, num_heads=64, num_kv_heads=4, mlp_size=1536, num_experts=128),
}


def get_config(size: str = "8b") -> RunConfig:
    """Fine-tuning of one of SIZES."""
    s = SIZES[size]
    experts = MoEConfig(
        num_experts=s.num_experts,
        experts_per_token=8,
        num_shared_experts=0,
        expert_size=s.mlp_size,
        scoring="softmax",
        use_router_bias=False,
        balance_loss_weight=0.001,
    )
    model = ModelConfig(
        vocab_size=151_936,
        hidden_size=s.hidden_size,
        num_layers=s.num_layers,
        num_dense_layers=0 if s.num_experts else s.num_layers,
        mlp_size=s.mlp_size,
        norm_epsilon=1e-6,
        context_length=40_960,
        init_std=0.02,
        tie_embeddings=s.tied,
        attention=AttentionConfig(
            kind="gqa",
            num_heads=s.num_heads,
            num_kv_heads=s.num_kv_heads,
            head_dim=128,
            qk_norm="head",
            rope=RopeConfig(theta=1_000_000.0, interleaved=False),
        ),
        moe=experts if s.num_experts else MoEConfig(),
        remat=RematConfig(dense="full", moe="full"),
    )
    return fine_tuning(f"qwen3-{size}", model, parallel=ParallelConfig(fsdp=-1, expert=8 if s.num_experts else 1))
