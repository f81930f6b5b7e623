"""Pipeline schedules as tables: which stage runs which chunk of layers on which microbatch, tick after tick.

S stages, v chunks a stage, M microbatches, T ticks. Layers are cut into S*v chunks of neighboring layers; part p = 0 …
S*v-1 of the model is chunk p // S of stage p % S, so that the stages form a ring which each microbatch travels v times
(interleaved 1F1B, Narayanan et al. 2021, section 2.2; v = 1 is plain 1F1B). NumPy only.

In each tick a stage runs at most one forward and one backward, in this order; what it computes is with its neighbor at
the next tick. Departures from the papers, both because every device runs one program in lockstep:

- A tick holds a forward *and* a backward, so that the steady state wastes nothing and a stage needs no bookkeeping of
  its own. The bubble is the paper's, (S-1) / (M v + S-1); a stage keeps up to S (v+1) - 1 inputs of chunks where the
  paper's order keeps S v (both: M v at most).
- No zero-bubble variant (Qi et al. 2023), which splits the backward in two so that weight gradients fill the bubble.
  Our backward recomputes its forward (costs, forward: 1, backward: 1 + 2), and so would each half (1 + 1 and 1 + 1):
  5 instead of 4 for each part and microbatch. Even without any bubble left that pays only below M v = 4 (S-1), where a
  second chunk or more microbatches win more.
"""

from typing import NamedTuple

import numpy as np

from opendeep_jax.config.checks import ConfigError

IDLE = -1


class Schedule(NamedTuple):
    """Microbatch of each stage and chunk at each tick; made by `make_schedule`. Part p is chunk p // S of stage p % S.

    Instance: 2 stages, 1 chunk, 2 microbatches: forward[:, :, 1] is [[0, -1], [1, 0], [-1, 1], [-1, -1]] and
    backward[:, :, 1] is [[-1, -1], [-1, 0], [0, 1], [1, -1]].
    """

    stages: int
    chunks: int
    microbatches: int
    forward: np.ndarray
    """int32 [T, S, 2]: (chunk, microbatch) whose forward runs; IDLE where none."""
    backward: np.ndarray
    """int32 [T, S, 2]: (chunk, microbatch) whose backward runs after it; IDLE where none."""


class BufferSlots(NamedTuple):
    """Buffer slots of waiting inputs and gradients, reused when free. int32 [T, S], IDLE where none.

    `inputs` slots hold a chunk's input from its arrival (the first part: from its forward) to its backward; `gradients`
    slots hold the gradient of a chunk's output from its arrival (the last part: from its forward) to its backward.
    """

    num_inputs: int
    num_gradients: int
    forward_input: np.ndarray
    """Slot of the input of this tick's forward."""
    output_gradient: np.ndarray
    """Slot for the gradient of the last part's output, computed in its forward."""
    backward_input: np.ndarray
    backward_gradient: np.ndarray
    arriving_input: np.ndarray
    """Slot for the activation that arrives at the end of this tick."""
    arriving_gradient: np.ndarray


