"""Devices that compute or remember wrongly are found and named, and sound ones are not suspected."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import DENSE, V3, packed_batch, random_arrays, run_config

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import MTPConfig, ParallelConfig
from opendeep_jax.faults import injection as drill
from opendeep_jax.faults.health import new_health
from opendeep_jax.faults.replay import Replay, compare_copies
from opendeep_jax.models.parameters import model_definition
from opendeep_jax.parallel.collectives import axis_index
from opendeep_jax.parallel.mesh import make_mesh, put_batch
from opendeep_jax.train import setup
from opendeep_jax.train.setup import assemble
from opendeep_jax.train.state import TrainState, state_shardings

MODEL = dataclasses.replace(V3, num_layers=2, mtp=MTPConfig())


def prepared(model, **parallel) -> SimpleNamespace:
    """A configuration's mesh, and a state and a batch on it."""
    config = run_config(model, parallel=ParallelConfig(**{"fsdp": 1} | parallel))
    definition, mesh = model_definition(model), make_mesh(config.parallel)
    params, router_bias = random_arrays(definition)
    state = TrainState(jnp.int32(0), params, (), router_bias, new_health())
    state = jax.device_put(state, state_shardings(state, definition, mesh))
    return SimpleNamespace(
        config=config, definition=definition, mesh=mesh, state=state, batch=put_batch(packed_batch(16), mesh)
    )


@pytest.fixture(scope="module")
def sharded():
    """Two copies of weights that four devices share, experts divided in two."""
    return prepared(MODEL, data=2, fsdp=2, expert=2)


@pytest.fixture(scope="module")
def replicated():
    """Eight copies of everything."""
    return prepared(DENSE, data=8)


def replay_of(run: SimpleNamespace) -> Replay:
    return Replay(assemble(run.config, run.mesh).local_digests, run.mesh)


def named(sentence: str) -> set[int]:
    """The devices that a sentence names."""
    return set(map(int, re.findall(r"device (\d+)", sentence)))


@pytest.fixture(scope="module")
def sound(sharded):
    """A replay on sound devices, and what it said."""
    replay = replay_of(sharded)
    return replay, replay.compare(sharded.state, sharded.batch)


def test_sound_devices_compute_the_same_to_the_bit_twice_and_at_another_place(sound):
    replay, said = sound
    assert said is None
    assert [a == b for a, b in zip(replay.mesh.devices.flat, replay.other.devices.flat, strict=True)] == [False] * 8


def test_what_is_compared_is_every_devices_own_gradients(sound, sharded):
    lanes = sound[0]._run(sharded.mesh, sharded.state, sharded.batch)
    assert len(lanes) == 8 and lanes.shape[1] > len(sharded.state.params)
    assert len({lane.tobytes() for lane in lanes}) == 8  # each device has its own rows


def spoiled(replay: Replay, device: int, *runs: int):
    """A `Replay._run` in whose results a device is wrong, in the runs with these numbers."""
    run, count = replay._run, iter(range(9))

    def wrong(mesh, state, batch):
        lanes = np.array(run(mesh, state, batch))
        if next(count) in runs:
            place = [d.id for d in mesh.devices.flat].index(device)
            lanes[place, 3] ^= 1
        return lanes

    return wrong


@pytest.mark.parametrize("device", [0, 5])
@pytest.mark.parametrize("runs", [(0,), (1,)])
def test_a_device_that_is_wrong_now_and_then_is_named(device, runs, sound, sharded, monkeypatch):
    monkeypatch.setattr(sound[0], "_run", spoiled(sound[0], device, *runs))
    said = sound[0].compare(sharded.state, sharded.batch)
    assert "the same computation, done twice, came out differently on" in said and named(said) == {device}


