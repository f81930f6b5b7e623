"""Run a model's layers as a pipeline over the stage axis: loss and gradients equal those of the model in one piece.

S stages, v chunks a stage, n places (layers) a chunk, M microbatches. Code for the per-device program (see
`parallel/collectives.py`): every stage runs the same scan over the ticks of a schedule. In a tick a stage runs the
forward of one chunk, then the backward of another, and swaps activations and gradients with its neighbors. Where the
schedule is idle nothing is computed: all devices of a stage take the same branch, so the collectives inside a piece
of the model work as long as they stay within a stage.

The backward is differentiated layer by layer from kept layer inputs, each layer's forward recomputed; so what one
layer's backward needs is alive for one layer at a time, gradients go straight to their sum over the microbatches, and
nothing of a forward is kept but its layers' inputs (or its chunk's: see `keep`).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.parallel.collectives import axis_index, axis_size
from opendeep_jax.parallel.schedule import IDLE, BufferSlots, Schedule, StageLayout, assign_slots
from opendeep_jax.parallel.shares import combine, neutral

Tree = Any


class StageFunctions(NamedTuple):
    """A model cut where the pipeline cuts it. Losses are this device's share; what else is measured comes as shares
    (`parallel/shares.py`), which meet those of the other microbatches.

    No collective in a piece may reach over the stage axis, and none may be a `ppermute`: on a CPU XLA lets that
    one wait for all devices, also those of stages that run something else.
    """

    embed: Callable[[Tree, Tree], tuple[Array, Tree]]
    """(shared, microbatch) -> (x, shares): what comes before the stacked layers, on the first stage. It has no loss."""
    layer: Callable[[Tree, Tree, Array, Tree], tuple[Array, Array, Tree]]
    """(weights, constants, x, microbatch) -> (x, loss, shares) of one layer; x keeps its shape and dtype, the loss is
    float32."""
    output: Callable[[Tree, Array, Tree], tuple[Array, Tree]]
    """(shared, x, microbatch) -> (loss, shares): what comes after the stacked layers, on the last stage."""


class PipelineResult(NamedTuple):
    """This device's share of a batch's loss, gradients and metrics."""

    loss: Float[Array, ""]
    shared_gradients: Tree
    """Gradients of `shared`; zero on stages that do not use a weight, so to be summed over the stage axis too."""
    layer_gradients: Tree
    """Gradients of this stage's layers [v*n, ...]; zero in empty places."""
    embed_shares: Tree
    """`embed`'s; nothing on all stages but the first."""
    output_shares: Tree
    """`output`'s; nothing on all stages but the last."""
    layer_shares: Tree
    """`layer`'s, of this stage's layers [v*n, ...]; nothing in empty places."""


class Work(NamedTuple):
    """Work of a stage in a tick, forward or backward."""

    busy: Array
    """True unless the stage is idle."""
    chunk: Array
    """Its chunk, 0 where idle."""
    part: Array
    """Index of its part of the model."""
    count: Array
    """The layers in it; 0 where idle."""
    microbatch: Tree

    def at(self, place) -> Array:
        """Return whether there is a layer to run at this place."""
        return place < self.count

    def is_part(self, part: int) -> Array:
        """Return whether this work is of the given part of the model."""
        return self.busy & (self.part == part)


