"""A run described from its configuration alone: parameters, memory, work, schedule, text. Nothing is prepared."""

import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh

from opendeep_jax.config.checks import check_devices
from opendeep_jax.config.rules import MESH_AXES, axis_sizes
from opendeep_jax.config.schedule import length_at, stages, tokens_before, total_steps
from opendeep_jax.config.schema import ModelConfig, RunConfig
from opendeep_jax.display.numbers import human_bytes, human_count
from opendeep_jax.display.tables import key_value_table
from opendeep_jax.models.accounting import count_parameters, flops_per_token
from opendeep_jax.models.parameters import Arrays
from opendeep_jax.train.setup import assemble
from opendeep_jax.train.state import bytes_on_each_device
from opendeep_jax.train.summary import memory_estimate, vocabulary

PARTS = {
    "/mtp.": "MTP modules",
    "/embedding.": "embedding",
    "/head.": "head",
    ".attention.": "attention",
    ".mamba.": "Mamba-2",
    ".moe.shared.": "shared experts",
    ".moe.router": "routers",
    ".moe.": "routed experts",
    ".mlp.": "feed-forward",
    "norm.": "norms",
    "": "other",
}
"""Parts of a model, by the first of these pieces that a weight's name, after a slash, has."""


def parameter_parts(config: ModelConfig, params: Arrays) -> dict[str, dict[str, int]]:
    """Return the parameters of each part of a model, `total` and `active`: those that one token passes through.

    Args:
        params: the (abstract) weights by name.
    """
    chosen = config.moe.experts_per_token / config.moe.num_experts if config.moe.num_experts else 0.0
    shares = {"routed experts": chosen, "MTP modules": 0.0}
    parts: dict[str, dict[str, int]] = {}
    for name, weight in params.items():
        part = next(part for piece, part in PARTS.items() if piece in f"/{name}")
        count = parts.setdefault(part, {"total": 0, "active": 0})
        count["total"] += math.prod(weight.shape)
        count["active"] += round(math.prod(weight.shape) * shares.get(part, 1.0))
    return {part: parts[part] for part in PARTS.values() if part in parts}


