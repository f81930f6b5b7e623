"""Lower bounds of a program's time: compute, memory and network, each at its data-sheet speed.

Every time here is a bound, not a measurement. Of one step:

- `compute`, `memory`, `collective`: each of the three alone. The network's is that of its busiest part: a dimension of
  the torus, the NVLink switch, or the data-centre network.
- `fastest`: the longest of the three, all else hidden behind it.
- `scheduled`: what the compiled program allows. Kernels run one after another, each at its own roofline; messages that
  the program waits for stop them, the others hide behind them.
- `timeline`: the same in the program's own order; a hidden message is waited for where its result is used before it
  has arrived.
- `slowest`: the three in turn, nothing hidden.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import NamedTuple

from opendeep_jax.parallel.chips import Chip
from opendeep_jax.plan.program import Collective, Event, Kernel, Program
from opendeep_jax.plan.topology import Topology

DCN, SWITCH, ON_CHIP = "data-centre network", "NVLink", "on chip"
TORUS = ("torus x", "torus y", "torus z")
EXCHANGES = ("all-to-all", "ragged-all-to-all")


class Roofline(NamedTuple):
    """Roofline of one step, in seconds; see the module's docstring."""

    compute: float
    memory: float
    collective: float
    kernels: float
    """All kernels one after another, each at its own roofline."""
    waiting: float
    """Messages that the program waits for."""
    hidden: float
    """Messages that run beside the kernels, as the busiest part of the network takes them."""
    in_order: float
    """Kernels and messages in the program's order, `timeline` in seconds."""

    @property
    def fastest(self) -> float:
        """The longest of the three."""
        return max(self.compute, self.memory, self.collective)

    @property
    def scheduled(self) -> float:
        """Seconds of the compiled program's schedule, with messages hidden where it allows."""
        return max(max(self.kernels, self.hidden) + self.waiting, self.fastest)

    @property
    def timeline(self) -> float:
        """Seconds of the compiled program in its own order."""
        return max(self.in_order, self.scheduled)

    @property
    def slowest(self) -> float:
        """The three in turn."""
        return max(self.compute + self.memory + self.collective, self.timeline)

    @property
    def bound(self) -> str:
        """Longest of the three: `compute`, `memory` or `network`."""
        terms = {"compute": self.compute, "memory": self.memory, "network": self.collective}
        return max(terms, key=terms.__getitem__)


