"""Summaries of a run: before the first step and at its end."""

import math
import os
import resource
import sys

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas.target import chip
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schedule import length_at, micro_batches, stages, tokens_before, total_steps
from opendeep_jax.config.schema import ModelConfig, RunConfig
from opendeep_jax.display.numbers import human_bytes, human_count
from opendeep_jax.models.accounting import count_parameters, flops_per_token, layer_kinds, remat_field
from opendeep_jax.parallel.chips import CHIPS
from opendeep_jax.train.cpu_peak import cpu_peak
from opendeep_jax.train.state import TrainState, bytes_on_each_device

OLDER_PEAK_TFLOPS = {"TPU v4": 275}
"""Dense bfloat16 peaks of devices that have no kernels of ours and no plans, by how their `device_kind` begins."""


def peak_flops(config: RunConfig) -> float:
    """FLOP/s of one device that MFU is measured against; 0 if it isn't known.

    On a CPU, what float32 matmuls reach here (`cpu_peak`), shared between the (virtual) devices.
    """
    if config.hardware.peak_tflops:
        return config.hardware.peak_tflops * 1e12
    device = jax.devices()[0]
    if device.platform == "cpu":
        return cpu_peak(config.train.compilation_cache) / jax.device_count()
    if chip() in CHIPS:
        return CHIPS[chip()].per_device().flops
    peaks = [peak for name, peak in OLDER_PEAK_TFLOPS.items() if device.device_kind.startswith(name)]
    return peaks[0] * 1e12 if peaks else 0.0


