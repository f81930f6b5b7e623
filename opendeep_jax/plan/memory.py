"""Memory of one device in plain arithmetic, by what it is for. An estimate: the compiler's figure is beside it.

Letters: D model width, F expert width, E experts, K experts per token, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

from opendeep_jax.config.rules import MESH_AXES, ROW_AXES
from opendeep_jax.config.schedule import Stage, micro_batches
from opendeep_jax.config.schema import (
    ExecutionConfig,
    ModelConfig,
    ParallelConfig,
    RematConfig,
    RunConfig,
)
from opendeep_jax.models.accounting import count_parameters, layer_kinds, mixer_matmul_parameters, remat_field

SIZES = {"float32": 4, "bfloat16": 2}


class LayerWeights(NamedTuple):
    """Parameters of one layer, norms not counted."""

    rest: int
    """Attention or Mamba-2, shared experts or dense feed-forward, router."""
    experts: int
    """All routed experts."""


def layer_weights(model: ModelConfig, kind: str) -> LayerWeights:
    """Parameters of a layer of one of `layer_kinds`."""
    rest, whole = (
        sum(mixer_matmul_parameters(model, mixer, experts) for mixer in kind) for experts in (0, model.moe.num_experts)
    )
    return LayerWeights(rest, whole - rest)


def routed_parameters(model: ModelConfig) -> int:
    """Parameters of all routed experts, MTP's included."""
    return sum(count * layer_weights(model, kind).experts for kind, count in layer_kinds(model))


def micros_of(config: RunConfig, stage: Stage, axes: dict[str, int]) -> int:
    """Micro-batches of a stage's batches on a mesh with these axes."""
    return micro_batches(config.train, stage.batch_size, math.prod(axes[axis] for axis in ROW_AXES))


def local_tokens(config: RunConfig, stage: Stage, axes: dict[str, int]) -> float:
    """Tokens of a micro-batch on one device."""
    shards = math.prod(axes[axis] for axis in ("data", "fsdp", "expert", "context", "tensor"))
    return stage.batch_size * stage.length / micros_of(config, stage, axes) / shards


def memory_by_component(config: RunConfig, stage: Stage, axes: dict[str, int]) -> dict[str, float]:
    """Bytes on one device by what they are for.

    Args:
        axes: size of each mesh axis (`axis_sizes`).
    """
    model = config.model
    D, V, moe = model.hidden_size, model.vocab_size, model.moe
    width = SIZES[model.dtype]
    counted, routed = count_parameters(model), routed_parameters(model)
    shards = axes["fsdp"] * axes["tensor"] * axes["stage"]
    local = (counted.total + counted.mtp - routed) / shards + routed / (shards * axes["expert"])
    tokens = local_tokens(config, stage, axes)
    # Micro-batches of a pipeline that wait.
    in_flight = min(axes["stage"], micros_of(config, stage, axes))
    blocks = [layer_weights(model, kind) for kind, _ in layer_kinds(model)]
    gathered = max(block.rest + block.experts / axes["expert"] for block in blocks) / axes["tensor"]
    widest = max(_widest(model, kind) for kind, _ in layer_kinds(model))
    heads = 4 * model.attention.num_heads * model.attention.qk_head_dim
    rows = tokens * moe.experts_per_token if moe.num_experts else 0
    padded = model.execution.exchange_buffer if axes["expert"] > 1 else 1.0
    return {
        "weights": local * SIZES[model.weight_dtype],
        "gradients": local * SIZES[model.weight_dtype],
        "optimizer": _optimizer_bytes(config, axes),
        "activations": tokens * in_flight * _kept(model, axes) * width,
        "one block": tokens * (4 * D + heads + widest) * width,
        "expert rows": rows * padded * 2 * (2 * D + 3 * moe.expert_size) * width,
        "gathered weights": (2 if axes["fsdp"] > 1 else 1) * gathered * width,
        "logits": 2 * min(config.train.loss_chunk, tokens) * V * 4,
    }


def _optimizer_bytes(config: RunConfig, axes: dict[str, int]) -> int:
    """Return the bytes of the optimizer's state, from the arrays and shardings that the run would have."""
    from jax.sharding import AbstractMesh

    from opendeep_jax.train.state import bytes_on_each_device, placed_state

    # What cannot change the optimizer's state is left out, so that it is looked up for many layouts at once.
    plain = dataclasses.replace(config.model, remat=RematConfig(), execution=ExecutionConfig())
    train = dataclasses.replace(config.train, accumulation_steps=1, rows_per_device=0)
    plain = dataclasses.replace(config, model=plain, parallel=ParallelConfig(), train=train)
    definition, state = _abstract_state(plain)
    mesh = AbstractMesh(tuple(axes[axis] for axis in MESH_AXES), MESH_AXES)
    zero_1 = config.parallel.shard_optimizer_over_replicas
    return bytes_on_each_device(placed_state(state, definition, mesh, zero_1).opt_state)


