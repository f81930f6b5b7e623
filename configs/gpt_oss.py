"""gpt-oss: mixtures of experts of 20B and 120B parameters, 3.6B and 5.1B of them active. A fine-tuning run.

Paper:     gpt-oss-120b & gpt-oss-20b Model Card (arXiv:2508.10925).
Text:      yours: jsonl files with a field `text` under corpus/ (--data.sources.0.path=... says otherwise).
Command:   opendeep import hf openai/gpt-oss-20b --config=gpt_oss:20b --out=runs/gpt_oss
           opendeep train --config=runs/gpt_oss/recipe.py --workdir=runs/gpt_oss
Hardware:  8 accelerators or a multiple that divides 64, which share the experts; 16 bytes for each parameter.
Time:      not measured yet.
Expected:  not measured yet.

The files hold the experts in MXFP4; they are read into bfloat16 and trained in full.

`import` brings the weights and the tokenizer; trained as it stands, `--config=gpt_oss`, the recipe starts from random
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
    """Settings that differ between the models."""

    num_layers: int
    num_experts: int


SIZES = {
    "20b": Size(num_layers=24, num_experts=32),
    "120b": Size(num_layers=36, num_experts=128),
}


def get_config(size: str = "20b") -> RunConfig:
    """Fine-tuning of one of SIZES."""
    s = SIZES[size]
    model = ModelConfig(
        vocab_size=201_088,
        hidden_size=2880,
        num_layers=s.num_layers,
        num_dense_layers=0,
        mlp_size=2880,
        norm_epsilon=1e-5,
        activation="clamped_swiglu",
        context_length=131_072,
        init_std=0.02,
        attention=AttentionConfig(
            kind="gqa",
            num_heads=64,
            num_kv_heads=8,
            head_dim=64,
            qkv_bias=True,
            out_bias=True,
            sinks=True,
            window=128,
            sliding_layers=tuple(range(0, s.num_layers, 2)),
            rope=RopeConfig(
                theta=150_000.0,
                interleaved=False,
                yarn_factor=32.0,
                yarn_original_length=4096,
                yarn_mscale=1.0,
                yarn_mscale_all_dim=0.0,
                yarn_truncate=False,
            ),
        ),
        moe=MoEConfig(
            num_experts=s.num_experts,
            experts_per_token=4,
            num_shared_experts=0,
            expert_size=2880,
            scoring="softmax",
            use_router_bias=False,
            router_linear_bias=True,
            expert_bias=True,
        ),
        remat=RematConfig(moe="full"),
    )
    return fine_tuning(f"gpt_oss-{size}", model, parallel=ParallelConfig(fsdp=-1, expert=8))
