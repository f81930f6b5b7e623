"""Work of a compiled program on one device: FLOPs, HBM traffic and messages, multiplied by loops' trip counts."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from opendeep_jax.plan.hlo import HOST, Computation, Instruction, Module, first_group, parse, source_target_pairs
from opendeep_jax.plan.loops import Loops
from opendeep_jax.plan.work import NO_KERNEL, custom_call_flops, is_fp8, kernel_bytes, matmul_flops

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Collective(NamedTuple):
    """A message that all devices of a group take part in."""

    kind: str
    """One of COLLECTIVES. An all-reduce of which only this device's part is kept, as TPU programs write a
    reduce-scatter, is a reduce-scatter."""
    group: tuple[int, ...]
    """Devices of the first group; of a collective-permute, the first pair that sends."""
    payload: float
    """Bytes of the whole tensor on each device: gathered, or before it is reduced or exchanged. A ragged exchange
    counts its whole operand, an upper bound."""
    hbm_bytes: float
    """Bytes read from and written to HBM."""
    is_async: bool
    """True if the device computes while it is in flight."""

    @property
    def sent(self) -> float:
        """Bytes that each device sends, in a ring."""
        n = len(self.group)
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.payload if n > 1 else 0.0
        return (2 if self.kind == "all-reduce" else 1) * self.payload * (n - 1) / n


class Kernel(NamedTuple):
    """One thing that the device runs."""

    flops: float
    fp8_flops: float
    """Those of `flops` whose operands are 8-bit floats."""
    bytes: float


class Event(NamedTuple):
    """Event in a computation's schedule."""

    kernel: Kernel | None = None
    """Runs to its end."""
    messages: tuple[Collective, ...] = ()
    """Begin now; waited for if there is no `name`."""
    name: str = ""
    """Name of the instruction that starts the messages, or, alone, whose messages are waited for."""
    body: tuple[str, bool] | None = None
    """A computation that runs `times` times, a key of Program.schedule."""
    times: float = 1


@dataclass
class Program:
    """Totals of one device and one run of the program."""

    flops: float = 0.0
    fp8_flops: float = 0.0
    hbm_bytes: float = 0.0
    host_bytes: float = 0.0
    """Results that lie in the host's memory."""
    unknown_loops: float = 0.0
    """Loops whose trip count the text doesn't tell, counted once each."""
    kernels: Counter[Kernel] = field(default_factory=Counter)
    """Kernels that run in sequence, with their counts; without those that overlap them."""
    collectives: Counter[Collective] = field(default_factory=Counter)
    uncounted: Counter[str] = field(default_factory=Counter)
    """Kernels that say nothing of their FLOPs."""
    flops_by_name: Counter[str] = field(default_factory=Counter)
    bytes_by_name: Counter[str] = field(default_factory=Counter)
    devices: int = 1
    schedule: dict[tuple[str, bool], list[Event]] = field(default_factory=dict)
    """Events of each computation in their order."""
    entry: tuple[str, bool] = ("", False)
    """The computation that is the program."""

    SUMS = ("flops", "fp8_flops", "hbm_bytes", "host_bytes", "unknown_loops")
    COUNTERS = ("kernels", "collectives", "uncounted", "flops_by_name", "bytes_by_name")

    def add(self, other: "Program", times: float = 1) -> None:
        """Add another program's totals, multiplied by a count."""
        for name in self.SUMS:
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for name in self.COUNTERS:
            mine = getattr(self, name)
            for key, count in getattr(other, name).items():
                mine[key] += times * count


def analyze(text: str) -> Program:
    """Read a compiled program's text (`compiled.as_text()`). Raises ValueError where it is none."""
    module = parse(text)
    reader = _Reader(module)
    total = Program(devices=module.devices)
    total.add(reader.read(module.entry))
    total.schedule, total.entry = reader.schedule, (module.entry, False)
    return total


