"""OLMo 3: 7B and 32B parameters, three local layers for each global one, 65,536 tokens. A fine-tuning run.

Paper:     Olmo 3 (arXiv:2512.13961).
Text:      yours: jsonl files with a field `text` under corpus/ (--data.sources.0.path=... says otherwise).
Command:   opendeep import hf allenai/Olmo-3-1025-7B --config=olmo3:7b --out=runs/olmo3
           opendeep train --config=runs/olmo3/recipe.py --workdir=runs/olmo3
Hardware:  accelerators that share the weights and the optimizer's state, 16 bytes for each parameter, a number that
           divides 64.
Time:      not measured yet.
Expected:  not measured yet.

The sliding layers keep the plain rotation; the global ones stretch it with YaRN.

`import` brings the weights and the tokenizer; trained as it stands, `--config=olmo3`, the recipe starts from random
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


SIZES = {
    "7b": Size(hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32, mlp_size=11_008),
    "32b": Size(hidden_size=5120, num_layers=64, num_heads=40, num_kv_heads=8, mlp_size=27_648),
}


def get_config(size: str = "7b") -> RunConfig:
    """Fine-tuning of one of SIZES."""
    s = SIZES[size]
    model = ModelConfig(
        vocab_size=100_278,
        hidden_size=s.hidden_size,
        num_layers=s.num_layers,
        mlp_size=s.mlp_size,
        norm_epsilon=1e-6,
        norm_placement="post",
        context_length=65_536,
        init_std=0.02,
        attention=AttentionConfig(
            kind="gqa",
            num_heads=s.num_heads,
            num_kv_heads=s.num_kv_heads,
            head_dim=128,
            qk_norm="all_heads",
            window=4096,
            sliding_layers=tuple(layer for layer in range(s.num_layers) if layer % 4 != 3),
            sliding_rope_theta=500_000.0,
            rope=RopeConfig(
                theta=500_000.0,
                interleaved=False,
                yarn_factor=8.0,
                yarn_original_length=8192,
                yarn_mscale=1.0,
                yarn_mscale_all_dim=0.0,
            ),
        ),
        remat=RematConfig(dense="full"),
    )
    return fine_tuning(f"olmo3-{size}", model)
