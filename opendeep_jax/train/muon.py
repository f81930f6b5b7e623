"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal by Newton and Schulz's iteration.

    X <- a X + (b XX' + c (XX')^2) X,   from X = M / |M|

State, coefficients and result are those of `optax.contrib.scale_by_muon`. On one device matrices of one shape, or of
one shape turned round, are iterated together, in a loop: a model of 40 weights has about 8 shapes, and optax's program,
5 unrolled iterations for each weight, took most of the time in which a small model's step was compiled.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

STACKED_NUMBERS = 1 << 24
"""Larger weights are iterated by themselves: beside their time, no program is large, and stacking copies them."""


def muon(steps: int, momentum: float, numbers: Callable[[str], MuonDimensionNumbers]) -> optax.GradientTransformation:
    """Nesterov momentum with orthogonal matrices, of arrays by name.

    Args:
        steps: iterations.
        numbers: which axes of the weight of a name a matrix has; it has one for each index of all others.
    """

    def update(updates, state, params=None):
        before: Any = state
        mu, count = optax.tree.update_moment(updates, before.mu, momentum, 1), optax.safe_increment(before.count)
        ahead = optax.tree.bias_correction(mu, momentum, optax.safe_increment(count))
        here = optax.tree.bias_correction(updates, momentum, count)
        direction = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, ahead, here)
        leaves, tree = jax.tree.flatten_with_path(direction)
        stacks = [Stack.of(leaf, numbers(path[-1].key)) for path, leaf in leaves]
        turned = jax.tree.unflatten(tree, orthogonal(stacks, before.ns_coeffs, steps))
        return turned, MuonState(count, mu, before.ns_coeffs)

    return optax.GradientTransformation(scale_by_muon(ns_steps=steps).init, update)


class Stack(NamedTuple):
    """A weight as matrices [N, S, L], S their shorter side."""

    matrices: Float[Array, "N S L"]
    shape: tuple[int, ...]
    """The weight's, its axes in the order N…, inputs…, outputs…"""
    order: tuple[int, ...]
    """Index of each of those axes in the weight."""
    turned: bool

    @staticmethod
    def of(weight: Array, numbers: MuonDimensionNumbers) -> "Stack":
        """The matrices of a weight with these axes."""
        reduced, made = ((axes,) if isinstance(axes, int) else tuple(axes) for axes in numbers)
        inner = *reduced, *made
        order = *(axis for axis in range(weight.ndim) if axis not in inner), *inner
        inputs, outputs = (math.prod(weight.shape[axis] for axis in axes) for axes in (reduced, made))
        ordered = weight.transpose(order)
        matrices = ordered.reshape(-1, inputs, outputs)
        turned = inputs > outputs
        return Stack(matrices.swapaxes(1, 2) if turned else matrices, ordered.shape, order, turned)

    def weight(self, matrices: Float[Array, "N S L"]) -> Array:
        """The weight of other matrices."""
        ordered = (matrices.swapaxes(1, 2) if self.turned else matrices).reshape(self.shape)
        return ordered.transpose([self.order.index(axis) for axis in range(len(self.order))])


def orthogonal(stacks: list[Stack], coefficients: Float[Array, "3"], steps: int) -> list[Array]:
    """Each stack's weight with its matrices made orthogonal."""
    # Arrays that devices divide in different ways would have to travel to be stacked.
    mesh = jax.sharding.get_abstract_mesh()
    alone, groups = mesh.size > 1, {}
    for index, stack in enumerate(stacks):
        shape = stack.matrices.shape[1:]
        groups.setdefault(index if alone or stack.matrices.size > STACKED_NUMBERS else shape, []).append(index)
    weights: dict[int, Array] = {}
    for members in groups.values():
        matrices = [stacks[index].matrices for index in members]
        counts = [len(each) for each in matrices]
        done = newton_schulz(
            jnp.concatenate(matrices) if len(matrices) > 1 else matrices[0], coefficients, steps, alone
        )
        for index, part in zip(members, jax.lax.split(done, counts), strict=True):
            weights[index] = stacks[index].weight(part)
    return [weights[index] for index in range(len(stacks))]


def newton_schulz(
    x: Float[Array, "N S L"], coefficients: Float[Array, "3"], steps: int, unroll: bool = False
) -> Float[Array, "N S L"]:
    """Matrices whose singular values lie about 1, with the singular vectors of x."""
    a, b, c = coefficients

    def step(_, x):
        gram = x @ x.swapaxes(1, 2)
        return a * x + (b * gram + c * gram @ gram) @ x

    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8)
    return jax.lax.fori_loop(0, steps, step, x, unroll=unroll)