@functools.cache
def _abstract_state(config: RunConfig):
    """A run's definition and the shapes of its first state."""
    import jax

    from opendeep_jax.models.parameters import model_definition
    from opendeep_jax.train.optimizer import make_optimizer
    from opendeep_jax.train.state import init_state

    definition = model_definition(config.model)
    return definition, jax.eval_shape(lambda: init_state(config, make_optimizer(config, definition.axes())))


def _widest(model: ModelConfig, kind: str) -> int:
    """Values per token inside a layer's feed-forward or Mamba-2: what goes in, what comes out and what is between."""
    mamba = model.mamba.size + model.mamba.conv_size if "M" in kind else 0
    return 3 * max(model.mlp_size if "-" in kind else 0, model.moe.shared_size if "E" in kind else 0, mamba)


def _kept(model: ModelConfig, axes: dict[str, int]) -> float:
    """Values per token that a device keeps for the backward pass."""
    from opendeep_jax.train.summary import kept_activations

    return kept_activations(model) / axes["stage"]


def num_blocks(model: ModelConfig) -> float:
    """All blocks, MTP's included; a hybrid's layer, of one mixer, is half a block."""
    return sum(layers * len(kind) / 2 for kind, layers in layer_kinds(model))


def recomputed_share(model: ModelConfig) -> float:
    """Matmuls of the forward pass that the backward pass repeats, as a share of them."""
    shares = {"none": 0.0, "full": 1.0}
    named = 1 - min(1.0, sum(name in model.remat.names for name in _MATMUL_NAMES) / len(_MATMUL_NAMES))
    total = 0.0
    for kind, layers in layer_kinds(model):
        total += layers * len(kind) / 2 * shares.get(getattr(model.remat, remat_field(kind)), named)
    return total / num_blocks(model)


_MATMUL_NAMES = ("query", "key_value", "attention_output", "mlp_gate", "expert_gate", "expert_up")
"""Activations that dear matmuls give."""


class MemoryFix(NamedTuple):
    """A change of the configuration, and the bytes that it would save on each device."""

    setting: str
    saves: float


def memory_fixes(config: RunConfig, stage: Stage, axes: dict[str, int]) -> list[MemoryFix]:
    """Settings that would need less memory, by arithmetic; the one that saves most first."""
    rows = stage.batch_size // (
        config.train.accumulation_steps * math.prod(axes[a] for a in ("data", "fsdp", "expert"))
    )
    before = sum(memory_by_component(config, stage, axes).values())
    changes: dict[str, RunConfig] = {}

    def change(setting: str, part: str, **values) -> None:
        changes[setting] = _replaced(config, part, **values)

    if rows % 2 == 0 and rows > 1:
        steps = 2 * config.train.accumulation_steps
        change(f"--train.accumulation_steps={steps}", "train", accumulation_steps=steps)
    for kind in sorted({remat_field(kind) for kind, _ in layer_kinds(config.model)}):
        if getattr(config.model.remat, kind) != "full":
            change(f"--model.remat.{kind}=full", "model.remat", **{kind: "full"})
    for field in ("first_moment_dtype", "second_moment_dtype"):
        if getattr(config.optimizer, field) == "float32":
            change(f"--optimizer.{field}=bfloat16", "optimizer", **{field: "bfloat16"})
    if config.model.weight_dtype == "float32":
        change("--model.weight_dtype=bfloat16", "model", weight_dtype="bfloat16")
    if config.train.loss_chunk > 256:
        change("--train.loss_chunk=256", "train", loss_chunk=256)
    found = [
        MemoryFix(setting, before - sum(memory_by_component(changed, stage, axes).values()))
        for setting, changed in changes.items()
    ]
    if axes["data"] > 1:
        merged = {**axes, "fsdp": axes["fsdp"] * axes["data"], "data": 1}
        setting = f"--parallel.data=1 --parallel.fsdp={merged['fsdp']}"
        found.append(MemoryFix(setting, before - sum(memory_by_component(config, stage, merged).values())))
    return sorted((fix for fix in found if fix.saves > 0), key=lambda fix: -fix.saves)


def _replaced(config, part: str, **values):
    """`config` with fields of a (nested) part replaced."""
    if not part:
        return dataclasses.replace(config, **values)
    first, _, rest = part.partition(".")
    return dataclasses.replace(config, **{first: _replaced(getattr(config, first), rest, **values)})