def describe(config: RunConfig, devices: int = 0, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a run is, as nested plain values that JSON takes; bytes, FLOPs and tokens are exact or estimated as
    `models.accounting` and `train.summary.memory_estimate` have them.

    Args:
        devices: how many it is to run on; 0 takes as many as the fixed axes of its mesh have.
        data: of a run that has begun, what its data.json says.

    Raises:
        ConfigError: the mesh does not take so many devices, or the batches do not divide over them.
    """
    devices = devices or math.prod(size for size in axis_sizes(config.parallel).values() if size != -1)
    check_devices(config, devices)
    mesh = AbstractMesh(tuple(axis_sizes(config.parallel, devices).values()), MESH_AXES)
    state = assemble(config, mesh).template
    count, steps = count_parameters(config.model), total_steps(config)
    flops, batch = flops_per_token(config.model, length_at(config, 0)), stages(config)
    shapes = [
        {
            "first_step": stage.first_step + 1,
            "steps": int(min(stage.steps, steps - stage.first_step)),
            "rows": stage.batch_size,
            "length": stage.length,
            "tokens_per_step": stage.batch_size * stage.length,
            "flops_per_step": flops_per_token(config.model, stage.length).total * stage.batch_size * stage.length,
        }
        for stage in batch
        if stage.first_step < steps and stage.steps > 0
    ]
    total_flops = sum(shape["flops_per_step"] * shape["steps"] for shape in shapes)
    return {
        "name": config.name,
        "parameters": {
            "total": count.total,
            "active": count.active,
            "mtp": count.mtp,
            "parts": parameter_parts(config.model, state.params),
        },
        "model": {
            "layers": config.model.num_layers,
            "width": config.model.hidden_size,
            "attention": config.model.attention.kind,
            "vocabulary": config.model.vocab_size,
            "context": config.model.max_length,
        },
        "memory": {
            "devices": devices,
            "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
            "state_bytes_per_device": bytes_on_each_device(state),
            "bytes_per_device": {name: round(size) for name, size in memory_estimate(config, state, devices).items()},
        },
        "schedule": {
            "steps": steps,
            "tokens": tokens_before(config, steps),
            "optimizer": config.optimizer.kind,
            "learning_rate": config.optimizer.learning_rate,
            "schedule": config.optimizer.schedule,
            "warmup_steps": config.optimizer.warmup_steps,
            "batches": shapes,
        },
        "work": {
            "flops_per_token": flops.total,
            "attention_share": flops.attention / flops.total,
            "flops_of_the_run": total_flops,
        },
        "data": {
            "tokenizer": config.data.tokenizer,
            "packing": config.data.packing,
            "sources": [
                {"name": source.name, "path": source.path, "weight": source.weight, "license": source.known_license}
                for source in config.data.sources
            ],
            "prepared_tokens": (data or {}).get("train_tokens"),
            "vocab_size": (data or {}).get("vocab_size"),
        },
    }


def description_table(described: dict[str, Any]) -> str:
    """Return a description (`describe`) as aligned columns."""
    parameters, memory, schedule = (described[part] for part in ("parameters", "memory", "schedule"))
    model, work, data = (described[part] for part in ("model", "work", "data"))
    total = sum(memory["bytes_per_device"].values())
    mesh = " x ".join(f"{axis} {size}" for axis, size in memory["mesh"].items())
    where = f"each of {memory['devices']:,} devices ({mesh})" if memory["devices"] > 1 else "the device"
    rows = [
        (described["name"], ""),
        ("model", f"{model['layers']} layers of width {model['width']:,}, attention {model['attention']}"),
        ("vocabulary", _vocabulary(model["vocabulary"], data)),
        ("context length", f"{model['context']:,} tokens"),
        ("Parameters", ""),
        ("all", f"{_of(parameters['total'])}  {_of(parameters['active'])} active per token"),
        *(
            (part, f"{_of(count['total'])}" + f"  {_of(count['active'])} active" * (count["active"] != count["total"]))
            for part, count in parameters["parts"].items()
        ),
        (f"Memory of {where}, by arithmetic", ""),
        *((part, f"{human_bytes(size):>12}") for part, size in memory["bytes_per_device"].items()),
        ("sum", f"{human_bytes(total):>12}, of it kept between steps {human_bytes(memory['state_bytes_per_device'])}"),
        ("Training", ""),
        ("length", f"{schedule['steps']:,} steps, {human_count(schedule['tokens'])} tokens"),
        *(("batch", _batch(batch, len(schedule["batches"]) > 1)) for batch in schedule["batches"]),
        (
            "optimizer",
            f"{schedule['optimizer']}, rate {schedule['learning_rate']:.3g} ({schedule['schedule']}, "
            f"{schedule['warmup_steps']:,} steps of warm-up)",
        ),
        (
            "work",
            f"{work['flops_per_token']:.3g} FLOPs per token ({work['attention_share']:.0%} in attention), "
            f"{work['flops_of_the_run']:.3g} in all",
        ),
        ("Text", ""),
        *((source["name"], _source(source, data["sources"])) for source in data["sources"]),
        ("packing", data["packing"]),
    ]
    if data["prepared_tokens"]:
        rows.append(("prepared", f"{human_count(data['prepared_tokens'])} tokens"))
    return key_value_table(rows)


def _vocabulary(rows: int, data: dict[str, Any]) -> str:
    if data["vocab_size"]:
        return vocabulary(data["tokenizer"], data["vocab_size"], rows)
    return f"{rows:,} rows, tokenizer {data['tokenizer']}"


def _of(count: int) -> str:
    return f"{human_count(count):>9}"


def _batch(batch: dict[str, Any], several: bool) -> str:
    text = f"{batch['rows']:,} rows of {batch['length']:,}: {human_count(batch['tokens_per_step'])} tokens, "
    text += f"{batch['flops_per_step']:.3g} FLOPs a step"
    return text + f" ({batch['steps']:,} steps from {batch['first_step']:,})" * several


def _source(source: dict[str, Any], all_sources: list[dict[str, Any]]) -> str:
    weight = sum(other["weight"] for other in all_sources)
    share = f"{source['weight'] / weight:.0%} of the tokens, " if len(all_sources) > 1 and weight else ""
    place = source["path"] or "the Python sources of this interpreter"
    return f"{place} ({share}license: {source['license']})"
