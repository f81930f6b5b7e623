"""Experts on several devices against all of them on one."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ExecutionConfig
from opendeep_jax.ops import exchange
from opendeep_jax.ops.dispatch import routed_experts
from opendeep_jax.ops.exchange_overflow import chunk_size

ALL_TOKENS, CHOSEN, EXPERTS, WIDTH, HIDDEN = 104, 3, 8, 5, 4
CASES = "balanced", "crowded", "padding"


def inputs(case):
    """Choices, what is valid, and x, weights, gate, up, down; of 104 tokens, which 16 chunks don't divide."""
    random = np.random.default_rng(0)
    indices = np.stack([random.permutation(EXPERTS)[:CHOSEN] for _ in range(ALL_TOKENS)])
    valid = np.ones(ALL_TOKENS, bool)
    if case == "crowded":
        indices[:] = [1, 0, 2]  # one device has nearly everything, five experts nothing
        indices[::7] = [5, 1, 0]
    if case == "padding":
        valid = random.uniform(size=ALL_TOKENS) < 0.6
    shapes = (ALL_TOKENS, WIDTH), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    x, gate, up, down = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)
    return jnp.int32(indices), jnp.asarray(valid), (x, jnp.float32(random.uniform(size=indices.shape)), gate, up, down)


def mesh_of(devices):
    return jax.make_mesh((devices,), ("expert",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,))


def over_devices(devices, experts=EXPERTS, devices_per_token=None, **execution):
    """`exchanged_experts` of all tokens, divided over so many devices."""
    execution = ExecutionConfig(grouped_matmul="reference", **execution)

    def each(indices, valid, x, weights, *kernels):
        return exchange.exchanged_experts(
            x, indices, weights, valid, *kernels, execution, experts, devices_per_token=devices_per_token
        )

    spec = PartitionSpec("expert")
    return jax.shard_map(each, mesh=mesh_of(devices), in_specs=(spec,) * 7, out_specs=spec, check_vma=False)


def on_one_device(indices, valid, x, weights, *kernels):
    out = routed_experts(x, indices, weights, *kernels, ExecutionConfig(grouped_matmul="reference"))
    return jnp.where(valid[:, None], out, 0)


def with_gradients(function):
    """Compiled: the output, and the gradients of a sum of it that weighs every part differently."""

    def loss(arrays, indices, valid):
        out = function(indices, valid, *arrays)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.grad(loss, has_aux=True))


@functools.cache
def expected(case):
    indices, valid, arrays = inputs(case)
    return jax.tree.map(np.asarray, with_gradients(on_one_device)(arrays, indices, valid))


def assert_like_one_device(devices, **execution):
    wanted = {case: expected(case) for case in CASES}
    with jax.set_mesh(mesh_of(devices)):
        run = with_gradients(over_devices(devices, **execution))
        for case in CASES:
            indices, valid, arrays = inputs(case)
            grads, out = jax.tree.map(np.asarray, run(arrays, indices, valid))
            want_grads, want = wanted[case]
            assert np.abs(out - want).max() <= 1e-6 * np.abs(want).max()
            for grad, want_grad in zip(grads, want_grads, strict=True):
                assert np.abs(grad - want_grad).max() <= 1e-5 * np.abs(want_grad).max()


@pytest.mark.parametrize(
    ("devices", "form", "buffer"),
    [(2, "gather", 1.25), (4, "gather", 0.4), (4, "all_to_all", 0.01), (8, "all_to_all", 1.25), (2, "all_to_all", 9.0)],
)
def test_outputs_and_gradients_are_those_of_one_device_however_unbalanced(devices, form, buffer):
    assert_like_one_device(devices, expert_exchange=form, exchange_buffer=buffer)


