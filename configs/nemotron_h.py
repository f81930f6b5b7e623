"""Nemotron-H, Nemotron Nano 2 and Nemotron 3 Nano: hybrids of Mamba-2 and attention, 4B to 56B. A fine-tuning run.

Paper:     Nemotron-H (arXiv:2504.03624), Nemotron Nano 2 (arXiv:2508.14444), Nemotron 3 Nano (arXiv:2512.20848).
Text:      yours: jsonl files with a field `text` under corpus/ (--data.sources.0.path=... says otherwise).
Command:   opendeep import hf nvidia/Nemotron-H-8B-Base-8K --config=nemotron_h:8b --out=runs/nemotron_h
           opendeep train --config=runs/nemotron_h/recipe.py --workdir=runs/nemotron_h
Hardware:  accelerators that share the weights and the optimizer's state, 16 bytes for each parameter, a number that
           divides 64. A hybrid is divided over data and fsdp only.
Time:      not measured yet.
Expected:  not measured yet.

Every layer is one mixer: M is Mamba-2, * attention without rotation, - a feed-forward of squared ReLU, E a mixture of
such experts. `import` brings the weights and the tokenizer; trained as it stands, `--config=nemotron_h`, the recipe
starts from random weights and takes corpus/tokenizer.json. The settings of training are a cautious start for
fine-tuning: a rate of 1e-5 with a short warm-up, 1000 steps of 64 rows.
"""

from typing import NamedTuple

from opendeep_jax.config.fine_tuning import fine_tuning
from opendeep_jax.config.schema import (
    AttentionConfig,
    MambaConfig,
    ModelConfig,
    MoEConfig,
    RematConfig,
    RopeConfig,
    RunConfig,
)

EXPERTS = MoEConfig(
    num_experts=128,
    experts_per_token=6,
    num_shared_experts=1,
    shared_expert_size=3712,
    expert_size=1856,
    routed_scaling_factor=2.5,
)
"""Experts of Nemotron 3 Nano; routed as in DeepSeek-V3."""


class Size(NamedTuple):
    """Settings that differ between the models."""

    pattern: str
    hidden_size: int
    mlp_size: int
    num_heads: int
    mamba_heads: int
    state_size: int = 128
    mamba_head_dim: int = 64
    num_kv_heads: int = 8
    context_length: int = 8192
    moe: MoEConfig = MoEConfig()


PATTERN_52 = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
SIZES = {
    "4b": Size(pattern=PATTERN_52, hidden_size=3072, mlp_size=12_288, num_heads=32, mamba_heads=112),
    "8b": Size(pattern=PATTERN_52, hidden_size=4096, mlp_size=21_504, num_heads=32, mamba_heads=128),
    "47b": Size(
        pattern="M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-",
        hidden_size=8192,
        mlp_size=30_720,
        num_heads=64,
        mamba_heads=256,
        state_size=256,
    ),
    "56b": Size(
        pattern="M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-",
        hidden_size=8192,
        mlp_size=32_768,
        num_heads=64,
        mamba_heads=256,
        state_size=256,
    ),
    "nano2_9b": Size(
        pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        hidden_size=4480,
        mlp_size=15_680,
        num_heads=40,
        mamba_heads=128,
        mamba_head_dim=80,
        context_length=131_072,
    ),
    "nano2_12b": Size(
        pattern="M-M-M-M*-" * 6 + "M-M-M-M-",
        hidden_size=5120,
        mlp_size=20_480,
        num_heads=40,
        mamba_heads=128,
        mamba_head_dim=80,
        context_length=131_072,
    ),
    "nano3_30b": Size(
        pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        hidden_size=2688,
        mlp_size=1856,
        num_heads=32,
        mamba_heads=64,
        num_kv_heads=2,
        context_length=262_144,
        moe=EXPERTS,
    ),
}


def get_config(size: str = "8b") -> RunConfig:
    """Fine-tuning of one of SIZES."""
    s = SIZES[size]
    model = ModelConfig(
        vocab_size=131_072,
        hidden_size=s.hidden_size,
        num_layers=len(s.pattern),
        layer_pattern=s.pattern,
        mlp_size=s.mlp_size,
        norm_epsilon=1e-5,
        activation="relu2",
        gated_mlp=False,
        context_length=s.context_length,
        init_std=0.02,
        attention=AttentionConfig(
            kind="gqa",
            num_heads=s.num_heads,
            num_kv_heads=s.num_kv_heads,
            head_dim=128,
            rotated=False,
            rope=RopeConfig(interleaved=False),
        ),
        mamba=MambaConfig(
            num_heads=s.mamba_heads,
            head_dim=s.mamba_head_dim,
            state_size=s.state_size,
            num_groups=8,
            conv_kernel=4,
            chunk_size=128,
        ),
        moe=s.moe,
        remat=RematConfig(dense="full", moe="full"),
    )
    return fine_tuning(f"nemotron-h-{size}", model)