def pipelined_value_and_grad(
    pieces: StageFunctions,
    schedule: Schedule,
    layout: StageLayout,
    shared: Tree,
    layers: Tree,
    constants: Tree,
    microbatches: Tree,
    keep: Literal["layers", "chunk"] = "layers",
    gradient_dtype: Any = jnp.float32,
    axis: str = "stage",
) -> PipelineResult:
    """Loss and gradients of `pieces` summed over the microbatches.

    Args:
        pieces: the model.
        schedule: S stages as the axis has devices, v chunks, M microbatches.
        layout: where the layers lie; of the same S and v.
        shared: differentiable arrays that `embed` and `output` use, a copy on every stage.
        layers: this stage's layers' differentiable arrays [v*n, ...], as `to_stages` orders them.
        constants: this stage's layers' other arrays [v*n, ...] (router biases); may be empty.
        microbatches: what the pieces see of each microbatch [M, ...], a copy on every stage.
        keep: of the forward until its backward: "layers", every layer's input; "chunk", the chunk's input alone, for n
            times less memory and one more forward.
        gradient_dtype: dtype in which gradients are summed and returned.
        axis: mesh axis of the stages.

    Raises:
        ConfigError: schedule, layout, axis or microbatches of different sizes.
    """
    _check(schedule, layout, layers, microbatches, axis)
    stage, places, last = axis_index(axis), layout.places, schedule.stages * schedule.chunks - 1
    slots = assign_slots(schedule)
    one_microbatch = jax.tree.map(lambda x: x[0], microbatches)
    one_layer, one_constant = jax.tree.map(lambda x: x[0], (layers, constants))
    x_like, embed_like = jax.eval_shape(pieces.embed, shared, one_microbatch)
    _, output_like = jax.eval_shape(pieces.output, shared, x_like, one_microbatch)
    _, _, layer_like = jax.eval_shape(pieces.layer, one_layer, one_constant, x_like, one_microbatch)
    zero = jnp.zeros((), jnp.float32)

    def work_of(row, direction: str) -> Work:
        chunk, microbatch = row[f"{direction}_chunk"], row[f"{direction}_microbatch"]
        busy, chunk = chunk != IDLE, jnp.maximum(chunk, 0)
        part = chunk * schedule.stages + stage
        count = jnp.where(busy, jnp.asarray(layout.counts)[part], 0)
        return Work(busy, chunk, part, count, _pick(microbatches, jnp.maximum(microbatch, 0)))

    def zeros(tree, *lead, dtype=None):
        return jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), dtype or x.dtype), tree)

    def add(total, new):
        return jax.tree.map(lambda total, new: total + new.astype(total.dtype), total, new)

    def forward_chunk(work, x, kept, slot):
        """Run a chunk's layers; their inputs go to a slot of `kept` [slots, n, ...].

        Conditionals return what is small and everything large is updated beside them: not every compiler updates in
        place what passes through a conditional.
        """

        def step(carry, place):
            x, kept = carry
            kept = kept.at[slot, place].set(x)

            def run():
                index = work.chunk * places + place
                return pieces.layer(_pick(layers, index), _pick(constants, index), x, work.microbatch)

            x, *measured = lax.cond(work.at(place), run, lambda: (x, zero, neutral(layer_like)))
            return (x, kept), measured

        (x, kept), (losses, shares) = lax.scan(step, (x, kept), jnp.arange(places))
        return x, kept, jnp.sum(losses), shares

    def backward_chunk(work, gradient, kept, slot, total):
        """The gradient of a chunk's input from that of its output; its layers' gradients are added to `total`."""

        def step(carry, place):
            gradient, total = carry
            index = work.chunk * places + place

            def run():
                def layer(weights, x):
                    return pieces.layer(weights, _pick(constants, index), x, work.microbatch)[:2]

                (_, loss), transpose = jax.vjp(layer, _pick(layers, index), kept[slot, place])
                return transpose((gradient, jnp.ones_like(loss)))

            weights, gradient = lax.cond(work.at(place), run, lambda: (zeros(one_layer), gradient))
            return (gradient, jax.tree.map(lambda sum, new: _add_at(sum, index, new), total, weights)), None

        return lax.scan(step, (gradient, total), jnp.arange(places), reverse=True)[0]

    def forward_tick(state, row):
        """Run the forward of this tick's part; return the new state and what the next stage gets."""
        work, slot = work_of(row, "forward"), row["forward_input"]
        inputs, shared_gradients = state["inputs"], state["shared_gradients"]
        arrived = lambda: (inputs[slot, 0], neutral(embed_like))  # noqa: E731
        x, embed_shares = lax.cond(work.is_part(0), lambda: pieces.embed(shared, work.microbatch), arrived)
        if keep == "layers":
            y, inputs, loss, shares = forward_chunk(work, x, inputs, slot)
        else:
            y, _, loss, shares = forward_chunk(work, x, zeros(x_like, 1, places), 0)
            inputs = inputs.at[slot, 0].set(x)

        def close():
            output = jax.value_and_grad(pieces.output, argnums=(0, 1), has_aux=True)
            (loss, shares), (weights, gradient) = output(shared, y, work.microbatch)
            return loss, shares, gradient, add(shared_gradients, weights)

        idle = zero, neutral(output_like), zeros(x_like), shared_gradients
        output_loss, output_shares, gradient, shared_gradients = lax.cond(work.is_part(last), close, lambda: idle)
        state |= {
            "inputs": inputs,
            "gradients": state["gradients"].at[row["output_gradient"]].set(gradient),
            "loss": state["loss"] + loss + output_loss,
            "embed_shares": combine(state["embed_shares"], embed_shares),
            "output_shares": combine(state["output_shares"], output_shares),
            "layer_shares": jax.tree.map(
                lambda all_, new: lax.dynamic_update_index_in_dim(all_, new, work.chunk, 0),
                state["layer_shares"],
                combine(_pick(state["layer_shares"], work.chunk), shares),
            ),
            "shared_gradients": shared_gradients,
        }
        return state, y

    def backward_tick(state, row):
        """Run the backward of this tick's part; return the new state and what the stage before gets."""
        work, kept, slot = work_of(row, "backward"), state["inputs"], row["backward_input"]
        if keep == "chunk":
            _, kept, *_ = forward_chunk(work, kept[slot, 0], zeros(x_like, 1, places), 0)
            slot = 0
        gradient = state["gradients"][row["backward_gradient"]]
        gradient, layer_gradients = backward_chunk(work, gradient, kept, slot, state["layer_gradients"])
        shared_gradients = state["shared_gradients"]

        def open_up():
            _, transpose = jax.vjp(lambda shared: pieces.embed(shared, work.microbatch)[0], shared)
            return add(shared_gradients, *transpose(gradient))

        shared_gradients = lax.cond(work.is_part(0), open_up, lambda: shared_gradients)
        return state | {"layer_gradients": layer_gradients, "shared_gradients": shared_gradients}, gradient

    def tick(state, row):
        state, y = forward_tick(state, row)
        input_ = _shift(y, axis, schedule, 1)  # travels while the backward runs
        state, gradient = backward_tick(state, row)
        gradient = _shift(gradient, axis, schedule, -1)
        # What arrives is put away last: its place may be one that this tick's backward has only now left.
        input_, gradient, inputs = lax.optimization_barrier((input_, gradient, state["inputs"]))
        state["inputs"] = inputs.at[row["arriving_input"], 0].set(input_)
        state["gradients"] = state["gradients"].at[row["arriving_gradient"]].set(gradient)
        return state, None

    state = {
        # One slot more than is used: what is idle reads and writes there.
        "inputs": zeros(x_like, slots.num_inputs + 1, places if keep == "layers" else 1),
        "gradients": zeros(x_like, slots.num_gradients + 1),
        "loss": zero,
        "embed_shares": neutral(embed_like),
        "output_shares": neutral(output_like),
        "layer_shares": neutral(layer_like, schedule.chunks, places),
        "shared_gradients": zeros(shared, dtype=gradient_dtype),
        "layer_gradients": zeros(layers, dtype=gradient_dtype),
    }
    state, _ = lax.scan(tick, state, _rows(schedule, slots, stage))
    count = schedule.chunks * places
    state["layer_shares"] = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), state["layer_shares"])
    return PipelineResult(*(state[name] for name in PipelineResult._fields))