def memory_estimate(config: RunConfig, state: TrainState, devices: int) -> dict[str, float]:
    """Bytes on one device by plain arithmetic: weights, gradients, moments, and what the backward pass waits for.

    Activations count what each layer keeps under its remat policy; `none` keeps about 2.5 times what the matmuls give.
    The compiler's own buffers come on top.
    """
    model, train, parallel = config.model, config.train, config.parallel
    shards = max(devices // (parallel.stage * parallel.context * parallel.tensor), 1)
    tokens = max(s.batch_size * s.length / micro_batches(train, s.batch_size, shards) for s in stages(config)) / devices
    kept = kept_activations(model)
    return {
        "weights": bytes_on_each_device(state.params),
        "gradients": bytes_on_each_device(state.params),
        "moments": bytes_on_each_device(state.opt_state),
        "activations": tokens * kept * jnp.dtype(model.dtype).itemsize,
        "logits": 2 * min(train.loss_chunk, tokens) * model.vocab_size * 4,
    }


def check_memory(config: RunConfig, state: TrainState, devices: int) -> None:
    """Raise ConfigError where the weights, gradients and moments alone cannot fit, before anything is made."""
    memory = memory_estimate(config, state, devices)
    needed = sum(memory[part] for part in ("weights", "gradients", "moments"))
    present = device_memory_bytes()
    if needed > present:
        raise ConfigError(
            f"{config.name}: weights, gradients and moments take {human_bytes(needed)} on each of {devices} devices, "
            f"and a device has {human_bytes(present)}. Use at least {math.ceil(needed * devices / present):,} such "
            "devices (--parallel.fsdp=-1 divides over all), a smaller model, or bfloat16 for "
            "--optimizer.first_moment_dtype and --optimizer.second_moment_dtype."
        )


def device_memory_bytes() -> int:
    """Memory of one device: its own where it is counted, else this process's share of the host's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def kept_activations(model: ModelConfig) -> float:
    """Values per token that all layers keep for the backward pass, about."""
    total = 0.0
    for kind, layers in layer_kinds(model):
        widths, policy = activation_widths(model, kind), getattr(model.remat, remat_field(kind))
        names = model.remat.names if policy == "named" else () if policy == "full" else widths
        width = model.hidden_size + sum(widths.get(name, 0) for name in names)
        total += layers * width * (2.5 if policy == "none" else 1)
    return total


def activation_widths(model: ModelConfig, kind: str) -> dict[str, int]:
    """Values per token of each activation that a layer names for remat.

    Args:
        kind: of the layer, by the letters of `models.accounting.layer_kinds`.
    """
    a, moe = model.attention, model.moe
    widths = {}
    if "M" in kind:
        widths["mamba_input"] = model.mamba.size + model.mamba.conv_size + model.mamba.num_heads
    if "*" in kind and a.kind == "mla":
        widths |= {
            "q_latent": a.q_lora_rank,
            "kv_latent": a.kv_lora_rank + a.qk_rope_head_dim,
            "key_value": a.num_heads * (a.qk_nope_head_dim + a.v_head_dim),
        }
    elif "*" in kind:
        widths["key_value"] = 2 * a.num_kv_heads * a.head_dim
    if "*" in kind:
        widths |= {"query": a.num_heads * a.qk_head_dim, "attention_output": a.num_heads * (a.value_head_dim + 1)}
    if len(kind) > 1:  # between attention and feed-forward
        widths["residual"] = model.hidden_size
    if "-" in kind:
        widths |= {"mlp_gate": model.mlp_size, "mlp_up": model.mlp_size}
    if "E" in kind:
        shared, routed = moe.shared_size, moe.experts_per_token * moe.expert_size
        widths |= {"mlp_gate": shared, "mlp_up": shared, "expert_gate": routed, "expert_up": routed}
        widths |= {"router_logits": moe.num_experts, "routing": 3 * moe.experts_per_token}
    return widths if model.gated_mlp else {name: size for name, size in widths.items() if not name.endswith("gate")}


def model_rows(
    config: RunConfig, state: TrainState, mesh: Mesh, peak: float, found: list[int]
) -> list[tuple[str, str]]:
    """Rows for `key_value_table`: what is about to be trained, on what, for how long.

    Args:
        state: the (abstract) state, for its shapes and shardings.
        peak: FLOP/s of one device; 0 if it isn't known.
        found: steps of the checkpoints in the work directory.
    """
    count = count_parameters(config.model)
    flops = flops_per_token(config.model, length_at(config, 0))
    memory = memory_estimate(config, state, mesh.size)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    steps = total_steps(config)
    mtp = f" + {human_count(count.mtp)} in MTP modules" if count.mtp else ""
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in memory.items())
    return [
        ("run", f"{config.name}, seed {config.seed}"),
        ("parameters", f"{human_count(count.total)}, {human_count(count.active)} active per token{mtp}"),
        ("FLOPs per token", f"{human_count(flops.total)} ({flops.attention / flops.total:.0%} in attention)"),
        ("devices", f"{jax.device_count()} x {jax.devices()[0].device_kind}: {axes}"),
        ("peak", f"{peak * mesh.size / 1e12:.3g} TFLOP/s" if peak else "unknown: set hardware.peak_tflops for MFU"),
        ("memory per device", f"about {human_bytes(sum(memory.values()))}: {parts}"),
        ("training", f"{steps:,} steps, {human_count(tokens_before(config, steps))} tokens"),
        ("checkpoints", f"resuming from step {found[-1]:,}" if found else "none found"),
    ]


def vocabulary(tokenizer: str, tokens: int, rows: int) -> str:
    """Return how a tokenizer's tokens fill the rows of the embedding: `8,192 tokens, 8,192 rows`, or what is left."""
    found = f"{tokens:,} tokens, {rows:,} rows"
    if tokenizer.startswith("bpe:") and tokens < int(tokenizer.removeprefix("bpe:")):
        found += f": the text has no more of them than that for {tokenizer}"
    if tokens < rows:
        found += f"; {rows - tokens:,} rows ({(rows - tokens) / rows:.0%}) belong to no token and learn nothing"
    return found


def data_rows(config: RunConfig, data: dict) -> list[tuple[str, str]]:
    """Rows on the text, from `Data.describe()`."""
    epochs = ", ".join(f"{source['epochs']:.2f} epochs of {source['name']}" for source in data["sources"])
    rows = [
        (
            "training text",
            f"{human_count(data['train_tokens'])} tokens in {data['train_documents']:,} documents, "
            f"{data['bytes_per_token']:.2f} bytes per token ({data['tokenizer']}); this run takes {epochs}",
        ),
        ("held-out text", f"{human_bytes(data['held_out_bytes'])} in {data['held_out_documents']:,} documents"),
        ("vocabulary", vocabulary(config.data.tokenizer, data["vocab_size"], config.model.vocab_size)),
    ]
    for plan in data["plans"]:
        packed = (
            f"{plan['source']}: {plan['rows']:,} rows of {plan['sequence_length']}, {plan['packing']}, "
            f"{plan['padding']:.2%} padding, {plan['truncated']:.2%} of the documents that fit a row are cut"
        )
        rows.append(("packing", packed))
    if len(data["phases"]) > 1:
        for phase in data["phases"]:
            shape = f"{phase['batch_size']} x {phase['sequence_length']}"
            rows.append((f"phase {phase['name']}", f"{phase['steps']:,} steps of {shape} from {phase['first_step']:,}"))
    if data["left_out"]:
        rows.append(("left out", ", ".join(f"{count:,} {reason}" for reason, count in data["left_out"].items())))
    return rows


def peak_memory_bytes() -> int:
    """Most memory used so far: of a device where it is counted, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
