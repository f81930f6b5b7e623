"""OLMo 2: 1B to 32B parameters, with weights, data and code in the open. A fine-tuning run.

Paper:     2 OLMo 2 Furious (arXiv:2501.00656).
Text:      yours: jsonl files with a field `text` under corpus/ (--data.sources.0.path=... says otherwise).
Command:   opendeep import hf allenai/OLMo-2-1124-7B --config=olmo2:7b --out=runs/olmo2
           opendeep train --config=runs/olmo2/recipe.py --workdir=runs/olmo2
Hardware:  accelerators that share the weights and the optimizer's state, 16 bytes for each parameter, a number that
           divides 64.
Time:      not measured yet.
Expected:  not measured yet.

`import` brings the weights and the tokenizer; trained as it stands, `--config=olmo2`, the recipe starts from random
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
    num_kv_heads: int
    mlp_size: int


SIZES = {
    "1b": Size(2048, 16, 16, 16, 8192),
    "7b": Size(4096, 32, 32, 32, 11_008),
    "13b": Size(5120, 40, 40, 40, 13_824),
    "32b": Size(5120, 64, 40, 8, 27_648),
}


def get_config(size: str = "7b") -> RunConfig:
    """Fine-tuning of one of SIZES."""
    s = SIZES[size]
    return RunConfig(
        name=f"olmo2-{size}",
        model=ModelConfig(
            vocab_size=100_352,
            hidden_size=s.hidden_size,
            num_layers=s.num_layers,
            mlp_size=s.mlp_size,
            norm_epsilon=1e-6,
            norm_placement="post",
            context_length=4096,
            init_std=0.02,
            attention=AttentionConfig(
                kind="gqa",
                num_heads=s.num_heads,
                num_kv_heads=s.num_kv_heads,
                head_dim=128,
                qk_norm="all_heads",
                rope=RopeConfig(theta=500_000.0, interleaved=False),
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
