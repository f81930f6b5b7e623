"""A step's time in plain arithmetic, without compiling: the model by which layouts are ranked. An estimate.

It knows the matmuls, the weights and rows that travel, and the passes over HBM that they cause; of the compiler it
knows nothing. What is compiled afterwards is what counts. The numbers of passes are set so that DeepSeek-V3 on 512
v5p with an expert axis of 8 comes to the HBM traffic of a compiled program.
"""

import math
from typing import NamedTuple

from opendeep_jax.config.schedule import Stage
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.models.accounting import count_parameters, flops_per_token
from opendeep_jax.plan.memory import (
    SIZES,
    local_tokens,
    memory_by_component,
    micros_of,
    num_blocks,
    recomputed_share,
    routed_parameters,
)
from opendeep_jax.plan.topology import Topology

ROW_PASSES = 160
"""Times that a token's residual stream crosses HBM in a block: forward, again and backward, attention included."""
EXPERT_ROW_PASSES = 80
"""The same for a row that an expert works on, gathering and scattering it included."""
MEMORY_IN_TURN = 0.5
"""The share of the HBM traffic that no matmul hides, as kernels that only move data run between them."""
EXCHANGES = 5
"""Times that rows are exchanged between experts' devices in a block: there and back, there again, and both gradients
(the way back isn't recomputed)."""
SUMS_PER_BLOCK = 8
"""Gathers and scatters of the residual stream over the tensor axis in a block, forward, again and backward."""


class Estimate(NamedTuple):
    """Estimated seconds of a step on one device, and its memory."""

    compute: float
    memory: float
    fsdp: float
    """Gathering weights and scattering gradients."""
    expert: float
    """Exchanging rows."""
    tensor: float
    """Exchanges inside a block, over tensor and context."""
    data: float
    """Sums of gradients between replicas."""
    idle: float
    """The share of the time that a pipeline's stages wait."""
    bytes: float
    """Memory of a device."""

    @property
    def seconds(self) -> float:
        """A step: weights and gradients hide behind the kernels; exchanges hide half, as they stand between kernels."""
        kernels = max(self.compute + MEMORY_IN_TURN * self.memory, self.memory)
        hidden = max(kernels + self.tensor + self.expert / 2, self.fsdp + self.data)
        return hidden / (1 - self.idle)


def estimate(config: RunConfig, stage: Stage, topology: Topology, axes: dict[str, int]) -> Estimate:
    """A step of a run with these mesh axes on a topology."""
    model, moe, chip = config.model, config.model.moe, topology.chip.per_device()
    width, D = SIZES[model.dtype], model.hidden_size
    micros, tokens = micros_of(config, stage, axes), local_tokens(config, stage, axes)
    flops = flops_per_token(model, stage.length)
    heads = axes["tensor"] * axes["context"]
    step_tokens = stage.batch_size * stage.length / (math.prod(axes.values()))
    again = 1 + recomputed_share(model) / 3
    layers = num_blocks(model) / axes["stage"]

    compute = flops.total * again * step_tokens / chip.flops

    routed, counted = routed_parameters(model), count_parameters(model)
    rest = (counted.total + counted.mtp - routed) / axes["stage"] / axes["tensor"]
    experts = routed / axes["stage"] / axes["tensor"] / axes["expert"]
    gathered = (rest + experts) * width * micros
    rows = tokens * micros * (moe.experts_per_token if moe.num_experts else 0)
    passes = tokens * micros * D * layers * ROW_PASSES + rows * (D + moe.expert_size) * layers * EXPERT_ROW_PASSES
    kept = memory_by_component(config, stage, axes)
    state = kept["weights"] + kept["gradients"] + kept["optimizer"]
    memory = (4 * gathered + passes * width + 3 * state) / chip.bandwidth

    inner, outer = links(topology, axes)
    n = axes["fsdp"]
    fsdp = 3 * gathered * (n - 1) / n / (inner["fsdp"] if n > 1 else 1.0)
    reached = moe.groups_per_token * max(1, axes["expert"] // moe.num_groups)  # devices that hold the kept groups
    groups = min(moe.experts_per_token, reached if moe.num_groups > 1 else axes["expert"], axes["expert"])
    copies = tokens * micros * groups * D * width * layers * EXCHANGES * (axes["expert"] > 1)
    expert = copies * (axes["expert"] - 1) / axes["expert"] * _hops(topology, axes["expert"]) / inner["expert"]
    stream = tokens * micros * axes["tensor"] * D * width * layers
    tensor = SUMS_PER_BLOCK * stream * (axes["tensor"] - 1) / axes["tensor"] / inner["tensor"]
    latent = model.attention.num_heads * (model.attention.qk_head_dim + model.attention.value_head_dim)
    tensor += (
        3
        * stage.length
        / heads
        * (axes["context"] - 1)
        * latent
        * width
        * layers
        / inner["context"]
        * (step_tokens * heads / stage.length)
    )
    copies_of_rest = axes["data"] * axes["expert"]
    replicated = 2 * (rest / n * (copies_of_rest - 1) / copies_of_rest) * SIZES[model.weight_dtype]
    replicated += 2 * experts / n * (axes["data"] - 1) / axes["data"] * SIZES[model.weight_dtype]
    data = replicated / outer
    idle = (axes["stage"] - 1) / (micros + axes["stage"] - 1)
    return Estimate(compute, memory, fsdp, expert, tensor, data, idle, sum(kept.values()))


def links(topology: Topology, axes: dict[str, int]) -> tuple[dict[str, float], float]:
    """Bytes/s along each mesh axis, and between the replicas of the data axis.

    Axes are taken from the inside out, as the mesh lies: what fits a node (GPU) or one dimension of the torus (TPU) has
    its links; larger axes of a torus have those of as many dimensions as they fill.
    """
    chip, inner, used = topology.chip.per_device(), {}, 1
    for axis in ("tensor", "context", "expert", "fsdp", "stage", "data"):
        used *= axes[axis]
        if used > topology.slice_devices:
            inner[axis] = chip.dcn
        elif chip.platform == "gpu":
            inner[axis] = chip.link
        else:
            side = max(topology.shape) * topology.chip.cores
            dimensions = min(max(1, round(math.log(max(axes[axis], 1), side) + 0.3)), len(topology.shape))
            inner[axis] = chip.link * dimensions * (2 if topology.is_ring(0) else 1)
    return inner, inner["data"]


def _hops(topology: Topology, size: int) -> float:
    """Links that a message passes on average on its way round a ring of so many devices; 1 through a switch."""
    return 1.0 if topology.chip.platform == "gpu" else max(1.0, size / 4)
