"""Looking into jaxprs: what a program computes, before XLA changes it."""

import math
from collections import Counter
from collections.abc import Iterator

import jax
from jax.extend import core


def subjaxprs(equation) -> Iterator[core.Jaxpr]:
    """The jaxprs that an equation (a scan, a checkpoint, a custom derivative, …) carries."""
    for leaf in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)):
        if isinstance(leaf, core.ClosedJaxpr):
            yield leaf.jaxpr
        elif isinstance(leaf, core.Jaxpr):
            yield leaf


def shapes_in(jaxpr) -> Iterator[tuple[int, ...]]:
    """The shapes of all that a (closed) jaxpr computes, at any depth."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in subjaxprs(equation):
            yield from shapes_in(inner)


def named_sizes(jaxpr, times: int = 1) -> Counter[str]:
    """Numbers in the activations that a (closed) jaxpr names for remat; a scan's body counts at each turn."""
    sizes: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        params, turns = equation.params, times
        if equation.primitive.name == "name":
            sizes[params["name"]] += times * sum(math.prod(variable.aval.shape) for variable in equation.outvars)
        elif equation.primitive.name == "scan":
            turns = times * params["length"]
        for inner in subjaxprs(equation):
            sizes += named_sizes(inner, turns)
    return sizes


def matmul_flops(jaxpr) -> int:
    """FLOPs (2 per multiply-add) of all matmuls that a (closed) jaxpr executes; a scan's body counts at each turn."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        shapes = [variable.aval.shape for variable in equation.invars]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            out = equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(shapes[0][axis] for axis in contracted)
        elif name.startswith("ragged_dot"):
            total += _ragged_dot_flops(shapes, equation.outvars[0].aval.shape, params)
        else:
            times = params["length"] if name == "scan" else 1
            total += times * sum(matmul_flops(inner) for inner in subjaxprs(equation))
    return total


def _ragged_dot_flops(shapes, out, params) -> int:
    """Each row meets one group's matrix, so the groups' axis is no factor."""
    numbers = params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    inner = math.prod(shapes[0][axis] for axis in contracted)
    if set(contracted) & set(numbers.lhs_ragged_dimensions):  # the sum over each group's rows: [G, K, N]
        return 2 * math.prod(out[1:]) * inner
    return 2 * math.prod(out) * inner