class Network:
    """The network between the devices of a mesh, and who of them shares which axes.

    Args:
        topology: the cluster.
        axis_sizes: sizes of the mesh axes by name, the outermost first.
        places: for each device of the mesh, in its order, its slice and its coordinates on the torus.

    A program numbers the devices of the first slice in the mesh's order, then those of the next.
    """

    def __init__(self, topology: Topology, axis_sizes: dict[str, int], places: list[tuple[int, tuple[int, ...]]]):
        self.topology, self.axis_sizes = topology, axis_sizes
        order = range(len(places))
        self.order = sorted(order, key=lambda i: places[i][0]) if topology.chip.platform == "tpu" else list(order)
        self.places = [places[i] for i in self.order]
        self._known_spans: dict[tuple[int, ...], tuple[int, dict[int, int]]] = {}

    @classmethod
    def of_mesh(cls, topology: Topology, mesh) -> "Network":
        """The network of a mesh over (compile-only) devices of the topology."""
        places = []
        for device in mesh.devices.flat:
            if topology.chip.platform == "gpu":
                places.append((device.id // topology.slice_devices, ()))
            else:
                slice_index = getattr(device, "slice_index", 0) if topology.slices > 1 else 0
                places.append((slice_index, tuple(device.coords[: len(topology.shape)])))
        return cls(topology, dict(mesh.shape), places)

    @cached_property
    def device(self) -> Chip:
        """The chip's figures for one device."""
        return self.topology.chip.per_device()

    def axes(self, group: tuple[int, ...]) -> str:
        """The mesh axes that a group spans, as `fsdp` or `fsdp+expert`; `none` for a single device."""
        names, stride = [], 1
        for name, size in reversed(self.axis_sizes.items()):
            if len({self.order[device] // stride % size for device in group}) > 1:
                names.append(name)
            stride *= size
        return "+".join(reversed(names)) or "none"

    def seconds(self, message: Collective) -> dict[str, float]:
        """Return how long each part of the network is busy with a message, on each device."""
        n = len(message.group)
        if n < 2 or not message.payload:
            return {}
        slices, extents = self._spans(message.group)
        inner = n // slices or 1
        payload, device, busy = message.payload, self.device, {}
        if message.kind == "collective-permute":
            if slices > 1:
                return {DCN: payload / device.dcn}
            if self.topology.chip.platform == "gpu":
                return {SWITCH: payload / device.link}
            (_, start), (_, end) = (self.places[member] for member in message.group)
            return {
                TORUS[dim]: payload * self._distance(dim, a, b) / device.link
                for dim, (a, b) in enumerate(zip(start, end, strict=True))
                if a != b
            } or {ON_CHIP: payload / self._on_chip}
        if slices > 1:
            share = payload if message.kind in EXCHANGES else payload / inner
            twice = 2 if message.kind == "all-reduce" else 1
            busy[DCN] = twice * share * (slices - 1) / slices / device.dcn
        if inner == 1:
            return busy
        within = message._replace(group=message.group[:inner]).sent
        if message.kind in EXCHANGES:
            within *= inner / n  # what stays within the slice
        if self.topology.chip.platform == "gpu":
            return {**busy, SWITCH: within / device.link}
        if not extents:
            return {**busy, ON_CHIP: within / self._on_chip}
        if message.kind in EXCHANGES:  # each message takes its way along every dimension: the busiest link counts
            held = payload * inner / n
            return {**busy, **{TORUS[dim]: held * size / 4 / self._speed(dim, size) for dim, size in extents.items()}}
        speed = sum(self._speed(dim, size) for dim, size in extents.items())
        return {**busy, **{TORUS[dim]: within / speed for dim in extents}}

    @property
    def _on_chip(self) -> float:
        """Bytes/s between the devices of one chip: at least as fast as all its links together."""
        return 2 * 3 * self.topology.chip.link

    def _spans(self, group: tuple[int, ...]) -> tuple[int, dict[int, int]]:
        """Return the number of slices of a group, and its extent along each dimension of the torus that it spans."""
        if group not in self._known_spans:
            slices = {self.places[member][0] for member in group}
            first = [self.places[member][1] for member in group if self.places[member][0] == self.places[group[0]][0]]
            extents = {dim: len(set(values)) for dim, values in enumerate(zip(*first, strict=True))}
            self._known_spans[group] = len(slices), {dim: size for dim, size in extents.items() if size > 1}
        return self._known_spans[group]

    def _speed(self, dim: int, size: int) -> float:
        """Bytes/s along a dimension: a ring is sent round both ways, a line has one way."""
        rings = self.topology.is_ring(dim) and size == self.topology.shape[dim]
        return self.device.link * (2 if rings else 1)

    def _distance(self, dim: int, start: int, end: int) -> int:
        steps = abs(start - end)
        return min(steps, self.topology.shape[dim] - steps) if self.topology.is_ring(dim) else steps


def roofline(program: Program, network: Network) -> Roofline:
    """Seconds of one step of a program on a network."""
    device = network.device
    everything, beside, waiting = Counter(), Counter(), 0.0
    for message, count in program.collectives.items():
        busy = network.seconds(message)
        for part, seconds in busy.items():
            everything[part] += count * seconds
            beside[part] += count * seconds * message.is_async
        if not message.is_async:
            waiting += count * wait_seconds(message, network)
    return Roofline(
        compute=compute_seconds(program.flops, program.fp8_flops, device),
        memory=program.hbm_bytes / device.bandwidth,
        collective=max(everything.values(), default=0.0),
        kernels=sum(count * kernel_seconds(kernel, device) for kernel, count in program.kernels.items()),
        waiting=waiting,
        hidden=max(beside.values(), default=0.0),
        in_order=seconds_in_order(program, network),
    )


def compute_seconds(flops: float, fp8_flops: float, device: Chip) -> float:
    """FLOPs at the device's peaks."""
    return (flops - fp8_flops) / device.flops + fp8_flops / device.fp8_flops


def kernel_seconds(kernel: Kernel, device: Chip) -> float:
    """A kernel at its own roofline."""
    return max(compute_seconds(kernel.flops, kernel.fp8_flops, device), kernel.bytes / device.bandwidth)


def wait_seconds(message: Collective, network: Network) -> float:
    """Return how long a device waits for a message that nothing hides."""
    busy = network.seconds(message).values()
    return max(*busy, message.hbm_bytes / network.device.bandwidth) if busy else 0.0


def seconds_in_order(program: Program, network: Network) -> float:
    """Simulate the program's schedule: kernels take their time, each part of the network one message at a time, and
    what is waited for is waited for.
    """
    known: dict[tuple[str, bool], float] = {}

    def run(body: tuple[str, bool]) -> float:
        if body not in known:
            known[body] = _seconds_of(program.schedule.get(body, ()), run, network)
        return known[body]

    return run(program.entry)


def _seconds_of(events: Iterable[Event], run: Callable[[tuple[str, bool]], float], network: Network) -> float:
    now, free, arrives = 0.0, Counter(), {}
    for event in events:
        if event.kernel:
            now += kernel_seconds(event.kernel, network.device)
        elif event.body:
            now += event.times * run(event.body)
        elif event.name and not event.messages:
            now = max(now, arrives.get(event.name, 0.0))
        for message in event.messages:
            busy = network.seconds(message)
            begin = max([now, *(free[part] for part in busy)])
            for part, seconds in busy.items():
                free[part] = begin + seconds
            if event.name:
                arrives[event.name] = max(arrives.get(event.name, 0.0), begin + max(busy.values(), default=0.0))
            else:
                now = begin + wait_seconds(message, network)
    return max([now, *free.values()])  # one run's messages have gone before the next begins


class Traffic(NamedTuple):
    """Communication of one kind along the same mesh axes."""

    kind: str
    axes: str
    is_async: bool
    count: float
    bytes: float
    """Sent by each device in a step."""
    seconds: float
    """Seconds at the links' speed, one message after another."""


def traffic(program: Program, network: Network) -> list[Traffic]:
    """A step's messages by kind, mesh axes, and whether the program waits for them; the most bytes first."""
    found: dict[tuple[str, str, bool], list[float]] = {}
    for message, count in program.collectives.items():
        if len(message.group) < 2:
            continue
        row = found.setdefault((message.kind, network.axes(message.group), message.is_async), [0.0, 0.0, 0.0])
        longest = max(network.seconds(message).values(), default=0.0)
        for place, value in enumerate((1, message.sent, longest)):
            row[place] += count * value
    rows = [Traffic(*key, *values) for key, values in found.items()]
    return sorted(rows, key=lambda row: -row.bytes)
