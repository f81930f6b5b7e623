"""Gradients to updates: AdamW (Loshchilov and Hutter 2019) and Muon (Jordan et al. 2024), with V3's schedules.

Parameters are a dictionary of arrays by name (models/parameters.py); which rule a weight falls under is read off its
logical axes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from optax.contrib import MuonDimensionNumbers

from opendeep_jax.config.schedule import RatePiece, rate_pieces
from opendeep_jax.config.schema import OptimizerConfig, RunConfig
from opendeep_jax.train.muon import muon
from opendeep_jax.train.rounding import round_stochastically

Axes = dict[str, tuple[str | None, ...]]


def learning_rate(config: RunConfig) -> Callable[[Any], Any]:
    """The learning rate as a function of the run's step (from 0): the one that updates get, and that is logged."""
    schedule = learning_rate_schedule(config)
    return lambda step: config.optimizer.learning_rate * schedule(step)


def learning_rate_schedule(config: RunConfig) -> Callable[[Any], Any]:
    """The learning rate as a fraction of its peak, as a function of the step (from 0)."""
    pieces = rate_pieces(config)
    return optax.join_schedules([_piece(piece) for piece in pieces], [piece.first_step for piece in pieces[1:]])


def _piece(piece: RatePiece) -> optax.Schedule:
    match piece.shape:
        case "constant":
            return optax.constant_schedule(piece.end)
        case "linear":
            return optax.linear_schedule(piece.begin, piece.end, piece.steps)
        case _:
            return _cosine(piece.begin, piece.end, piece.steps)


def _cosine(begin: float, end: float, span: int) -> optax.Schedule:
    """Half a cosine from `begin` to `end`, up or down, then constant."""

    def rate(step):
        return end + (begin - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(step / span, 0, 1)))

    return rate


class StepCount(NamedTuple):
    """State of an optimizer's last transformation: the step whose rate it applies."""

    count: Int[Array, ""]


def at_step(opt_state: optax.OptState, step: Int[Array, ""]) -> optax.OptState:
    """The optimizer's state with its clocks at the run's step, whatever updates or batches were skipped.

    Adam's bias correction goes by the updates that its moments have seen, and keeps a count of its own.
    """

    def is_clock(node) -> bool:
        return isinstance(node, StepCount)

    return jax.tree.map(lambda node: StepCount(step) if is_clock(node) else node, opt_state, is_leaf=is_clock)


def make_optimizer(config: RunConfig, axes: Axes) -> optax.GradientTransformation:
    """The update rule without clipping (`train.step` clips, as it reports the norm).

    Norm scales are never decayed; the embedding and head only if `decay_embeddings`. Under `muon` every hidden
    matrix, each layer's and each expert's by itself, is orthogonalized; embedding, head and norms go by AdamW.
    All arithmetic is float32; what is stored in bfloat16 is rounded stochastically (`train.rounding`).
    """
    optimizer, seed = config.optimizer, config.seed
    first, second = optimizer.first_moment_dtype, optimizer.second_moment_dtype

    def with_decay(name: str, direction: jax.Array, param: jax.Array) -> jax.Array:
        decayed = _is_decayed(axes[name], optimizer)
        return direction + optimizer.weight_decay * param.astype("float32") if decayed else direction

    decay_and_apply = optax.stateless(_by_name(with_decay)), _at_learning_rate(config)
    adam = optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.epsilon)
    adamw = optax.chain(_stored_as(adam, seed, mu=first, nu=second), *decay_and_apply)
    if optimizer.kind == "adamw":
        return adamw

    rule = muon(optimizer.muon_steps, optimizer.muon_momentum, lambda name: _dimension_numbers(axes[name]))
    # An update's root mean square is 0.2, as AdamW's tends to be, so that both share one learning rate
    # (Liu et al. 2025, arXiv:2502.16982).
    to_rms = _by_name(lambda name, update: _scale_to_rms(update, _dimension_numbers(axes[name])))
    matrices = optax.chain(
        _stored_as(rule, seed, mu=first),
        optax.stateless(lambda updates, params: to_rms(updates)),
        *decay_and_apply,
    )
    labels = {name: "muon" if _is_hidden_matrix(axes[name]) else "adamw" for name in axes}
    return optax.partition({"muon": matrices, "adamw": adamw}, lambda params: {name: labels[name] for name in params})


