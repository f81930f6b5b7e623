"""Llama 3.1 and 3.2, text models: 1B to 405B parameters. A fine-tuning run.

Paper:     The Llama 3 Herd of Models (arXiv:2407.21783). The 1B and 3B are of release 3.2, pruned and distilled.
Text:      yours: jsonl files with a field `text` under corpus/ (--data.sources.0.path=... says otherwise).
Command:   opendeep import hf meta-llama/Llama-3.1-8B --config=llama3:8b --out=runs/llama3
           opendeep train --config=runs/llama3/recipe.py --workdir=runs/llama3
Hardware:  accelerators that share the weights and the optimizer's state, 16 bytes for each parameter, a number that
           divides 64.
Time:      not measured yet.
Expected:  not measured yet.

The 405B is as in the files of 8 key/value heads.

`import` brings the weights and the tokenizer; trained as it stands, `--config=llama3`, the recipe starts from random
weights and takes corpus/tokenizer.json. The settings of training are a cautious start for fine-tuning: a rate of 1e-5
with a short warm-up, 1000 steps of 64 rows.
"""

from typing import NamedTuple

from opendeep_jax.config.schema import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RematConfig,
    RopeConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)


class Size(NamedTuple):
    """What differs between the models."""

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    mlp_size: int
    rope_factor: float
    tied: bool


SIZES = {
    "1b": Size(2048, 16, 32, 64, 8192, 32.0, True),
    "3b": Size(3072, 28, 24, 128, 8192, 32.0, True),
    "8b": Size(4096, 32, 32, 128, 14_336, 8.0, False),
    "70b": Size(8192, 80, 64, 128, 28_672, 8.0, False),
    "405b": Size(16_384, 126, 128, 128, 53_248, 8.0, False),
}


def get_config(size: str = "8b") -> RunConfig:
    """Fine-tuning of one of SIZES."""
    s = SIZES[size]
    return RunConfig(
        name=f"llama3-{size}",
        model=ModelConfig(
            vocab_size=128_256,
            hidden_size=s.hidden_size,
            num_layers=s.num_layers,
            mlp_size=s.mlp_size,
            norm_epsilon=1e-5,
            context_length=131_072,
            init_std=0.02,
            tie_embeddings=s.tied,
            attention=AttentionConfig(
                kind="gqa",
                num_heads=s.num_heads,
                num_kv_heads=8,
                head_dim=s.head_dim,
                rope=RopeConfig(
                    theta=500_000.0,
                    interleaved=False,
                    llama3_factor=s.rope_factor,
                    llama3_low_frequency=1.0,
                    llama3_high_frequency=4.0,
                    llama3_original_length=8192,
                ),
            ),
            remat=RematConfig(dense="full"),
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