def ragged_by_gathering(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `lax.ragged_all_to_all` does, from what everybody has; NaN where nothing is written, as memory may hold."""
    me, row = lax.axis_index(axis_name), jnp.arange(operand.shape[0])
    out = jnp.full_like(output, jnp.nan)
    rows, begins, sizes, places = (
        lax.all_gather(array, axis_name) for array in (operand, input_offsets, send_sizes, output_offsets)
    )
    for sender in range(rows.shape[0]):
        offset = row - begins[sender, me]
        mine = (offset >= 0) & (offset < sizes[sender, me])
        out = out.at[jnp.where(mine, places[sender, me] + offset, out.shape[0])].set(rows[sender], mode="drop")
    return out


@pytest.mark.parametrize("buffer", [0.6, 9.0])
def test_ragged_collectives_are_told_the_right_rows_and_what_they_leave_is_never_used(monkeypatch, buffer):
    monkeypatch.setattr(lax, "ragged_all_to_all", ragged_by_gathering)
    monkeypatch.setattr(exchange, "platform", lambda: "tpu")
    monkeypatch.setattr(exchange, "row_shape", lambda width: (width, 1))
    assert_like_one_device(4, expert_exchange="ragged", exchange_buffer=buffer)


def test_one_device_needs_no_exchange():
    indices, valid, (x, weights, *kernels) = inputs("balanced")
    execution = ExecutionConfig(grouped_matmul="reference")
    out = jax.jit(exchange.exchanged_experts, static_argnums=(7, 8))(
        x, indices, weights, valid, *kernels, execution, EXPERTS
    )
    np.testing.assert_allclose(out, expected("balanced")[1], rtol=1e-6)


def test_bfloat16_stays_bfloat16():
    indices, valid, (x, weights, *kernels) = inputs("balanced")
    low = [array.astype(jnp.bfloat16) for array in (x, *kernels)]
    with jax.set_mesh(mesh_of(4)):
        run = jax.jit(over_devices(4, expert_exchange="all_to_all", exchange_buffer=0.5))
        out = run(indices, valid, low[0], weights, *low[1:])
    assert out.dtype == jnp.bfloat16
    want = expected("balanced")[1]
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.03 * np.abs(want).max())


@functools.cache
def marking(form, devices=4, tokens=40, experts=8):
    """A compiled exchange whose expert j adds a token's own number times its weight to column j."""
    kernels = (
        jnp.zeros((experts, experts, 1)).at[:, 0].set(50.0),
        jnp.zeros((experts, experts, 1)).at[:, 1].set(0.02),
        jnp.eye(experts)[:, None],
    )
    x = jnp.zeros((tokens, experts)).at[:, 0].set(1.0).at[:, 1].set(jnp.arange(1.0, tokens + 1))
    run = jax.jit(over_devices(devices, experts, expert_exchange=form, exchange_buffer=0.7))

    def counts(indices, weights, valid):
        with jax.set_mesh(mesh_of(devices)):
            return np.asarray(run(indices, valid, x, weights, *kernels))

    return counts


@pytest.mark.parametrize("form", ["all_to_all", "gather"])
@hypothesis.settings(max_examples=25)
@hypothesis.given(data=st.data())
def test_no_token_is_lost_or_doubled(form, data):
    """Half of the examples overflow the buffers: experts are drawn from all eight or from the first few."""
    seed, first = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(3, 8))
    random = np.random.default_rng(seed)
    indices = np.stack([random.permutation(first)[:3] for _ in range(40)]).astype(np.int32)
    valid = random.uniform(size=40) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    weights = random.integers(1, 5, indices.shape).astype(np.float32)
    want = np.zeros((40, 8))
    np.put_along_axis(want, indices, weights * np.arange(1, 41)[:, None], axis=1)
    np.testing.assert_allclose(marking(form)(indices, weights, valid), want * valid[:, None], rtol=1e-5)


def test_tokens_that_fit_are_as_many_whole_chunks_as_every_device_has_room_for():
    devices, tokens = 4, 26
    indices, valid, _ = inputs("crowded")
    choices = np.asarray(indices).T
    sizes = exchange.buffer_sizes(tokens, CHOSEN, EXPERTS, devices, CHOSEN, 1.25, "all_to_all")
    fitting = int(exchange.fitting_tokens(jnp.asarray(choices), EXPERTS, devices, sizes))

    def fits(count):
        taken = choices.reshape(CHOSEN, devices, tokens)[:, :, :count].reshape(CHOSEN, -1)
        for device in range(devices):
            here = taken // (EXPERTS // devices) == device
            if here.sum() > sizes.expert_rows or here.any(axis=0).sum() > sizes.received:
                return False
        return True

    assert 0 < fitting < tokens
    assert fitting % chunk_size(tokens) == 0
    assert fits(fitting) and not fits(fitting + chunk_size(tokens))


def test_node_limited_routing_bounds_the_devices_of_a_token():
    assert exchange.most_devices(256, 8, 8, 4, devices=8) == 4  # V3: a device for each group
    assert exchange.most_devices(256, 8, 8, 4, devices=64) == 8  # eight devices to a group: as many as experts
    assert exchange.most_devices(256, 8, 8, 4, devices=4) == 4
    assert exchange.most_devices(64, 6, 1, 1, devices=8) == 6
    assert exchange.most_devices(24, 6, 4, 1, devices=6) == 2  # groups of six that devices of four cut


@hypothesis.given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_no_choice_from_kept_groups_reaches_more_devices(groups, devices, factor):
    experts = np.lcm(groups, devices) * factor
    device = np.arange(experts) // (experts // devices)
    most = max(len(set(group)) for group in device.reshape(groups, -1))
    assert exchange.most_devices(int(experts), int(experts), groups, 1, devices) >= most


@pytest.mark.parametrize(("devices", "most", "form"), [(2, 2, "gather"), (4, 4, "gather"), (8, 4, "all_to_all")])
def test_few_devices_gather_and_more_exchange(monkeypatch, devices, most, form):
    monkeypatch.setattr(exchange, "axis_size", lambda axis: devices)
    assert exchange.exchange_form("auto", most) == form
    monkeypatch.setattr(exchange, "platform", lambda: "tpu")
    assert exchange.exchange_form("auto", most) == form.replace("all_to_all", "ragged")


def test_ragged_collectives_are_refused_where_there_are_none():
    with pytest.raises(ConfigError, match="'ragged'.*cpu.*'all_to_all'"):
        exchange.exchange_form("ragged", 4)