def make_schedule(stages: int, microbatches: int, chunks: int = 1) -> Schedule:
    """1F1B (chunks = 1) or interleaved 1F1B: each stage takes its work in a fixed order, each piece at the first tick
    at which it has arrived. M takes any value: microbatches pass chunk after chunk in groups of at least S, which is
    what a round trip takes; M < S leaves holes.

    Raises:
        ConfigError: a number below 1.
    """
    sizes = {"stages": stages, "microbatches": microbatches, "chunks": chunks}
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"a pipeline of {name} = {value}: must be at least 1. Give it one.")
    last = stages * chunks - 1
    groups = np.array_split(np.arange(microbatches), max(1, microbatches // stages))
    order = [(chunk, int(m)) for group in groups for chunk in range(chunks) for m in group]
    backward_order = [(chunks - 1 - chunk, m) for chunk, m in order]
    forward_tick: dict[tuple[int, int], int] = {}  # by (part, microbatch)
    backward_tick: dict[tuple[int, int], int] = {}
    forward_next, backward_next = [0] * stages, [0] * stages
    forward, backward = [], []
    while min(backward_next) < len(order):
        tick = len(forward)
        forward.append([(IDLE, IDLE)] * stages)
        backward.append([(IDLE, IDLE)] * stages)
        for stage in range(stages):
            if forward_next[stage] < len(order):
                chunk, m = order[forward_next[stage]]
                part = chunk * stages + stage
                if part == 0 or forward_tick.get((part - 1, m), tick) < tick:
                    forward[tick][stage], forward_tick[part, m] = (chunk, m), tick
                    forward_next[stage] += 1
            if backward_next[stage] < len(order):
                chunk, m = backward_order[backward_next[stage]]
                part = chunk * stages + stage
                # The last part's gradient comes from its own forward, in the same tick if need be.
                ready = (part, m) in forward_tick if part == last else backward_tick.get((part + 1, m), tick) < tick
                if ready:
                    backward[tick][stage], backward_tick[part, m] = (chunk, m), tick
                    backward_next[stage] += 1
    return Schedule(stages, chunks, microbatches, np.array(forward, np.int32), np.array(backward, np.int32))


def ticks_of(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """The tick of each part's forward and of its backward, both int [S*v, M]."""
    both = []
    for table in (schedule.forward, schedule.backward):
        ticks = np.full((schedule.stages * schedule.chunks, schedule.microbatches), IDLE)
        tick, stage = np.nonzero(table[:, :, 0] != IDLE)
        chunk, microbatch = table[tick, stage].T
        ticks[chunk * schedule.stages + stage, microbatch] = tick
        both.append(ticks)
    return both[0], both[1]


def assign_slots(schedule: Schedule) -> BufferSlots:
    """Assign each waiting array the lowest free slot."""
    stages, last = schedule.stages, schedule.stages * schedule.chunks - 1
    forward, backward = ticks_of(schedule)
    # What arrives at the end of a tick is there from the next tick on.
    inputs_from = np.concatenate([forward[:1], forward[:-1] + 1])
    gradients_from = np.concatenate([backward[1:] + 1, forward[-1:]])
    inputs, num_inputs = _lowest_free(inputs_from, backward, stages)
    gradients, num_gradients = _lowest_free(gradients_from, backward, stages)
    slots = BufferSlots(num_inputs, num_gradients, *np.full((6, len(schedule.forward), stages), IDLE, np.int32))
    for part, microbatch in np.ndindex(*forward.shape):
        place, stage = (part, microbatch), part % stages
        slots.forward_input[forward[place], stage] = slots.backward_input[backward[place], stage] = inputs[place]
        slots.backward_gradient[backward[place], stage] = gradients[place]
        if part > 0:
            slots.arriving_input[inputs_from[place] - 1, stage] = inputs[place]
        if part < last:
            slots.arriving_gradient[gradients_from[place] - 1, stage] = gradients[place]
        else:
            slots.output_gradient[forward[place], stage] = gradients[place]
    return slots


def _lowest_free(start: np.ndarray, end: np.ndarray, stages: int) -> tuple[np.ndarray, int]:
    """A slot for each of [parts, M], held from tick `start` to tick `end`; how many slots the busiest stage needs."""
    slots, most = np.zeros_like(start), 0
    for stage in range(stages):
        held_until: list[int] = []
        for place in sorted(np.ndindex(*start[stage::stages].shape), key=lambda place: start[stage::stages][place]):
            place = (stage + place[0] * stages, place[1])
            slot = next((i for i, tick in enumerate(held_until) if tick < start[place]), len(held_until))
            held_until[slot : slot + 1] = [end[place]]
            slots[place] = slot
        most = max(most, len(held_until))
    return slots, most


class StageLayout(NamedTuple):
    """Placement of N stacked layers on the stages; made by `stage_layout`.

    Each chunk has n places, the same number everywhere, the last of which may be empty. Stacked arrays at rest are
    [S*v*n, ...], divided over the stages along this axis: stage-major, then chunk-major, so that chunk c of a stage is
    its places c*n to c*n + n - 1.

    Instance: `stage_layout(5, stages=2, chunks=2)` has counts [2, 1, 1, 1] and source [0, 1, 3, -1, 2, -1, 4, -1].
    """

    stages: int
    chunks: int
    places: int
    """n: places in a chunk."""
    counts: np.ndarray
    """int [S*v]: layers of each part of the model, in the model's order."""
    source: np.ndarray
    """int [S*v*n]: the layer at each place, in the order at rest; IDLE where empty."""


def stage_layout(num_layers: int, stages: int, chunks: int = 1, first: float = 0.0, last: float = 0.0) -> StageLayout:
    """Divide N layers over S*v parts with as few places as they need, empty ones where there is other work to do.

    Args:
        num_layers: N; need not be divisible by anything.
        stages: S.
        chunks: v.
        first: what the first part does besides (embedding, leading dense layers), in layers.
        last: what the last part does besides (MTP modules, head and loss), in layers.

    Raises:
        ConfigError: fewer layers than parts, or a number below 1.
    """
    parts = stages * chunks
    if min(stages, chunks) < 1 or num_layers < parts:
        raise ConfigError(
            f"a pipeline of {stages} stages with {chunks} chunks each: {num_layers} stacked layers cannot fill it; "
            f"at least 1 of each, and {parts} layers or more. Use fewer stages or chunks."
        )
    places = -(-num_layers // parts)
    work = np.zeros(parts)
    work[0] += first
    work[-1] += last
    counts = np.full(parts, places)
    for _ in range(parts * places - num_layers):
        # Of the parts with the most to do, the last: it has the head.
        parts_with_layers = np.flatnonzero(counts)
        busiest = max(parts_with_layers, key=lambda part: (work[part] + counts[part], part))
        counts[busiest] -= 1
    begin = np.cumsum(counts) - counts
    source = np.full((stages, chunks, places), IDLE)
    for part in range(parts):
        source[part % stages, part // stages, : counts[part]] = begin[part] + np.arange(counts[part])
    return StageLayout(stages, chunks, places, counts, source.reshape(-1))
