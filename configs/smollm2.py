"""SmolLM2: 135M, 360M and 1.7B parameters, small enough to fine-tune anywhere. A fine-tuning run.

Paper:     SmolLM2 (arXiv:2502.02737).
Text:      yours: jsonl files with a field `text` under corpus/ (--data.sources.0.path=... says otherwise).
Command:   opendeep import hf HuggingFaceTB/SmolLM2-135M --config=smollm2:135m --out=runs/smollm2
           opendeep train --config=runs/smollm2/recipe.py --workdir=runs/smollm2
Hardware:  accelerators that share the weights and the optimizer's state, 16 bytes for each parameter, a number that
           divides 64.
Time:      not measured yet.
Expected:  not measured yet.

`import` brings the weights and the tokenizer; trained as it stands, `--config=smollm2`, the recipe starts from random
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
    rope_theta: float = 100_000.0


SIZES = {
    "135m": Size(hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, mlp_size=1536),
    "360m": Size(hidden_size=960, num_layers=32, num_heads=15, num_kv_heads=5, mlp_size=2560),
    "1.7b": Size(hidden_size=2048, num_layers=24, num_heads=32, num_kv_heads=32, mlp_size=8192, rope_theta=130_000.0),
}


def get_config(size: str = "135m") -> RunConfig:
    """Fine-tuning of one of SIZES."""
    s = SIZES[size]
    model = ModelConfig(
        vocab_size=49_152,
        hidden_size=s.hidden_size,
        num_layers=s.num_layers,
        mlp_size=s.mlp_size,
        norm_epsilon=1e-5,
        context_length=8192,
        init_std=0.02,
        tie_embeddings=True,
        attention=AttentionConfig(
            kind="gqa",
            num_heads=s.num_heads,
            num_kv_heads=s.num_kv_heads,
            head_dim=64,
            rope=RopeConfig(theta=s.rope_theta, interleaved=False),
        ),
        remat=RematConfig(dense="full"),
    )
    return fine_tuning(f"smollm2-{size}", model)