def _by_name(function: Callable) -> Callable:
    """A function of trees that applies `function(name, *arrays)` to the arrays of each name.

    optax.partition leaves a MaskedNode, not an array, where a parameter is the other rule's; those stay.
    """
    return lambda *trees: jax.tree.map_with_path(lambda path, *arrays: function(path[-1].key, *arrays), *trees)


def _at_learning_rate(config: RunConfig) -> optax.GradientTransformation:
    """The last link: directions become what is added to the weights, times the rate at the clock's step.

    The sum is what the weights' dtype can hold: adding the update to a bfloat16 weight rounds no more.
    """
    rate = learning_rate(config)

    def update(updates, state, params=None):
        clock: Any = state
        falling = -rate(clock.count)

        def added(name: str, direction: jax.Array, param: jax.Array) -> jax.Array:
            step = falling * direction
            if param.dtype == step.dtype:
                return step
            exact = param.astype(step.dtype)
            after = round_stochastically(exact + step, param.dtype, config.seed, clock.count, f"weight {name}")
            return after.astype(step.dtype) - exact

        return _by_name(added)(updates, params), clock._replace(count=optax.safe_increment(clock.count))

    return optax.GradientTransformation(lambda params: StepCount(jnp.int32(0)), update)


def _stored_as(rule: optax.GradientTransformation, seed: int, **dtypes: str) -> optax.GradientTransformation:
    """A rule whose moments are kept in other dtypes between steps; the arithmetic stays float32."""

    def init(params):
        state: Any = rule.init(params)
        return state._replace(**{kind: optax.tree.cast(getattr(state, kind), dtypes[kind]) for kind in dtypes})

    def update(updates, state, params=None):
        before: Any = state
        exact = {kind: optax.tree.cast(getattr(before, kind), jnp.float32) for kind in dtypes}
        updates, new_state = rule.update(updates, before._replace(**exact), params)
        after: Any = new_state

        def stored(kind: str):
            def rounded(name: str, moment: jax.Array) -> jax.Array:
                return round_stochastically(moment, dtypes[kind], seed, before.count, f"{kind} {name}")

            return _by_name(rounded)(getattr(after, kind))

        return updates, after._replace(**{kind: stored(kind) for kind in dtypes})

    return optax.GradientTransformation(init, update)


def _matrix_axes(names: tuple[str | None, ...]) -> tuple[int, ...]:
    """The axes of a weight that make its matrix: not the layers and experts that it is stacked over, nor a vector's."""
    return tuple(i for i, name in enumerate(names) if name not in ("layers", "experts", "norm"))


def _is_decayed(names: tuple[str | None, ...], optimizer: OptimizerConfig) -> bool:
    return len(_matrix_axes(names)) > 1 and ("vocab" not in names or optimizer.decay_embeddings)


def _is_hidden_matrix(names: tuple[str | None, ...]) -> bool:
    return len(_matrix_axes(names)) > 1 and "vocab" not in names


def _dimension_numbers(names: tuple[str | None, ...]) -> MuonDimensionNumbers:
    """Return the axes that a matrix reduces over: (heads, head_dim) of an attention output, else the first."""
    matrix = _matrix_axes(names)
    inputs = 2 if names[matrix[0]] == "heads" else 1
    return MuonDimensionNumbers(reduction_axis=matrix[:inputs], output_axis=matrix[inputs:])


def _scale_to_rms(update: jax.Array, numbers: MuonDimensionNumbers, rms: float = 0.2) -> jax.Array:
    """An orthogonal matrix [I, O] has root mean square 1 / sqrt(max(I, O)); this gives it `rms`."""
    sides: Any = numbers  # both are tuples of axes here
    inputs, outputs = (math.prod(update.shape[axis] for axis in axes) for axes in sides)
    return update * (rms * math.sqrt(max(inputs, outputs)))
