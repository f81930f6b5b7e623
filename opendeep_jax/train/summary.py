"""What a run says of itself: before the first step, and when it is over."""

import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from opendeep_jax.config.schedule import tokens_before, total_steps
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.models.accounting import count_parameters, flops_per_token
from opendeep_jax.train.progress import human_bytes, human_count
from opendeep_jax.train.state import TrainState

# Dense bf16 peak of one device as JAX counts devices, TFLOP/s, from the vendors' data sheets.
PEAK_TFLOPS = {
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v5p": 459,
    "TPU v6 lite": 918,
    "TPU7x": 1153,
    "NVIDIA A100": 312,
    "NVIDIA H100": 989,
    "NVIDIA H200": 989,
    "NVIDIA H800": 989,
    "NVIDIA B200": 2250,
}


def peak_flops(config: RunConfig) -> float:
    """FLOP/s of one device that MFU is measured against; 0 if it isn't known.

    On a CPU, what a float32 matmul of 1024³ reaches here, shared between the (virtual) devices.
    """
    if config.hardware.peak_tflops:
        return config.hardware.peak_tflops * 1e12
    device = jax.devices()[0]
    if device.platform == "cpu":
        return measured_matmul() / jax.device_count()
    names = [name for name in PEAK_TFLOPS if device.device_kind.startswith(name)]
    return PEAK_TFLOPS[max(names, key=len)] * 1e12 if names else 0.0


def measured_matmul(size: int = 1024, tries: int = 5) -> float:
    """FLOP/s of a float32 matmul of size³ on the first device, the best of so many tries."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(tries):
        begin = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def memory_estimate(config: RunConfig, state: TrainState, devices: int) -> dict[str, float]:
    """Bytes on one device by plain arithmetic: weights, gradients, moments, and the largest activations.

    Activations are what the backward pass keeps of each layer under its remat policy, in the compute dtype, to the
    nearest few tens of percent; a compiled program knows better.
    """

    def size(tree):
        shards = (
            leaf.sharding.shard_shape(leaf.shape) if hasattr(leaf, "sharding") else leaf.shape
            for leaf in jax.tree.leaves(tree)
        )
        return sum(
            int(np.prod(shape)) * leaf.dtype.itemsize for shape, leaf in zip(shards, jax.tree.leaves(tree), strict=True)
        )

    model, train = config.model, config.train
    tokens = train.batch_size * config.data.sequence_length / train.accumulation_steps / devices
    itemsize = jnp.dtype(model.dtype).itemsize
    a, moe, D = model.attention, model.moe, model.hidden_size
    attention = 4 * D + a.num_heads * (2 * a.qk_head_dim + 3 * a.value_head_dim + config.data.sequence_length)
    full = {
        "dense": attention + 3 * model.mlp_size,
        "moe": attention + moe.experts_per_token * (3 * D + 4 * moe.expert_size) + 3 * moe.expert_size,
    }
    layers = {"dense": model.num_leading_dense_layers, "moe": model.num_moe_layers + model.mtp.depth}
    kept = sum(
        count * (full[kind] if getattr(model.remat, kind) == "none" else D) for kind, count in layers.items() if count
    )
    return {
        "weights": size(state.params),
        "gradients": size(state.params),
        "moments": size(state.opt_state),
        "activations": tokens * kept * itemsize,
        "logits": 2 * min(train.loss_chunk, tokens) * model.vocab_size * 4,
    }


def startup_rows(config: RunConfig, state: TrainState, mesh, data: dict, peak: float, found: list[int]):
    """Rows for `progress.startup_summary`: what is about to be trained, on what, for how long."""
    count = count_parameters(config.model)
    flops = flops_per_token(config.model, config.data.sequence_length)
    memory = memory_estimate(config, state, mesh.size)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    steps = total_steps(config)
    tokens = tokens_before(config, steps)
    mtp = f" + {human_count(count.mtp)} in MTP modules" if count.mtp else ""
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in memory.items())
    return [
        ("run", f"{config.name}, seed {config.seed}"),
        ("parameters", f"{human_count(count.total)}, {human_count(count.active)} active per token{mtp}"),
        ("FLOPs per token", f"{human_count(flops.total)} ({flops.attention / flops.total:.0%} in attention)"),
        ("devices", f"{jax.device_count()} x {jax.devices()[0].device_kind}: {axes}"),
        ("peak", f"{peak * mesh.size / 1e12:.3g} TFLOP/s" if peak else "unknown: set hardware.peak_tflops for MFU"),
        ("memory per device", f"about {human_bytes(sum(memory.values()))}: {parts}"),
        (
            "data",
            f"{human_count(data['train_tokens'])} tokens in {data['train_documents']:,} documents, "
            f"{data['bytes_per_token']:.2f} bytes per token, tokenizer {data['tokenizer']}",
        ),
        ("held out", f"{human_bytes(data['held_out_bytes'])} in {data['held_out_documents']:,} documents"),
        *([("left out", f"{len(data['skipped'])} files: {', '.join(data['skipped'][:3])}")] if data["skipped"] else []),
        ("training", f"{steps:,} steps, {human_count(tokens)} tokens, {tokens / data['train_tokens']:.2f} epochs"),
        ("checkpoints", f"resuming from step {found[-1]:,}" if found else "none found, starting anew"),
    ]


def peak_memory_bytes() -> int:
    """Most memory used so far: of a device where it is counted, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
