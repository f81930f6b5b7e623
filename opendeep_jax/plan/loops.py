"""Trip counts of the while loops of a compiled program.

XLA writes the count beside many loops. Where it doesn't, the loop's scalars are evaluated: the condition is a function
of induction variables that grow by a fixed step and of values that never change, which may come from outer loops.
"""

import operator
import re
from collections.abc import Callable
from functools import partial

from opendeep_jax.plan.hlo import Computation, Instruction, Module

Value = int | None
Environment = Callable[[str, int], Value]
"""Gives `("parameter", n)`, and `("element", n)` of a computation's only parameter where that is a tuple."""

DEEPEST = 60
MOST_TRIPS = 1 << 40

_BINARY = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
_COMPARE = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_SAME_VALUE = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "broadcast")
_SAME_TUPLE = ("copy", "copy-done", "opt-barrier", "optimization-barrier")


class Loops:
    """Trip counts of the loops of one program."""

    def __init__(self, module: Module):
        self.module = module
        self.caller: dict[str, tuple[str, Instruction]] = {}
        for name, computation in module.computations.items():
            for x in computation.values():
                runs = (x.attribute("body"), x.attribute("condition")) if x.op == "while" else ()
                runs = runs or (x.called if x.op in ("call", "async-start", "call-start") else ())
                for called in filter(None, runs):
                    self.caller.setdefault(called, (name, x))

    def trips(self, name: str, loop: Instruction) -> int | None:
        """Return the trip count of `loop`, in the computation `name`; None if the text does not determine it."""
        if match := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes):
            return int(match.group(1))
        body, condition = loop.attribute("body"), loop.attribute("condition")
        after, test = self.module.root(body), self.module.root(condition)
        if after is None or test is None or after.op != "tuple":
            return None
        known: dict[tuple[int, int], Value] = {}

        def state(element: int, iteration: int) -> Value:
            """An element of the loop's tuple before its first, second or third iteration."""
            if (element, iteration) not in known:
                known[element, iteration] = None  # against endless recursion
                if iteration == 0:
                    value = self._initial(name, loop, element, self._outer(name))
                else:
                    value = self._scalar(body, after.operands[element], inside(iteration - 1))
                known[element, iteration] = value
            return known[element, iteration]

        def inside(iteration: int) -> Environment:
            return lambda kind, element: state(element, iteration) if kind == "element" else None

        def at(iteration: int) -> Environment:
            def element_at(kind: str, element: int) -> Value:
                first, second, third = (state(element, n) for n in range(3))
                if kind != "element" or first is None or second is None:
                    return None
                step = second - first
                return first + iteration * step if third is None or third - second == step else None

            return element_at

        def goes_on(iteration: int) -> Value:
            return self._scalar(condition, test.name, at(iteration))

        return _first_stop(goes_on)

    def _scalar(self, name: str, wanted: str, env: Environment, depth: int = 0) -> Value:
        """The value of a scalar of computation `name`, None where it depends on data."""
        computation = self.module.computations.get(name, Computation())
        x = computation.get(wanted)
        if x is None or depth > DEEPEST:
            return None
        value = partial(self._scalar, name, env=env, depth=depth + 1)
        if x.op == "constant":
            text = x.argument.strip()
            return int(text) if re.fullmatch(r"-?\d+", text) else {"true": 1, "false": 0}.get(text)
        if x.op == "parameter":
            return env("parameter", x.number)
        if x.op == "get-tuple-element":
            return self._element(name, computation.operand(x, 0), x.number, env, depth + 1)
        if x.op in _SAME_VALUE:
            return value(x.operands[0])
        if x.op in ("fusion", "call"):
            (called,), root = x.called, self.module.root(x.called[0])
            return self._scalar(called, root.name, self._arguments(name, x, env, depth), depth + 1) if root else None
        operands = (
            [value(operand) for operand in x.operands] if x.op in (*_BINARY, *_DIVISION, "compare", "not") else []
        )
        if not operands or None in operands:
            return None
        if x.op == "compare":
            return int(_COMPARE[x.attribute("direction")](*operands))
        if x.op == "not":
            return int(not operands[0])
        if x.op in _DIVISION:
            return _DIVISION[x.op](*operands) if operands[1] else None
        return _BINARY[x.op](*operands)

    def _arguments(self, name: str, x: Instruction, env: Environment, depth: int) -> Environment:
        """The parameters of a computation that `x` calls."""

        def argument(kind: str, number: int) -> Value:
            known = kind == "parameter" and number < len(x.operands)
            return self._scalar(name, x.operands[number], env, depth + 1) if known else None

        return argument

    def _element(self, name: str, source: Instruction | None, element: int, env: Environment, depth: int) -> Value:
        """An element of the tuple that `source` gives."""
        computation = self.module.computations[name]
        while source is not None and source.op in _SAME_TUPLE:
            source = computation.operand(source, 0)
        if source is None or depth > DEEPEST:
            return None
        if source.op == "parameter":
            return env("element", element)
        if source.op == "tuple":
            return self._scalar(name, source.operands[element], env, depth + 1)
        if source.op == "while":
            return self._unchanged(name, source, element, env, depth + 1)
        if source.op == "fusion":
            root = self.module.root(source.called[0])
            if root is not None and root.op == "tuple":
                inner = self._arguments(name, source, env, depth)
                return self._scalar(source.called[0], root.operands[element], inner, depth + 1)
        return None

    def _initial(self, name: str, loop: Instruction, element: int, env: Environment, depth: int = 0) -> Value:
        return self._element(name, self.module.computations[name].operand(loop, 0), element, env, depth)

    def _unchanged(self, name: str, loop: Instruction, element: int, env: Environment, depth: int) -> Value:
        """An element of a loop's tuple that its body hands on as it is."""
        body = self.module.computations.get(loop.attribute("body"), Computation())
        if body.root is None or body.root.op != "tuple":
            return None
        kept = body.get(body.root.operands[element])
        is_same = (
            kept is not None
            and kept.op == "get-tuple-element"
            and kept.number == element
            and body[kept.operands[0]].op == "parameter"
        )
        return self._initial(name, loop, element, env, depth) if is_same else None

    def _outer(self, name: str, depth: int = 0) -> Environment:
        """The parameters of a computation as its caller gives them, where they never change."""

        def given(kind: str, number: int) -> Value:
            if name not in self.caller or depth > DEEPEST // 5:
                return None
            outside, x = self.caller[name]
            env = self._outer(outside, depth + 1)
            if x.op == "while":
                return self._unchanged(outside, x, number, env, 0) if kind == "element" else None
            return self._arguments(outside, x, env, 0)(kind, number)

        return given


_DIVISION = {"divide": lambda a, b: int(a / b), "remainder": lambda a, b: a - b * int(a / b)}
"""XLA's, which round towards zero."""


def _first_stop(goes_on: Callable[[int], Value]) -> int | None:
    """The first iteration at which the loop's condition is false, by bisection; None where it isn't known or never."""
    if goes_on(0) is None:
        return None
    if not goes_on(0):
        return 0
    above = 1
    while goes_on(above):
        above *= 2
        if above > MOST_TRIPS:
            return None
    below = above // 2
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if goes_on(middle) else (below, middle)
    return above