class _Reader:
    def __init__(self, module: Module):
        self.module, self.loops = module, Loops(module)
        self.known: dict[tuple[str, bool], Program] = {}
        self.schedule: dict[tuple[str, bool], list[Event]] = {}

    def read(self, name: str, is_async: bool = False) -> Program:
        """Totals of one run of a computation, which may run beside others."""
        if (name, is_async) in self.known:
            return self.known[name, is_async]
        total = self.known[name, is_async] = Program()
        events = self.schedule[name, is_async] = []
        computation = self.module.computations.get(name, Computation())
        for x in computation.values():
            if x.op.endswith(("-done", "-update")):
                if x.op.endswith("-done") and (start := _start_of(computation, x)):
                    events.append(Event(name=start))
                continue
            if (kind := _collective_kind(x)) is not None:
                message = self._collective(computation, x, kind, is_async or _hides(x))
                total.collectives[message] += 1
                total.hbm_bytes += message.hbm_bytes
                events.append(Event(messages=(message,), name=(_rendezvous(x) or x.name) if message.is_async else ""))
            elif x.op == "while":
                trips = self.loops.trips(name, x)
                total.unknown_loops += trips is None
                trips = 1 if trips is None else trips
                total.add(self.read(x.attribute("body"), is_async), trips)
                events.append(Event(body=(x.attribute("body"), is_async), times=trips))
            elif x.op == "conditional":
                branches = x.listed("branch_computations")
                branches = branches or [x.attribute("true_computation"), x.attribute("false_computation")]
                costliest = max(branches, key=lambda branch: _weight(self.read(branch, is_async)))
                total.add(self.read(costliest, is_async))
                events.append(Event(body=(costliest, is_async)))
            elif x.op == "call" or (x.op.endswith("-start") and x.called):
                beside = is_async or _hides(x)
                for called in x.called:
                    part = self.read(called, beside)
                    total.add(part)
                    if beside and not is_async:
                        events.append(Event(messages=tuple(part.collectives.elements()), name=x.name))
                    else:
                        events.append(Event(body=(called, beside)))
            else:
                self._kernel(total, events, computation, x, is_async)
        return total

    def _kernel(
        self, total: Program, events: list[Event], computation: Computation, x: Instruction, is_async: bool
    ) -> None:
        flops, fp8 = matmul_flops(computation, x), 0.0
        inner = ()
        if x.op == "fusion":
            flops, fp8, uncounted, messages = self._inside(x.called[0])
            total.uncounted.update(uncounted)
            # Inside a matmul's fusion a message is hidden by the matmul; alone in a fusion the device waits for it.
            hidden = is_async or flops > 0 or "async" in x.name
            moved = kernel_bytes(self.module, computation, x)
            inner = tuple(message._replace(is_async=hidden, hbm_bytes=moved) for message in messages)
            total.collectives.update(inner)
            events.append(Event(messages=inner, name=x.name if hidden else ""))
        elif x.op == "custom-call":
            known = custom_call_flops(computation, x)
            flops = known or 0.0
            if known is None:
                total.uncounted[f"{x.target} {_label(x)}"] += 1
        if flops and not fp8 and x.op != "fusion" and is_fp8(computation, x):
            fp8 = flops
        total.flops += flops
        total.fp8_flops += fp8
        if x.op in NO_KERNEL:
            return
        moved = kernel_bytes(self.module, computation, x)
        total.hbm_bytes += moved
        total.host_bytes += sum(shape.bytes for shape in x.shapes if shape.space == HOST)
        total.bytes_by_name[_label(x)] += moved
        if flops:
            total.flops_by_name[_label(x)] += flops
        beside = is_async or x.op.endswith("-start")
        if (flops or (moved and not inner)) and not beside:
            total.kernels[Kernel(flops, fp8, moved)] += 1
            events.append(Event(kernel=Kernel(flops, fp8, moved)))
        if inner and inner[0].is_async:
            events.append(Event(name=x.name))

    def _inside(self, name: str) -> tuple[float, float, Counter[str], list[Collective]]:
        """FLOPs, FP8 FLOPs, unknown kernels and messages of a fused computation and those fused into it."""
        computation = self.module.computations.get(name, Computation())
        flops, fp8, uncounted, messages = 0.0, 0.0, Counter(), []
        for x in computation.values():
            if (kind := _collective_kind(x)) is not None:
                users = computation.users.get(x.name, ())
                if kind == "all-reduce" and any(user.op == "dynamic-slice" for user, _ in users):
                    kind = "reduce-scatter"
                messages.append(self._collective(computation, x, kind, False))
            elif x.op in ("fusion", "call") or (x.op.endswith("-start") and x.called):
                for called in x.called:
                    inner = self._inside(called)
                    flops, fp8, messages = flops + inner[0], fp8 + inner[1], messages + inner[3]
                    uncounted.update(inner[2])
            else:
                own = matmul_flops(computation, x)
                if x.op == "custom-call":
                    known = custom_call_flops(computation, x)
                    own = known or 0.0
                    uncounted.update([f"{x.target} {_label(x)}"] if known is None else [])
                flops += own
                fp8 += own if own and is_fp8(computation, x) else 0.0
        return flops, fp8, uncounted, messages

    def _collective(self, computation: Computation, x: Instruction, kind: str, is_async: bool) -> Collective:
        operands = [computation.operand(x, place) for place in range(len(x.operands))]
        if kind == "ragged-all-to-all":  # the others are the buffer for its result, offsets and sizes
            operands = operands[:1]
        given = [shape for source in operands if source for shape in source.shapes]
        payload = read = sum(shape.bytes for shape in given)
        group = _slices_group(x, self.module.devices) or first_group(x, self.module.devices)
        if kind == "collective-permute":
            group = next((pair for pair in source_target_pairs(x) if pair[0] != pair[1]), (0,))
        if kind == "all-gather":
            payload *= len(group)
        written = payload / len(group) if kind == "reduce-scatter" else payload
        read = sum(shape.hbm_bytes for shape in given)
        written = written if all(shape.hbm_bytes or not shape.bytes for shape in x.shapes) else 0.0
        return Collective(kind, group, payload, read + written, is_async)


