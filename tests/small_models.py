"""Small models, batches and runs that the tests share. Sizes are as small as keeps every mechanism at work."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from xla_flags import QUICK

from opendeep_jax.config.schema import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ExecutionConfig,
    MambaConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    RopeConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from opendeep_jax.data.batch import Batch
from opendeep_jax.models.moe import RouterBias
from opendeep_jax.models.parameters import Arrays, ModelDefinition, model_definition

MLA = AttentionConfig(num_heads=2, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
MOE = MoEConfig(
    num_experts=8,
    experts_per_token=3,
    num_shared_experts=1,
    expert_size=8,
    num_groups=4,
    groups_per_token=2,
    routed_scaling_factor=2.5,
    balance_loss_weight=1e-2,
)
V3 = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    num_layers=3,
    num_dense_layers=1,
    mlp_size=32,
    init_std=0.05,
    dtype="float32",
    attention=MLA,
    moe=MOE,
    mtp=MTPConfig(depth=1),
    execution=ExecutionConfig(grouped_matmul="ragged_dot"),
)
"""A DeepSeek-V3: one dense and two MoE layers, and a MTP module. What CPUs take unasked, `blocks`, takes twice as long
to compile and has a suite of its own."""

V2 = dataclasses.replace(
    V3,
    attention=dataclasses.replace(MLA, q_lora_rank=0),
    moe=dataclasses.replace(
        MOE,
        scoring="softmax",
        normalize_weights=False,
        group_score="max",
        use_router_bias=False,
        routed_scaling_factor=1.0,
        num_shared_experts=2,
    ),
    mtp=MTPConfig(),
)
GQA = dataclasses.replace(
    V3, attention=AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=4), mtp=MTPConfig()
)
DENSE = dataclasses.replace(GQA, moe=MoEConfig(), tie_embeddings=True)
GEMMA = dataclasses.replace(
    DENSE,
    norm="rms_zero_centered",
    norm_placement="both",
    activation="gelu_tanh",
    embedding_scale=4.0,
    logit_softcap=3.0,
    attention=dataclasses.replace(
        DENSE.attention,
        qk_norm="head",
        query_scale=0.7,
        logit_softcap=2.0,
        window=5,
        sliding_layers=(0, 2),
        sliding_rope_theta=100.0,
        rope=RopeConfig(interleaved=False, linear_factor=8.0),
    ),
)
"""Gemma's ways: norms on both sides and around 1, windows with their own rotation, soft caps."""

GPT_OSS = dataclasses.replace(
    GQA,
    num_dense_layers=0,
    activation="clamped_swiglu",
    swiglu_limit=0.5,
    attention=dataclasses.replace(
        GQA.attention,
        qkv_bias=True,
        out_bias=True,
        sinks=True,
        window=6,
        sliding_layers=(0, 2),
        rope=RopeConfig(interleaved=False),
    ),
    moe=MoEConfig(
        num_experts=8,
        experts_per_token=3,
        num_shared_experts=0,
        expert_size=8,
        scoring="softmax",
        use_router_bias=False,
        router_linear_bias=True,
        expert_bias=True,
        balance_loss_weight=1e-2,
    ),
)
"""gpt-oss's: biases, sinks, every other layer with a window, a clamped SwiGLU."""

OLMO = dataclasses.replace(
    DENSE,
    tie_embeddings=False,
    norm_placement="post",
    mlp_bias=True,
    attention=dataclasses.replace(DENSE.attention, qk_norm="all_heads", window=4, sliding_layers=(1,)),
)
"""OLMo's, and biases in the feed-forwards, which Llama's may have."""
NEMOTRON = dataclasses.replace(
    DENSE,
    norm="layer_zero_centered",
    activation="relu2",
    gated_mlp=False,
    attention=dataclasses.replace(DENSE.attention, rotary_dim=2, rope=RopeConfig(interleaved=False)),
)
NEMOTRON_H = dataclasses.replace(
    NEMOTRON,
    norm="rms",
    num_layers=7,
    layer_pattern="ME*-MEM",
    tie_embeddings=False,
    mamba=MambaConfig(num_heads=6, head_dim=4, state_size=5, num_groups=3, conv_kernel=3, chunk_size=6),
    moe=dataclasses.replace(MOE, shared_expert_size=12),
)
"""Nemotron-H's: layers of four kinds, experts without a gate. Here attention rotates, so that positions matter."""

