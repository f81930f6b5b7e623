"""Metrics as shares of devices, micro-batches, parts of a batch, stages and layers, and how shares combine.

What a number means must not depend on how the work is cut, so a share says itself how it meets others. A quantity that
is none of these three kinds (a median, a product) has no shares: gather what it is of first.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.parallel.collectives import Axis, manual_axes, psum


class Sum(NamedTuple):
    """Shares that add up: a loss already divided by the whole batch's targets, a count."""

    value: Array


class Mean(NamedTuple):
    """The sum of some terms and how many they are: the mean of all terms, however unevenly they are divided.

    Terms that several devices have alike (what is whole along `tensor`) may be counted on each of them.
    """

    total: Array
    count: Array


class Max(NamedTuple):
    """The largest of some terms."""

    value: Array


Share = Sum | Mean | Max
Shares = dict[str, Share]
"""Shares by name. A pytree."""


def is_share(x) -> bool:
    """True for the three kinds."""
    return isinstance(x, Share)


def combine(one, other):
    """Combine two pytrees of shares. Raises ConfigError where they are of different kinds."""

    def both(a, b):
        if type(a) is not type(b):
            raise ConfigError(
                f"A {type(a).__name__} and a {type(b).__name__} of one number: they must be of one kind. Give both the "
                "same, or another name."
            )
        return a._make(map(_operation(a), a, b))

    return _each(both, one, other)


def neutral(like, *lead: int):
    """Return neutral shares of these shapes, with leading axes."""

    def empty(share):
        if not isinstance(share, Max):
            return share._make(jnp.zeros((*lead, *x.shape), x.dtype) for x in share)
        dtype = share.value.dtype
        least = -jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min
        return Max(jnp.full((*lead, *share.value.shape), least, dtype))

    return _each(empty, like)


def all_entries(shares):
    """Each share as scalars, float32: those of all entries of its arrays, stacked layers' among them."""

    def scalar(share):
        if isinstance(share, Mean) and jnp.shape(share.total) != jnp.shape(share.count):
            raise ConfigError(
                f"A mean whose total has the shape {jnp.shape(share.total)} and whose count {jnp.shape(share.count)}: "
                "entries that are averaged together need a count each. Sum the total, or broadcast the count."
            )
        reduce = jnp.max if isinstance(share, Max) else jnp.sum
        return share._make(reduce(jnp.asarray(x, jnp.float32)) for x in share)

    return _each(scalar, shares)


def over_devices(shares, axis: Axis):
    """The shares of all devices of the axes, as one."""
    names = manual_axes(axis)
    leaves = jax.tree.leaves(shares, is_leaf=is_share)
    largest = [share for share in leaves if isinstance(share, Max)]
    others = psum([share for share in leaves if not isinstance(share, Max)], axis)
    largest, others = iter(lax.pmax(largest, names) if names and largest else largest), iter(others)
    return _each(lambda share: next(largest if isinstance(share, Max) else others), shares)


def values(shares: Any) -> Any:
    """Return the values of complete shares."""

    def number(share):
        return share.total / jnp.maximum(share.count, 1) if isinstance(share, Mean) else share.value

    return _each(number, shares)


def _operation(share: Share):
    return jnp.maximum if isinstance(share, Max) else jnp.add


def _each(function, *trees):
    def checked(share, *more):
        if not is_share(share):
            raise ConfigError(
                f"A plain {type(share).__name__} where shares of a number meet: it does not say how. Make it a Sum, a "
                "Mean or a Max (parallel/shares.py)."
            )
        return function(share, *more)

    return jax.tree.map(checked, *trees, is_leaf=is_share)
