"""Nemotron-4 and Minitron: 4B to 340B parameters, squared ReLU without a gate. A fine-tuning run.

Paper:     Nemotron-4 15B (arXiv:2402.16819), Nemotron-4 340B (arXiv:2406.11704), Minitron (arXiv:2407.14679).
Text:      yours: jsonl files with a field `text` under corpus/ (--data.sources.0.path=... says otherwise).
Command:   opendeep import hf nvidia/Minitron-4B-Base --config=nemotron:4b --out=runs/nemotron
           opendeep train --config=runs/nemotron/recipe.py --workdir=runs/nemotron
Hardware:  accelerators that share the weights and the optimizer's state, 16 bytes for each parameter, a number that
           divides 64.
Time:      not measured yet.
Expected:  not measured yet.

4B and 8B (Minitron) are as their files say. 15B and 340B are as the reports say, which leave the base and the share of
the rotation to be taken from the others.

`import` brings the weights and the tokenizer; trained as it stands, `--config=nemotron`, the recipe starts from random
weights and takes corpus/tokenizer.json. The settings of training are a cautious start for fine-tuning: a rate of 1e-5
with a short warm-up, 1000 steps of 64 rows.
"""

from typing import NamedTuple

from opendeep_jax.config.fine_tuning import fine_tuning
from opendeep_jax.config.schema import AttentionConfig, ModelConfig, RematConfig, RopeConfig, RunConfig


class Size(NamedTuple):
    """Settings that differ between the models."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    head_dim: int = 128


SIZES = {
    "4b": Size(hidden_size=3072, num_layers=32, num_heads=24, mlp_size=9216),
    "8b": Size(hidden_size=4096, num_layers=32, num_heads=48, mlp_size=16_384),
    "15b": Size(hidden_size=6144, num_layers=32, num_heads=48, mlp_size=24_576),
    "340b": Size(hidden_size=18_432, num_layers=96, num_heads=96, head_dim=192, mlp_size=73_728),
}


def get_config(size: str = "4b") -> RunConfig:
    """Fine-tuning of one of SIZES."""
    s = SIZES[size]
    model = ModelConfig(
        vocab_size=256_000,
        hidden_size=s.hidden_size,
        num_layers=s.num_layers,
        mlp_size=s.mlp_size,
        norm_epsilon=1e-5,
        norm="layer_zero_centered",
        activation="relu2",
        gated_mlp=False,
        context_length=4096,
        init_std=0.0134,
        attention=AttentionConfig(
            kind="gqa",
            num_heads=s.num_heads,
            num_kv_heads=8,
            head_dim=s.head_dim,
            rotary_dim=s.head_dim // 2,
            rope=RopeConfig(theta=10_000.0, interleaved=False),
        ),
        remat=RematConfig(dense="full"),
    )
    return fine_tuning(f"nemotron-{size}", model)