FAMILIES = {
    "v3": V3,
    "v2": V2,
    "gqa": GQA,
    "dense": DENSE,
    "gemma": GEMMA,
    "gpt-oss": GPT_OSS,
    "olmo": OLMO,
    "nemotron": NEMOTRON,
    "nemotron-h": NEMOTRON_H,
}
"""The one table of small models. Whatever is true of a model of any kind is tested of all that are here: decoder,
parameters, FLOPs, layouts, pipelines, generation, export, plan. A new kind of attention, block or routing is a row."""

OPTIMIZERS = get_args(get_type_hints(OptimizerConfig)["kind"])
"""Every update rule there is, to test what is true of any."""

NO_EXPERTS = {"expert": "this model has no experts"}
SLIDES = {"stage": "a pipeline's layers must be alike, and some of these slide"}
NOT_FOR = {
    "gqa": {"hf": "as qwen3_moe it would lose", "gguf": "values of model.mlp_size"},  # V3's routing, others' attention
    "dense": NO_EXPERTS | {"hf": "would lose attention.rope.interleaved"},
    "gemma": NO_EXPERTS | SLIDES | {"hf": "no Hugging Face form", "gguf": "model.attention.logit_softcap"},  # Gemma 2's
    "gpt-oss": SLIDES | {"gguf": "model.swiglu_limit"},
    "olmo": NO_EXPERTS | SLIDES | {"tensor": "needs all heads on a device"},
    "nemotron": NO_EXPERTS,
    "nemotron-h": {axis: "a hybrid" for axis in ("stage", "context", "tensor")}
    | {"expert": "experts without a gate", "hf": "would lose attention.rope", "gguf": "model.layer_pattern"},
}
"""By family, the parts of the product that refuse it, each with words of its refusal: mesh axes, `hf` and `gguf`. What
isn't listed works, and is tested."""
NOT_FOR["olmo"] |= {"hf": "no Hugging Face form", "gguf": "model.mlp_bias"}  # with Llama's biases


def run_config(model: ModelConfig = V3, length: int = 16, batch_size: int = 8, **changes) -> RunConfig:
    """A run of a small model over bytes; `changes` replace whole parts. The vocabulary may be below the tokenizer's
    262 tokens where no data is opened, so the tokenizer is named by a file that isn't there."""
    parts = {
        "data": DataConfig(tokenizer="none.json", sequence_length=length),
        "optimizer": OptimizerConfig(warmup_steps=0),
        "train": TrainConfig(steps=10, batch_size=batch_size, loss_chunk=12, compilation_cache=""),
    }
    return RunConfig(model=model, **parts | changes)


def random_arrays(definition: ModelDefinition, seed: int = 0, std: float = 0.2) -> tuple[Arrays, Arrays]:
    """Parameters and router biases without compiling an initializer: normal, norm scales around 1."""
    random = np.random.default_rng(seed)

    def draw(name, shape):
        value = random.normal(scale=std, size=shape.shape)
        return jnp.asarray(value + 1 if name.endswith("scale") else value, shape.dtype)

    params = {name: draw(name, shape) for name, shape in definition.shapes(nnx.Param).items()}
    return params, {name: 0.2 * draw(name, shape) for name, shape in definition.shapes(RouterBias).items()}


def random_model(config: ModelConfig, seed: int = 0, std: float = 0.2):
    """A model of random arrays."""
    definition = model_definition(config)
    return definition.model(*random_arrays(definition, seed, std))


