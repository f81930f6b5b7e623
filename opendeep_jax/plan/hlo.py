"""The text of a compiled program (optimized HLO) as data: computations, instructions, shapes, groups of devices.

An SPMD program's text is the program of one device, so every size in it is that of one device's part.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

VIEWS = ("bitcast", "reshape", "transpose", "convert", "copy")
"""Operations that show the same values in another form."""

HBM, HOST = 0, 5
"""Memory spaces in a layout, as in `{1,0:S(5)}`; the others (VMEM, SMEM, semaphores) are on the chip."""

_BITS = {"pred": 8, "token": 0, "f4e2m1fn": 4}
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_INSTRUCTION = re.compile(r"\s+(ROOT\s+)?%?([\w.\-]+)\s+=\s+(?=[\w(])")
_COMPUTATION = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*->.*)?\{\s*$")
_COMMENT = re.compile(r"/\*.*?\*/")


class ArrayShape(NamedTuple):
    """An array's shape as a device holds it, without the padding of its tiles."""

    dtype: str
    dims: tuple[int, ...]
    bytes: float
    space: int
    """HBM, HOST, or another memory on the chip."""

    @property
    def hbm_bytes(self) -> float:
        """Its bytes if it lies in HBM, else 0."""
        return self.bytes if self.space == HBM else 0.0


@dataclass(slots=True)
class Instruction:
    """One line of a computation, `%name = shapes op(operands), attributes`."""

    name: str
    op: str
    shapes: list[ArrayShape]
    """Shapes of the result; several for a tuple, nested tuples flattened."""
    operands: list[str]
    argument: str
    """Text in parentheses: the operands' names, a constant's value, a parameter's number."""
    attributes: str
    is_root: bool
    plain: str = field(default="", repr=False)
    """The attributes with what is in quotation marks emptied."""

    def attribute(self, key: str) -> str | None:
        """The word behind `key=`, as in `body=%loop`; None where there is none."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.plain)
        return match.group(1) if match else None

    def listed(self, key: str) -> list[str]:
        """The names in `key={...}`; empty where there is none."""
        match = re.search(rf"\b{key}=\{{([^}}]*)\}}", self.plain)
        return re.findall(r"%?([\w.\-]+)", match.group(1)) if match else []

    @property
    def number(self) -> int:
        """A parameter's number, or the element that a get-tuple-element takes."""
        return int(self.attribute("index") if self.op == "get-tuple-element" else re.search(r"\d+", self.argument)[0])

    @property
    def called(self) -> list[str]:
        """Computations that it runs once, as a fusion, a call or an asynchronous start does."""
        one = self.attribute("calls") or self.attribute("to_apply") or self.attribute("called_computation")
        return [one] if one else self.listed("called_computations")

    @property
    def op_name(self) -> str:
        """Origin of the instruction: JAX's path through the traced functions."""
        match = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match.group(1) if match else ""

    @property
    def target(self) -> str:
        """A custom call's target."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match.group(1) if match else ""

    @property
    def result_bytes(self) -> float:
        """Bytes of its results that lie in HBM."""
        return sum(shape.hbm_bytes for shape in self.shapes)


class Computation(dict[str, Instruction]):
    """Instructions by name, in the order in which they run."""

    @cached_property
    def root(self) -> Instruction | None:
        """The instruction whose result is the computation's."""
        return next((x for x in self.values() if x.is_root), None)

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Users of each name: instructions, with its index among their operands."""
        users = defaultdict(list)
        for x in self.values():
            for place, operand in enumerate(x.operands):
                users[operand].append((x, place))
        return users

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        return {x.number: x for x in self.values() if x.op == "parameter"}

    def operand(self, x: Instruction, place: int) -> Instruction | None:
        """The instruction that gives an operand; None where there is none."""
        return self.get(x.operands[place]) if place < len(x.operands) else None

    def operand_shape(self, x: Instruction, place: int) -> ArrayShape:
        """The (first) shape of an operand; a scalar's where it isn't known."""
        source = self.operand(x, place)
        return source.shapes[0] if source and source.shapes else ArrayShape("f32", (), 4.0, HBM)


@dataclass
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: str
    devices: int
    """Devices that run it."""

    def root(self, name: str | None) -> Instruction | None:
        """The root of a computation; None where there is no such computation."""
        return self.computations[name].root if name in self.computations else None


def parse(text: str) -> Module:
    """Read the text of a compiled program. Raises ValueError where it has no entry computation."""
    computations: dict[str, Computation] = {}
    current, entry = None, ""
    for line in _whole_lines(text):
        if current is not None and (match := _INSTRUCTION.match(line)):
            if x := _instruction(match.group(2), line[match.end() :], bool(match.group(1))):
                current[x.name] = x
        elif line.startswith("}"):
            current = None
        elif current is None and (match := _COMPUTATION.match(line)):
            current = computations.setdefault(match.group(2), Computation())
            entry = match.group(2) if match.group(1) else entry
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program")
    count = re.search(r"num_partitions=(\d+)", text) or re.search(r"replica_count=(\d+)", text)
    return Module(computations, entry, int(count.group(1)) if count else 1)


def _whole_lines(text: str) -> Iterator[str]:
    """The lines, with those of one instruction (its attributes may hold line breaks) joined."""
    pending = ""
    for line in text.splitlines():
        if _INSTRUCTION.match(line):
            if pending:
                yield pending
            pending = line
        elif pending and not (line.startswith("}") and _is_closed(pending)):
            pending += " " + line.strip()
        else:
            if pending:
                yield pending
                pending = ""
            yield line
    if pending:
        yield pending


def _is_closed(line: str) -> bool:
    bare = _STRING.sub("", line)
    return '"' not in bare and all(bare.count(left) <= bare.count(right) for left, right in ("()", "[]", "{}"))


def _closing(text: str, start: int) -> int:
    """The index behind the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()\[\]{}]").finditer(text, start):
        depth += 1 if match.group() in "([{" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _instruction(name: str, text: str, is_root: bool) -> Instruction | None:
    end = _closing(text, 0) if text.startswith("(") else text.find(" ")
    match = re.compile(r"\s*([\w\-]+)\(").match(text, end)
    if not match:
        return None
    after = _closing(text, match.end() - 1)
    argument = _COMMENT.sub("", text[match.end() : after - 1])
    operands = re.findall(r"%([\w.\-]+)", argument) or re.findall(r"(?:^|,)\s*([A-Za-z_][\w.\-]*)\s*(?=,|$)", argument)
    attributes = text[after:]
    plain = _STRING.sub('""', attributes)
    return Instruction(name, match.group(1), _shapes(text[:end]), operands, argument, attributes, is_root, plain)


