"""Gradients to updates: AdamW (Loshchilov and Hutter 2019) and Muon (Jordan et al. 2024), with V3's schedules.

Parameters are a dictionary of arrays by name (models/parameters.py); which rule a weight falls under is read off its
logical axes.
"""

import math

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from opendeep_jax.config.schedule import step_at_tokens, tokens_before, total_steps
from opendeep_jax.config.schema import OptimizerConfig, RunConfig

Axes = dict[str, tuple[str | None, ...]]


def learning_rate_schedule(config: RunConfig) -> optax.Schedule:
    """The learning rate as a fraction of its peak, as a function of the step (from 0)."""
    optimizer, steps = config.optimizer, total_steps(config)
    warmup = optimizer.warmup_steps
    if optimizer.schedule == "phases":
        parts, ends = _phases(config)
    elif optimizer.schedule == "cosine":
        parts = [_cosine(1.0, optimizer.final_fraction, max(steps - warmup, 1))]
        ends = [steps]
    elif optimizer.schedule == "wsd":
        decay = min(max(round(steps * optimizer.decay_fraction), 1), max(steps - warmup, 1))
        parts = [optax.constant_schedule(1.0), optax.linear_schedule(1.0, optimizer.final_fraction, decay)]
        ends = [steps - decay, steps]
    else:
        parts, ends = [optax.constant_schedule(1.0)], [steps]
    # Step 0 already learns: its rate is the first stair of the warm-up, not 0.
    warm = optax.linear_schedule(1.0 / max(warmup, 1), 1.0, max(warmup - 1, 1))
    return optax.join_schedules([warm, *parts], [warmup, *ends[:-1]])


def _phases(config: RunConfig) -> tuple[list[optax.Schedule], list[int]]:
    """V3's phases, which follow the warm-up: token counts become steps."""
    parts, ends, rate, start = [], [], 1.0, config.optimizer.warmup_steps
    tokens = tokens_before(config, start)
    for phase in config.optimizer.phases:
        tokens += phase.tokens
        end = round(step_at_tokens(config, tokens))
        span = max(end - start, 1)
        if phase.shape == "constant":
            parts.append(optax.constant_schedule(phase.to))
        elif phase.shape == "linear":
            parts.append(optax.linear_schedule(rate, phase.to, span))
        else:
            parts.append(_cosine(rate, phase.to, span))
        ends.append(end)
        rate, start = phase.to, end
    return parts, ends


def _cosine(begin: float, end: float, span: int) -> optax.Schedule:
    """Half a cosine from `begin` to `end`, up or down, then constant."""

    def rate(step):
        return end + (begin - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(step / span, 0, 1)))

    return rate


def make_optimizer(config: RunConfig, axes: Axes) -> optax.GradientTransformation:
    """The update rule without clipping (`train.step` clips, as it reports the norm).

    Norm scales are never decayed; the embedding and head only if `decay_embeddings`. Under `muon` every hidden
    matrix, each layer's and each expert's by itself, is orthogonalised; embedding, head and norms go by AdamW.
    """
    optimizer = config.optimizer
    schedule = learning_rate_schedule(config)
    adam = _adamw(optimizer, schedule, axes)
    if optimizer.kind == "adamw":
        return adam
    labels = {name: "muon" if _is_hidden_matrix(axes[name]) else "adamw" for name in axes}

    def of_matrices(function):
        """A function of a tree that applies `function(value, dimension numbers)` to each matrix.

        optax.partition leaves a MaskedNode, not an array, where a parameter is the other rule's.
        """

        def of_tree(tree, params=None):
            return {
                name: value if isinstance(value, optax.MaskedNode) else function(value, _dimension_numbers(axes[name]))
                for name, value in tree.items()
            }

        return of_tree

    muon = optax.chain(
        scale_by_muon(
            ns_steps=optimizer.muon_steps,
            beta=optimizer.muon_momentum,
            mu_dtype=jnp.dtype(optimizer.first_moment_dtype),
            weight_dimension_numbers=of_matrices(lambda value, numbers: numbers),
        ),
        # An update's root mean square is 0.2, as AdamW's tends to be, so that both share one learning rate
        # (Liu et al. 2025, arXiv:2502.16982).
        optax.stateless(of_matrices(_scale_to_rms)),
        optax.add_decayed_weights(optimizer.weight_decay),
        optax.scale_by_learning_rate(lambda step: optimizer.learning_rate * schedule(step)),
    )
    return optax.partition({"muon": muon, "adamw": adam}, lambda params: {name: labels[name] for name in params})


def _adamw(optimizer: OptimizerConfig, schedule: optax.Schedule, axes: Axes) -> optax.GradientTransformation:
    return optax.chain(
        _stored_as(
            optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.epsilon),
            mu=jnp.dtype(optimizer.first_moment_dtype),
            nu=jnp.dtype(optimizer.second_moment_dtype),
        ),
        optax.add_decayed_weights(
            optimizer.weight_decay,
            mask=lambda params: {name: _is_decayed(axes[name], optimizer) for name in params},
        ),
        optax.scale_by_learning_rate(lambda step: optimizer.learning_rate * schedule(step)),
    )


def _stored_as(adam: optax.GradientTransformation, **dtypes) -> optax.GradientTransformation:
    """Adam whose moments are kept in other dtypes between steps; the arithmetic stays float32."""

    def cast(state, dtypes):
        return state._replace(**{name: optax.tree.cast(getattr(state, name), dtype) for name, dtype in dtypes.items()})

    def init(params):
        return cast(adam.init(params), dtypes)

    def update(grads, state, params=None):
        updates, state = adam.update(grads, cast(state, dict.fromkeys(dtypes, jnp.float32)), params)
        return updates, cast(state, dtypes)

    return optax.GradientTransformation(init, update)


def _matrix_axes(names: tuple[str | None, ...]) -> tuple[int, ...]:
    """The axes of a weight that make its matrix: not the layers and experts that it is stacked over, nor a vector's."""
    return tuple(i for i, name in enumerate(names) if name not in ("layers", "experts", "norm"))


def _is_decayed(names: tuple[str | None, ...], optimizer: OptimizerConfig) -> bool:
    return len(_matrix_axes(names)) > 1 and ("vocab" not in names or optimizer.decay_embeddings)


def _is_hidden_matrix(names: tuple[str | None, ...]) -> bool:
    return len(_matrix_axes(names)) > 1 and "vocab" not in names


def _dimension_numbers(names: tuple[str | None, ...]) -> MuonDimensionNumbers:
    """Which axes a matrix reduces over: (heads, head_dim) of an attention output, else the first."""
    matrix = _matrix_axes(names)
    inputs = 2 if names[matrix[0]] == "heads" else 1
    return MuonDimensionNumbers(reduction_axis=matrix[:inputs], output_axis=matrix[inputs:])


def _scale_to_rms(update: jax.Array, numbers: MuonDimensionNumbers, rms: float = 0.2) -> jax.Array:
    """An orthogonal matrix [I, O] has root mean square 1 / sqrt(max(I, O)); this gives it `rms`."""
    inputs, outputs = (math.prod(update.shape[axis] for axis in axes) for axes in numbers)
    return update * (rms * math.sqrt(max(inputs, outputs)))