def packed_batch(rows: int = 8, length: int = 16, vocab_size: int = 64, seed: int = 0) -> Batch:
    """Rows of packed documents of 1 to 7 tokens, random tokens; the first rows end in padding of different length."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, vocab_size, (rows, length + 1), dtype=np.int32)
    segment_ids, positions = np.zeros((2, rows, length), np.int32)
    loss_mask = np.zeros((rows, length), bool)
    for row in range(rows):
        start, segment, filled = 0, 1, length - max(0, length // 2 - 2 * row)
        while start < filled:
            end = min(start + int(random.integers(1, 8)), filled)
            segment_ids[row, start:end] = segment
            positions[row, start:end] = np.arange(end - start)
            loss_mask[row, start : end - 1] = True
            start, segment = end, segment + 1
    padding = segment_ids == 0
    targets = np.where(padding, 0, tokens[:, 1:])
    return Batch(
        tokens=np.where(padding, 0, tokens[:, :-1]),
        targets=targets,
        loss_mask=loss_mask,
        segment_ids=segment_ids,
        positions=positions,
    )


def measured_and_gradients(config: RunConfig, definition: ModelDefinition, router_bias: Arrays, batch: Batch):
    """A function of params: the loss and what else is measured, and gradients, as a device's program has them."""
    from opendeep_jax.faults.health import new_health
    from opendeep_jax.train.objective import pretraining
    from opendeep_jax.train.state import TrainState
    from opendeep_jax.train.step import device_arguments, local_gradients

    def of_params(params):
        state = TrainState(jnp.int32(0), params, (), router_bias, new_health())
        arguments, _ = device_arguments(config, definition, pretraining(config), state, batch)
        gradients, measured = local_gradients(config, definition, pretraining(config), arguments)
        return (measured.metrics["loss"].value, measured), gradients

    return of_params


def dense_attention(query, key, value, segment_ids, scale):
    """Causal attention in a segment as it is written down, all scores at once. Shapes as in flash_mla/blocks.py."""
    length, shared = query.shape[1], query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, shared, axis=2) for x in (key, value))
    visible = jnp.tril(jnp.ones((length, length), bool)) & (segment_ids[:, :, None] == segment_ids[:, None])
    scores = jnp.where(visible[:, None], scale * jnp.einsum("blhq,bmhq->bhlm", query, key), -jnp.inf)
    return jnp.einsum("bhlm,bmhv->blhv", jax.nn.softmax(scores, axis=-1), value)


def compiled(function, *arguments):
    """Calls a function compiled as a whole: one program instead of one for each of its operations."""
    return jax.jit(function)(*arguments)


def write_text(root: Path, documents: int = 40) -> Path:
    """Small Python files below `root`: different, but alike enough for a small model to learn something."""
    names = ("value", "count", "name", "path", "number", "größe", "text")
    for i in range(documents):
        lines = [
            f"def {names[(i + j) % 7]}_{j}({names[j % 7]}):\n    return {names[j % 7]} + {i * j % 9}\n"
            for j in range(3 + i % 5)
        ]
        (root / f"module_{i}.py").write_text(f"import {names[i % 5]}\n\n" + "\n".join(lines), encoding="utf-8")
    return root


def small_run_config(corpus: Path, prepared: Path, **train) -> RunConfig:
    """A run of 24 steps over the bytes of a corpus; the keywords replace fields of `train`."""
    settings = {"steps": 24, "batch_size": 8, "loss_chunk": 20, "log_every": 2, "sample_every": 12, "sample_tokens": 4}
    settings |= {"compiler_options": QUICK[:1], "compilation_cache": "", "sample_prompts": ("import ", "def ")}
    return RunConfig(
        name="small",
        model=dataclasses.replace(V3, vocab_size=264, hidden_size=32, num_layers=3, context_length=64),
        data=DataConfig(
            sources=(SourceConfig("corpus", str(corpus), license="CC0-1.0", epochs=1000.0),),
            tokenizer="bytes",
            directory=str(prepared),
            sequence_length=32,
            held_out_fraction=0.2,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
        train=TrainConfig(**settings | train),
        evaluation=EvaluationConfig(every=12, batches=2),
        checkpoint=CheckpointConfig(every=8),
    )


@contextlib.contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """Training inside takes `steps` steps and is interrupted before the next, as by Ctrl-C."""
    from opendeep_jax.train import loop

    put, left = loop.put_batch, iter(range(steps))

    def put_batch(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return put(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "put_batch", put_batch)
        yield
