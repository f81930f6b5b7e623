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
    "1b": Size(hidden_size=2048, num_layers=16, num_heads=16, num_kv_heads=16, mlp_size=8192),
    "7b": Size(hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32, mlp_size=11_008),
    "13b": Size(hidden_size=5120, num_layers=40, num_heads=40, num_kv_heads=40, mlp_size=13_824),
    "32b": Size(hidden_size=5120, num_layers=64, num_heads=40, num_kv_heads=8, mlp_size=27_648),
}


def get_config(size: str = "7b") -> RunConfig:
    """Fine-tuning of one of SIZES."""
    s = SIZES[size]
    model = ModelConfig(
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
    )
    return fine_tuning(f"olmo2-{size}", model)
