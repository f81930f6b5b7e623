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

from opendeep_jax.config.fine_tuning import fine_tuning
from opendeep_jax.config.schema import AttentionConfig, ModelConfig, RematConfig, RopeConfig, RunConfig


class Size(NamedTuple):
    """Settings that differ between the models."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    head_dim: int = 128
    rope_factor: float = 8.0
    tied: bool = False


SIZES = {
    "1b": Size(hidden_size=2048, num_layers=16, num_heads=32, head_dim=64, mlp_size=8192, rope_factor=32.0, tied=True),
    "3b": Size(hidden_size=3072, num_layers=28, num_heads=24, mlp_size=8192, rope_factor=32.0, tied=True),
    "8b": Size(hidden_size=4096, num_layers=32, num_heads=32, mlp_size=14_336),
    "70b": Size(hidden_size=8192, num_layers=80, num_heads=64, mlp_size=28_672),
    "405b": Size(hidden_size=16_384, num_layers=126, num_heads=128, mlp_size=53_248),
}


def get_config(size: str = "8b") -> RunConfig:
    """Fine-tuning of one of SIZES."""
    s = SIZES[size]
    model = ModelConfig(
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
    )
    return fine_tuning(f"llama3-{size}", model)
