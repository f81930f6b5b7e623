"""Gemma 3, text models: 270M to 27B parameters, five local layers for each global one. A fine-tuning run.

Paper:     Gemma 3 Technical Report (arXiv:2503.19786).
Text:      yours: jsonl files with a field `text` under corpus/ (--data.sources.0.path=... says otherwise).
Command:   opendeep import hf google/gemma-3-1b-pt --config=gemma3:1b --out=runs/gemma3
           opendeep train --config=runs/gemma3/recipe.py --workdir=runs/gemma3
Hardware:  accelerators that share the weights and the optimizer's state, 16 bytes for each parameter, a number that
           divides 64.
Time:      not measured yet.
Expected:  not measured yet.

From 4B on the files have an image encoder too, which is left out.

`import` brings the weights and the tokenizer; trained as it stands, `--config=gemma3`, the recipe starts from random
weights and takes corpus/tokenizer.json. The settings of training are a cautious start for fine-tuning: a rate of 1e-5
with a short warm-up, 1000 steps of 64 rows.
"""

from typing import NamedTuple

from opendeep_jax.config.fine_tuning import fine_tuning
from opendeep_jax.config.schema import AttentionConfig, ModelConfig, RematConfig, RopeConfig, RunConfig


class Size(NamedTuple):
    """Settings that differ between the models; query_scalar ** -0.5 is the factor on the scores."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_size: int
    vocab_size: int = 262_208
    head_dim: int = 256
    window: int = 1024
    query_scalar: int = 256
    rope_factor: float = 8.0
    context_length: int = 131_072


SIZES = {
    "270m": Size(
        vocab_size=262_144,
        hidden_size=640,
        num_layers=18,
        num_heads=4,
        num_kv_heads=1,
        mlp_size=2048,
        window=512,
        rope_factor=1.0,
        context_length=32_768,
    ),
    "1b": Size(
        vocab_size=262_144,
        hidden_size=1152,
        num_layers=26,
        num_heads=4,
        num_kv_heads=1,
        mlp_size=6912,
        window=512,
        rope_factor=1.0,
        context_length=32_768,
    ),
    "4b": Size(hidden_size=2560, num_layers=34, num_heads=8, num_kv_heads=4, mlp_size=10_240),
    "12b": Size(hidden_size=3840, num_layers=48, num_heads=16, num_kv_heads=8, mlp_size=15_360),
    "27b": Size(
        hidden_size=5376, num_layers=62, num_heads=32, num_kv_heads=16, head_dim=128, mlp_size=21_504, query_scalar=168
    ),
}


def get_config(size: str = "1b") -> RunConfig:
    """Fine-tuning of one of SIZES."""
    s = SIZES[size]
    model = ModelConfig(
        vocab_size=s.vocab_size,
        hidden_size=s.hidden_size,
        num_layers=s.num_layers,
        mlp_size=s.mlp_size,
        norm_epsilon=1e-6,
        norm="rms_zero_centered",
        norm_placement="both",
        activation="gelu_tanh",
        embedding_scale=s.hidden_size**0.5,
        context_length=s.context_length,
        init_std=0.02,
        tie_embeddings=True,
        attention=AttentionConfig(
            kind="gqa",
            num_heads=s.num_heads,
            num_kv_heads=s.num_kv_heads,
            head_dim=s.head_dim,
            qk_norm="head",
            query_scale=s.query_scalar**-0.5,
            window=s.window,
            sliding_layers=tuple(layer for layer in range(s.num_layers) if layer % 6 != 5),
            sliding_rope_theta=10_000.0,
            rope=RopeConfig(theta=1_000_000.0, interleaved=False, linear_factor=s.rope_factor),
        ),
        remat=RematConfig(dense="full"),
    )
    return fine_tuning(f"gemma3-{size}", model)
