"""Schedules do every piece of work once, in an order that can be, with the bubble and the memory that they promise."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.parallel.schedule import IDLE, Schedule, assign_slots, make_schedule, stage_layout, ticks_of

SIZES = {"stages": st.integers(1, 6), "microbatches": st.integers(1, 20), "chunks": st.integers(1, 4)}


class Simulation(NamedTuple):
    """What a schedule costs, in the units of the given costs."""

    time: float
    bubble: float
    """Part of the stages' time in which they do nothing, 0 to 1."""
    kept_inputs: np.ndarray
    """int [S]: most chunk inputs that each stage keeps at one time."""


def simulate(schedule: Schedule, forward=1.0, backward=3.0) -> Simulation:
    """Plays a schedule: a stage starts a tick when it and its two neighbors on the ring have ended the one before.

    Args:
        schedule: what `make_schedule` made.
        forward: cost of a part's forward, one number or one for each part [S*v].
        backward: the same of the backward, its recomputation included.
    """
    costs = [np.broadcast_to(cost, schedule.stages * schedule.chunks) for cost in (forward, backward)]
    stage = np.arange(schedule.stages)
    spent = np.zeros(schedule.forward.shape[:2])
    for table, cost in zip((schedule.forward, schedule.backward), costs, strict=True):
        chunk = table[:, :, 0]
        spent += np.where(chunk != IDLE, cost[chunk * schedule.stages + stage], 0.0)
    time = np.zeros(schedule.stages)
    for tick in spent:
        time = np.maximum(time, np.maximum(np.roll(time, 1), np.roll(time, -1))) + tick
    first, last = ticks_of(schedule)
    arrival = np.concatenate([first[:1], first[:-1] + 1])
    tick = np.arange(len(spent))[:, None, None]
    kept = ((arrival <= tick) & (tick <= last)).sum(axis=2)  # [T, S*v]
    kept = kept.reshape(len(spent), schedule.chunks, schedule.stages).sum(axis=1).max(axis=0)
    return Simulation(float(time.max()), float(1 - spent.sum() / (schedule.stages * time.max())), kept)


@given(**SIZES)
def test_each_part_of_each_microbatch_runs_forward_once_and_backward_once(stages, microbatches, chunks):
    schedule = make_schedule(stages, microbatches, chunks)
    everything = {(chunk, microbatch) for chunk in range(chunks) for microbatch in range(microbatches)}
    for table in (schedule.forward, schedule.backward):
        for stage in range(stages):
            done = [tuple(work) for work in table[:, stage].tolist() if work[0] != IDLE]
            assert len(done) == len(everything) and set(done) == everything


@given(**SIZES)
def test_nothing_runs_before_what_it_needs_has_traveled_for_a_tick(stages, microbatches, chunks):
    forward, backward = ticks_of(make_schedule(stages, microbatches, chunks))
    assert np.all(forward[1:] > forward[:-1])
    assert np.all(backward[:-1] > backward[1:])
    assert np.all(backward >= forward)