@pytest.mark.parametrize("device", [0, 3, 7])
def test_a_device_that_is_always_wrong_is_named(device, sound, sharded, monkeypatch):
    monkeypatch.setattr(sound[0], "_run", spoiled(sound[0], device, 0, 1, 2))
    said = sound[0].compare(sharded.state, sharded.batch)
    assert "came out differently on other devices" in said and named(said) == {device}
    assert "of process 0 on " in said and "\n" not in said


def test_a_device_whose_arithmetic_is_wrong_is_named(replicated, monkeypatch):
    """The program itself is wrong on one device, wherever the mesh puts that."""
    replay, local_gradients, wrong = replay_of(replicated), setup.local_gradients, 6
    places = iter([d.id for d in mesh.devices.flat].index(wrong) for mesh in (replay.mesh, replay.other))

    def broken(*arguments):
        grads, sums = local_gradients(*arguments)
        there = axis_index(replay.mesh.axis_names) == next(places)  # once for each mesh: when it is traced
        name = sorted(grads)[0]
        grads[name] = grads[name].at[(0,) * grads[name].ndim].multiply(jnp.where(there, 1 + 2.0**-20, 1))
        return grads, sums

    monkeypatch.setattr(setup, "local_gradients", broken)
    said = replay.compare(replicated.state, replicated.batch)
    assert next(places, None) is None and named(said) == {wrong}


def test_one_device_alone_cannot_be_compared_with_others_and_is_with_itself():
    mesh = make_mesh(ParallelConfig(fsdp=1), jax.devices()[:1])
    assert Replay(assemble(run_config(MODEL), mesh).local_digests, mesh).other is None


def with_flipped_bits(state: TrainState, name: str, *devices: int, bit: int = 0) -> TrainState:
    """The state with one bit flipped in these devices' copies of a weight."""
    weight, parts = state.params[name], []
    for shard in weight.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id in devices:
            data.view(np.uint32).reshape(-1)[-1] ^= np.uint32(1 << bit)
        parts.append(jax.device_put(data, shard.device))
    broken = jax.make_array_from_single_device_arrays(weight.shape, weight.sharding, parts)
    return state._replace(params=state.params | {name: broken})


@pytest.mark.parametrize("bit", [0, 20, 31])
def test_one_flipped_bit_in_one_of_eight_copies_names_the_array_and_the_device(replicated, bit):
    name = sorted(replicated.state.params)[-1]
    assert compare_copies(replicated.state, "step 8 was saved") is None
    said = compare_copies(with_flipped_bits(replicated.state, name, 6, bit=bit), "step 8 was saved")
    assert said.startswith("silent corruption found before step 8 was saved: copies of ") and name in said
    assert named(said) == {6} and "\n" not in said


def test_of_two_copies_that_differ_both_devices_are_named(sharded):
    name, weight = next((n, x) for n, x in sharded.state.params.items() if not x.sharding.is_fully_replicated)
    shards = weight.addressable_shards
    holders = [shard.device.id for shard in shards if shard.index == shards[0].index]
    assert 1 < len(holders) < 8
    said = compare_copies(with_flipped_bits(sharded.state, name, holders[0]), "step 8 was saved")
    assert named(said) == (set(holders) if len(holders) == 2 else {holders[0]})


def test_many_wrong_arrays_are_one_sentence(replicated):
    state = replicated.state
    for name in list(state.params)[:4]:
        state = with_flipped_bits(state, name, 2)
    said = compare_copies(state, "step 8 was saved")
    assert "and 3 more arrays differ" in said and named(said) == {2}


def test_a_drill_for_a_flipped_bit_is_refused_where_nobody_could_see_it(replicated, tmp_path):
    state = jax.device_put(replicated.state, jax.devices()[0])
    with pytest.raises(ConfigError, match="flipped_bit@3: no device has a copy.*--parallel.data=2"):
        drill.corrupt_state(("flipped_bit@3",), tmp_path, 3, state)
    assert drill.corrupt_state(("flipped_bit@3",), tmp_path, 4, state) is state
