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

from opendeep_jax.config.schema import (
    AttentionConfig,
    DataConfig,
    MambaConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RematConfig,
    RopeConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)

EXPERTS = MoEConfig(
    num_experts=128,
    experts_per_token=6,
    num_shared_experts=1,
    shared_expert_size=3712,
    expert_size=1856,
    routed_scaling_factor=2.5,
)
"""Of Nemotron 3 Nano; chosen as in DeepSeek-V3."""


class Size(NamedTuple):
    """What differs between the models."""

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
    "4b": Size(PATTERN_52, 3072, 12_288, 32, 112),
    "8b": Size(PATTERN_52, 4096, 21_504, 32, 128),
    "47b": Size(
        "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-",
        8192,
        30_720,
        64,
        256,
        state_size=256,
    ),
    "56b": Size("M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-", 8192, 32_768, 64, 256, state_size=256),
    "nano2_9b": Size(
        "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        4480,
        15_680,
        40,
        128,
        mamba_head_dim=80,
        context_length=131_072,
    ),
    "nano2_12b": Size(
        "M-M-M-M*-" * 6 + "M-M-M-M-",
        5120,
        20_480,
        40,
        128,
        mamba_head_dim=80,
        context_length=131_072,
    ),
    "nano3_30b": Size(
        "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        2688,
        1856,
        32,
        64,
        num_kv_heads=2,
        context_length=262_144,
        moe=EXPERTS,
    ),
}


def get_config(size: str = "8b") -> RunConfig:
    """Fine-tuning of one of SIZES."""
    s = SIZES[size]
    return RunConfig(
        name=f"nemotron-h-{size}",
        model=ModelConfig(
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
                time_step_min=0.001,
                chunk_size=128,
            ),
            moe=s.moe,
            remat=RematConfig(dense="full", moe="full"),
        ),
        data=DataConfig(
            sources=(SourceConfig(name="corpus", path="corpus/**/*.jsonl", license="as each document says"),),
            tokenizer="corpus/tokenizer.json",
            sequence_length=4096,
            held_out_fraction=0.01,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=50),
        train=TrainConfig(steps=1000, batch_size=64, rows_per_device=1),
    )