def to_stages(layout: StageLayout, stacked: Float[Array, "N ..."]) -> Float[Array, "places ..."]:
    """Stacked layers in the model's order [N, ...] as they lie at rest [S*v*n, ...]; zeros in empty places."""
    filled = (layout.source != IDLE).reshape(-1, *[1] * (stacked.ndim - 1))
    return jnp.where(filled, stacked[layout.source], jnp.zeros((), stacked.dtype))


def from_stages(layout: StageLayout, at_rest: Float[Array, "places ..."]) -> Float[Array, "N ..."]:
    """The inverse of `to_stages`; what stands in empty places is dropped."""
    return at_rest[np.argsort(layout.source)[np.sum(layout.source == IDLE) :]]


def _rows(schedule: Schedule, slots: BufferSlots, stage) -> dict[str, Array]:
    """Every tick's entries of this stage, int32 [T] each; an idle slot is the one behind the last."""
    tables = {f"{name}_chunk": getattr(schedule, name)[:, :, 0] for name in ("forward", "backward")}
    tables |= {f"{name}_microbatch": getattr(schedule, name)[:, :, 1] for name in ("forward", "backward")}
    for name in slots._fields[2:]:
        spare = slots.num_inputs if name.endswith("input") else slots.num_gradients
        table = getattr(slots, name)
        tables[name] = np.where(table == IDLE, spare, table)
    return {name: jnp.asarray(table)[:, stage] for name, table in tables.items()}


def _shift(x: Array, axis: str, schedule: Schedule, by: int) -> Array:
    """x of the stage `by` places before; around the ring only if there are chunks further on."""
    stages = schedule.stages
    if stages == 1:
        return x
    pairs = [(stage, (stage + by) % stages) for stage in range(stages)]
    if schedule.chunks == 1:
        pairs = [(source, target) for source, target in pairs if target == source + by]
    return lax.ppermute(x, axis, pairs)


def _pick(tree: Tree, index) -> Tree:
    """Entry `index` of every array's first axis."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _add_at(total: Array, index, new: Array) -> Array:
    """`total` with `new` added to entry `index` of its first axis."""
    entry = lax.dynamic_index_in_dim(total, index, keepdims=False) + new.astype(total.dtype)
    return lax.dynamic_update_index_in_dim(total, entry, index, 0)


def _check(schedule: Schedule, layout: StageLayout, layers: Tree, microbatches: Tree, axis: str) -> None:
    if schedule.stages != axis_size(axis):
        raise ConfigError(
            f"a schedule for {schedule.stages} stages on a mesh whose axis {axis!r} has {axis_size(axis)} devices: "
            "they must agree. Make the schedule for that many stages."
        )
    if (schedule.stages, schedule.chunks) != (layout.stages, layout.chunks):
        raise ConfigError(
            f"a schedule for {schedule.stages} stages x {schedule.chunks} chunks with a layout for {layout.stages} x "
            f"{layout.chunks}: they must agree. Make both for the same."
        )
    for name, tree, size in (
        ("layers", layers, layout.chunks * layout.places),
        ("microbatches", microbatches, schedule.microbatches),
    ):
        wrong = {x.shape[:1] for x in jax.tree.leaves(tree)} - {(size,)}
        if wrong:
            raise ConfigError(
                f"{name} with leading sizes {sorted(wrong)} in a pipeline: must be {size} on each device. "
                "Divide them as schedule and layout say."
            )
