"""Qwen2.5: 0.5B to 72B parameters, Llama's architecture with biases. A fine-tuning run of the base models.

Paper:     Qwen2.5 Technical Report (arXiv:2412.15115).
Text:      yours: jsonl files with a field `text` under corpus/ (--data.sources.0.path=... says otherwise).
Command:   opendeep import hf Qwen/Qwen2.5-7B --config=qwen2_5:7b --out=runs/qwen2_5
           opendeep train --config=runs/qwen2_5/recipe.py --workdir=runs/qwen2_5
Hardware:  accelerators that share the weights and the optimizer's state, 16 bytes for each parameter, a number that
           divides 64.
Time:      not measured yet.
Expected:  not measured yet.

The instruction-tuned models have a context_length of 32,768 and a norm_epsilon of 1e-6 in every size; `import` takes
what the files say.

`import` brings the weights and the tokenizer; trained as it stands, `--config=qwen2_5`, the recipe starts from random
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

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    norm_epsilon: float
    context_length: int
    tied: bool


SIZES = {
    "0.5b": Size(151_936, 896, 24, 14, 2, 64, 4864, 1e-6, 32_768, True),
    "1.5b": Size(151_936, 1536, 28, 12, 2, 128, 8960, 1e-6, 131_072, True),
    "3b": Size(151_936, 2048, 36, 16, 2, 128, 11_008, 1e-6, 32_768, True),
    "7b": Size(152_064, 3584, 28, 28, 4, 128, 18_944, 1e-6, 131_072, False),
    "14b": Size(152_064, 5120, 48, 40, 8, 128, 13_824, 1e-5, 131_072, False),
    "32b": Size(152_064, 5120, 64, 40, 8, 128, 27_648, 1e-5, 131_072, False),
    "72b": Size(152_064, 8192, 80, 64, 8, 128, 29_568, 1e-5, 131_072, False),
}


def get_config(size: str = "7b") -> RunConfig:
    """Fine-tuning of one of SIZES."""
    s = SIZES[size]
    return RunConfig(
        name=f"qwen2_5-{size}",
        model=ModelConfig(
            vocab_size=s.vocab_size,
            hidden_size=s.hidden_size,
            num_layers=s.num_layers,
            mlp_size=s.mlp_size,
            norm_epsilon=s.norm_epsilon,
            context_length=s.context_length,
            init_std=0.02,
            tie_embeddings=s.tied,
            attention=AttentionConfig(
                kind="gqa",
                num_heads=s.num_heads,
                num_kv_heads=s.num_kv_heads,
                head_dim=s.head_dim,
                qkv_bias=True,
                rope=RopeConfig(theta=1_000_000.0, interleaved=False),
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