def _start_of(computation: Computation, done: Instruction) -> str:
    """The name of the instruction that started what `done` waits for; empty where it isn't in the computation."""
    x = computation.operand(done, 0)
    if done.op == "recv-done" and x is not None:
        return _rendezvous(x)
    while x is not None and not x.op.endswith("-start"):
        x = computation.operand(x, 0) if x.op in ("get-tuple-element", "bitcast") or x.op.endswith("-update") else None
    return x.name if x is not None else ""


def _hides(x: Instruction) -> bool:
    """Return whether the device continues before this instruction is done; GPU programs mark starts that wait."""
    return (x.op == "send" or x.op.endswith("-start")) and '"is_sync":true' not in x.attributes


def _collective_kind(x: Instruction) -> str | None:
    base = x.op.removesuffix("-start")
    if x.op == "send" and (transfer := re.search(r'_xla_megascale_transfer_type="(\w+)"', x.attributes)):
        base = transfer.group(1).lower().replace("_", "-")
        return base if base in COLLECTIVES else "collective-permute"
    return base if base in COLLECTIVES else None


def _rendezvous(x: Instruction) -> str:
    """The name that the two ends of a transfer between slices share. TPU programs send through their hosts."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', x.attributes)
    return found.group(1) if found else ""


def _slices_group(x: Instruction, devices: int) -> tuple[int, ...]:
    """A device's counterparts in the slices of `_xla_megascale_target="{1,2}x{0:3}"`; empty for anything else.

    Such a program is that of one slice: its devices are numbered within it, those of the next slice after them.
    """
    found = re.search(r'_xla_megascale_target="\{([\d,:]*)\}', x.attributes)
    if not found:
        return ()
    count = 0
    for part in found.group(1).split(","):
        first, _, last = part.partition(":")
        count += int(last or first) - int(first) + 1
    return tuple(slice_index * devices for slice_index in range(count))


def _weight(part: Program) -> tuple[float, float]:
    """Return the weight of a conditional's branch: the approximate time of its work on a recent chip."""
    sent = sum(message.sent * count for message, count in part.collectives.items())
    return part.flops / 4e14 + part.hbm_bytes / 2e12 + sent / 1e11, part.flops


_NO_NAMES = ("", "while", "body", "closed_call", "eval_jaxpr", "checkpoint", "pallas_call", "shard_map")
_PASSES: tuple[tuple[str, str], ...] = (("rematted", "again "), ("transpose(", "backward "))


def _label(x: Instruction) -> str:
    """An instruction's name with where it came from."""
    path = [part for part in x.op_name.split("/") if part not in _NO_NAMES]
    direction = next((word for mark, word in _PASSES if mark in x.op_name), "")
    return f"{x.name} [{direction}{'/'.join(path[-2:])}]" if path else x.name
