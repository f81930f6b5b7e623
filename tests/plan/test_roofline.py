"""Times from totals: each message at its own links, each kernel at its own roofline."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opendeep_jax.plan.program import Collective, Event, Kernel, Program
from opendeep_jax.plan.roofline import DCN, SWITCH, Network, roofline, seconds_in_order, traffic
from opendeep_jax.plan.topology import parse_topology

LINK = 90e9


def network(name: str, **axes: int) -> Network:
    """A mesh laid over a topology in the order of its coordinates."""
    topology = parse_topology(name)
    if topology.chip.platform == "gpu":
        places = [(device // topology.slice_devices, ()) for device in range(topology.device_count)]
    else:
        within = list(itertools.product(*map(range, topology.shape)))
        places = [(index, place) for index in range(topology.slices) for place in within]
    return Network(topology, axes, places)


def message(kind: str, group, payload: float = 8e9, is_async: bool = False) -> Collective:
    return Collective(kind, tuple(group), payload, 0.0, is_async)


CUBE = network("v5p:8x8x8", fsdp=64, expert=8)
RING, PLANE = range(8), range(0, 512, 8)  # along z, and over x and y
LINES = network("v5p:2x2x2", fsdp=8)


@pytest.mark.parametrize(
    "net, kind, group, seconds",
    [
        (CUBE, "all-gather", RING, 7e9 / (2 * LINK)),
        (CUBE, "reduce-scatter", PLANE, 8e9 * 63 / 64 / (4 * LINK)),
        (CUBE, "all-reduce", range(512), 2 * 8e9 * 511 / 512 / (6 * LINK)),
        (CUBE, "ragged-all-to-all", RING, 7e9 * (16 / 7) / (2 * LINK)),  # 16/7 hops on average
        (CUBE, "collective-permute", (0, 1), 8e9 / LINK),
        (CUBE, "collective-permute", (0, 7), 8e9 / LINK),  # neighbors round the ring
        (CUBE, "collective-permute", (0, 3), 3 * 8e9 / LINK),
        (LINES, "all-gather", range(8), 7e9 / (3 * LINK)),  # one link in each dimension
        (LINES, "all-to-all", range(2), 4e9 / LINK),
        (CUBE, "all-gather", (5,), 0.0),
    ],
)
def test_a_message_takes_the_links_that_it_spans(net, kind, group, seconds):
    assert max(net.seconds(message(kind, group)).values(), default=0.0) == pytest.approx(seconds)


def test_a_group_is_named_by_its_mesh_axes():
    assert [CUBE.axes(tuple(group)) for group in (RING, PLANE, range(512), [3])] == [
        "expert",
        "fsdp",
        "fsdp+expert",
        "none",
    ]


def test_what_crosses_nodes_takes_both_networks():
    net = network("h100:2x8", data=2, fsdp=8)
    inside = net.seconds(message("all-gather", range(8)))
    assert inside == {SWITCH: pytest.approx(7e9 / 450e9)}
    across = net.seconds(message("all-reduce", range(16)))
    assert across[DCN] == pytest.approx(2 * 1e9 / 2 / 50e9)  # each GPU sends its eighth, halved and twice
    assert across[SWITCH] == pytest.approx(2 * 7e9 / 450e9)
    assert net.seconds(message("all-to-all", range(16)))[DCN] == pytest.approx(4e9 / 50e9)
    assert net.seconds(message("collective-permute", (0, 8))) == {DCN: pytest.approx(8e9 / 50e9)}


def test_the_trays_of_a_rack_are_joined_by_its_switch():
    net = network("gb200:36x4", data=2, fsdp=72)
    assert set(net.seconds(message("all-gather", range(72)))) == {SWITCH}
    assert set(net.seconds(message("all-gather", (0, 72)))) == {DCN}


def test_slices_are_joined_by_the_slow_network():
    net = network("2*v5e:4x4", data=2, fsdp=16)
    assert set(net.seconds(message("all-reduce", (0, 16)))) == {DCN}
    assert DCN not in net.seconds(message("all-reduce", range(16)))


def test_devices_are_numbered_slice_by_slice_whatever_axis_lies_across():
    topology = parse_topology("2*v5e:2x2")  # the inner axis across slices
    places = [(flat % 2, divmod(flat // 2, 2)) for flat in range(8)]
    net = Network(topology, {"fsdp": 4, "expert": 2}, places)
    assert net.axes((0, 1, 2, 3)) == "fsdp" and net.axes((0, 4)) == "expert"
    assert set(net.seconds(message("all-to-all", (0, 4)))) == {DCN}


@given(st.permutations([2, 2, 4, 1]), st.data())
def test_axes_are_those_along_which_a_group_varies(sizes, data):
    names = ("data", "fsdp", "expert", "tensor")
    axes = dict(zip(names, sizes, strict=True))
    net = network("v5e:4x4", **axes)
    varied = data.draw(st.sets(st.sampled_from([name for name in names if axes[name] > 1]), min_size=1))
    choices = [range(axes[name]) if name in varied else [axes[name] - 1] for name in names]
    group = tuple(
        sum(index * math.prod(sizes[place + 1 :]) for place, index in enumerate(member))
        for member in itertools.product(*choices)
    )
    assert net.axes(group) == "+".join(name for name in names if name in varied)


def program(kernels, messages) -> Program:
    """A program of kernels (flops, bytes) and messages."""
    runs = Counter(Kernel(flops, 0.0, size) for flops, size in kernels)
    return Program(
        flops=sum(flops for flops, _ in kernels),
        hbm_bytes=sum(size for _, size in kernels),
        kernels=runs,
        collectives=Counter(messages),
    )


def test_only_what_the_program_waits_for_stops_the_kernels():
    second, gather = 459e12, 2 * LINK * 8 / 7  # one second of matmuls; of a gather in a ring
    waits = roofline(program([(second, 0.0)], [message("all-gather", RING, gather)]), CUBE)
    hides = roofline(program([(second, 0.0)], [message("all-gather", RING, gather, True)]), CUBE)
    assert waits.scheduled == pytest.approx(2) and hides.scheduled == pytest.approx(1)
    assert waits.fastest == hides.fastest == pytest.approx(1)


def in_order(*events: Event) -> float:
    """Seconds of a loop of two rounds of these events, halved."""
    body = ("body", False)
    schedule = {body: list(events), ("main", False): [Event(body=body, times=2)]}
    return seconds_in_order(Program(schedule=schedule, entry=("main", False)), CUBE) / 2


def test_a_hidden_message_is_waited_for_where_it_comes_too_late():
    second, gather = Kernel(459e12, 0.0, 0.0), message("all-gather", RING, 2 * LINK * 8 / 7, True)
    start, done, kernel = Event(messages=(gather,), name="g"), Event(name="g"), Event(kernel=second)
    assert in_order(start, kernel, done) == pytest.approx(1)  # a second of both, at one time
    assert in_order(start, done, kernel) == pytest.approx(2)
    assert in_order(start, kernel, done, kernel) == pytest.approx(2)
    assert in_order(start, start._replace(name="h"), kernel, done, Event(name="h")) == pytest.approx(2)  # one ring
    assert in_order(Event(messages=(gather,)), kernel) == pytest.approx(2)


def test_messages_over_different_links_run_at_one_time():
    gathers = [message("all-gather", RING, 1e12, True), message("all-gather", PLANE, 1e12, True)]
    both = roofline(program([], gathers), CUBE).collective
    assert both == pytest.approx(max(roofline(program([], [one]), CUBE).collective for one in gathers))


def test_fp8_has_its_own_peak():
    net = network("h100:1x8", fsdp=8)
    half = roofline(Program(flops=989.4e12, fp8_flops=989.4e12), net)
    assert half.compute == pytest.approx(0.5) and half.bound == "compute"


sizes = st.floats(0, 1e16)


@given(
    st.lists(st.tuples(sizes, st.floats(0, 1e13)), max_size=4),
    st.lists(st.tuples(st.sampled_from([RING, PLANE]), st.floats(1, 1e12), st.booleans()), max_size=4),
)
def test_the_schedule_lies_between_the_bounds(kernels, messages):
    sent = [message("all-gather", group, size, hidden) for group, size, hidden in messages]
    times = roofline(program(kernels, sent), CUBE)
    assert times.fastest <= times.scheduled <= times.slowest
    assert max(times.compute, times.memory) <= times.kernels * (1 + 1e-9)


def test_traffic_is_told_by_kind_axes_and_whether_it_is_hidden():
    sent = [message("all-gather", RING, 8e9, True)] * 3 + [message("all-gather", RING), message("all-reduce", PLANE)]
    rows = traffic(program([], sent), CUBE)
    assert [(row.kind, row.axes, row.is_async, row.count) for row in rows] == [
        ("all-gather", "expert", True, 3),
        ("all-reduce", "fsdp", False, 1),
        ("all-gather", "expert", False, 1),
    ]
    assert rows[0].bytes == pytest.approx(3 * 7e9)