def _shapes(text: str) -> list[ArrayShape]:
    return [_shape(*found) for found in _SHAPE.findall(text)]


def _shape(dtype: str, dims: str, layout: str) -> ArrayShape:
    sizes = tuple(int(size) for size in dims.split(",") if size)
    space = re.search(r"S\((\d+)\)", layout)
    return ArrayShape(dtype, sizes, math.prod(sizes) * dtype_bytes(dtype), int(space.group(1)) if space else HBM)


def dtype_bytes(dtype: str) -> float:
    """Bytes of one value: 2 for bf16, 0.5 for s4, 1 for f8e4m3fn."""
    if dtype not in _BITS:
        _BITS[dtype] = int(re.search(r"\d+", dtype).group())
    return _BITS[dtype] / 8


def first_group(x: Instruction, devices: int) -> tuple[int, ...]:
    """Devices of a collective's first group, from any of the notations that XLA has; all where none is given."""
    text = x.attributes
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", match.group(1))}
        strides = {axis: math.prod(list(sizes.values())[place + 1 :]) for place, axis in enumerate(sizes)}
        group = [0]
        for axis in re.findall(r"'([^':]+)", match.group(2)):
            if axis in sizes:
                group = [device + step * strides[axis] for device in group for step in range(sizes[axis])]
        return tuple(group)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sizes = [int(size) for size in match.group(3).split(",")]
        order = [int(place) for place in match.group(4).split(",")] if match.group(4) else list(range(len(sizes)))
        strides = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
        group = []
        for member in range(int(match.group(2))):
            device = 0
            for place in reversed(order):
                member, index = divmod(member, sizes[place])
                device += index * strides[place]
            group.append(device)
        return tuple(group)
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return tuple(int(device) for device in match.group(1).split(",") if device)
    return tuple(range(devices))


def source_target_pairs(x: Instruction) -> tuple[tuple[int, int], ...]:
    """Return the (source, target) pairs of a collective-permute."""
    match = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", x.attributes)
    return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", match.group(1))) if match else ()