@given(**SIZES)
def test_the_bubble_and_the_kept_inputs_are_those_of_interleaved_1f1b(stages, microbatches, chunks):
    schedule = make_schedule(stages, microbatches, chunks)
    simulation = simulate(schedule)
    pieces = microbatches * chunks
    if microbatches >= stages:
        assert simulation.bubble == pytest.approx((stages - 1) / (pieces + stages - 1))
        group = -(-microbatches // (microbatches // stages))
        assert simulation.kept_inputs.max() <= min(pieces, group * chunks + stages - 1)
    if microbatches % stages == 0:
        most = stages * (chunks + 1) - 1 - 2 * np.arange(stages)
        np.testing.assert_array_equal(simulation.kept_inputs, np.minimum(pieces, most))
    assert simulation.kept_inputs.max() <= pieces
    assert assign_slots(schedule).num_inputs == simulation.kept_inputs.max()


@settings(max_examples=50)
@given(**SIZES)
def test_what_waits_in_a_slot_is_there_when_it_is_used(stages, microbatches, chunks):
    """Plays the tables with names instead of numbers, as the executor does."""
    schedule = make_schedule(stages, microbatches, chunks)
    slots, last = assign_slots(schedule), stages * chunks - 1
    inputs, gradients = ([{} for _ in range(stages)] for _ in range(2))
    for tick in range(len(schedule.forward)):
        sent, returned = {}, {}
        for stage in range(stages):
            chunk, microbatch = schedule.forward[tick, stage]
            part = chunk * stages + stage
            if chunk != IDLE:
                if part == 0:
                    inputs[stage][slots.forward_input[tick, stage]] = (part, microbatch)
                assert inputs[stage][slots.forward_input[tick, stage]] == (part, microbatch)
                sent[(stage + 1) % stages] = (part + 1, microbatch)
                if part == last:
                    gradients[stage][slots.output_gradient[tick, stage]] = (part, microbatch)
            chunk, microbatch = schedule.backward[tick, stage]
            part = chunk * stages + stage
            if chunk != IDLE:
                assert inputs[stage].pop(slots.backward_input[tick, stage]) == (part, microbatch)
                assert gradients[stage].pop(slots.backward_gradient[tick, stage]) == (part, microbatch)
                returned[(stage - 1) % stages] = (part - 1, microbatch)
        for stage in range(stages):
            for buffer, arrivals, table in (
                (inputs, sent, slots.arriving_input),
                (gradients, returned, slots.arriving_gradient),
            ):
                slot = table[tick, stage]
                if slot != IDLE:
                    assert slot not in buffer[stage], "something still waits there"
                    buffer[stage][slot] = arrivals.pop(stage)
        # What nobody takes comes from the model's ends.
        assert all(part == last + 1 for part, _ in sent.values()) and all(part == -1 for part, _ in returned.values())
    assert not any(inputs) and not any(gradients)


def test_a_small_schedule_is_the_textbooks():
    schedule = make_schedule(2, 2)
    assert schedule.forward[:, :, 1].tolist() == [[0, -1], [1, 0], [-1, 1], [-1, -1]]
    assert schedule.backward[:, :, 1].tolist() == [[-1, -1], [-1, 0], [0, 1], [1, -1]]


def test_uneven_parts_cost_what_the_slowest_of_them_costs():
    schedule = make_schedule(4, 32)
    even = simulate(schedule)
    assert even.time == pytest.approx((32 + 3) * 4)
    slow = simulate(schedule, forward=[1, 1, 1, 2], backward=[3, 3, 3, 6])
    assert 32 * 8 < slow.time < 35 * 8
    assert slow.bubble > even.bubble


@given(
    stages=st.integers(1, 5),
    chunks=st.integers(1, 3),
    more=st.integers(0, 20),
    first=st.floats(0, 5),
    last=st.floats(0, 5),
)
def test_every_layer_has_one_place_and_parts_follow_the_models_order(stages, chunks, more, first, last):
    num_layers = stages * chunks + more
    layout = stage_layout(num_layers, stages, chunks, first, last)
    source = layout.source.reshape(stages, chunks, layout.places)
    in_order = [source[part % stages, part // stages, : layout.counts[part]] for part in range(stages * chunks)]
    np.testing.assert_array_equal(np.concatenate(in_order), np.arange(num_layers))
    assert np.sum(layout.source == IDLE) == stages * chunks * layout.places - num_layers < stages * chunks


def test_layers_make_room_for_what_the_ends_have_to_do_besides():
    # V3's 58 MoE layers on 16 stages: 3 dense layers as wide as a MoE layer's active experts, MTP and two heads.
    assert stage_layout(58, 16, first=3, last=4.2).counts.tolist() == [2, *[4] * 14, 0]
    assert stage_layout(8, 4).counts.tolist() == [2] * 4


@pytest.mark.parametrize("sizes", [{"stages": 0}, {"microbatches": 0}, {"chunks": -1}])
def test_a_size_below_1_is_refused(sizes):
    with pytest.raises(ConfigError, match=f"{next(iter(sizes))} = .*must be at least 1"):
        make_schedule(**({"stages": 2, "microbatches": 4} | sizes))


def test_layers_that_cannot_fill_the_stages_are_refused():
    with pytest.raises(ConfigError, match="7 stacked layers cannot fill it.*Use fewer stages or chunks"):
        stage_layout(7, 4, 2)
