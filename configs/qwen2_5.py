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

from opendeep_jax.config.fine_tuning import fine_tuning
from opendeep_jax.config.schema import AttentionConfig, ModelConfig, RematConfig, RopeConfig, RunConfig


class Size(NamedTuple):
    """Settings that differ between the models."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_size: int
    vocab_size: int = 152_064
    head_dim: int = 128
    norm_epsilon: float = 1e-6
    context_length: int = 131_072
    tied: bool = False


SIZES = {
    "0.5b": Size(
        vocab_size=151_936,
        hidden_size=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        mlp_size=4864,
        context_length=32_768,
        tied=True,
    ),
    "1.5b": Size(
        vocab_size=151_936, hidden_size=1536, num_layers=28, num_heads=12, num_kv_heads=2, mlp_size=8960, tied=True
    ),
    "3b": Size(
        vocab_size=151_936,
        hidden_size=2048,
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
        mlp_size=11_008,
        context_length=32_768,
        tied=True,
    ),
    "7b": Size(hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4, mlp_size=18_944),
    "14b": Size(hidden_size=5120, num_layers=48, num_heads=40, num_kv_heads=8, mlp_size=13_824, norm_epsilon=1e-5),
    "32b": Size(hidden_size=5120, num_layers=64, num_heads=40, num_kv_heads=8, mlp_size=27_648, norm_epsilon=1e-5),
    "72b": Size(hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, mlp_size=29_568, norm_epsilon=1e-5),
}


def get_config(size: str = "7b") -> RunConfig:
    """Fine-tuning of one of SIZES."""
    s = SIZES[size]
    model = ModelConfig(
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
    )
    return fine_tuning(f"qwen2_5-{size}", model)
