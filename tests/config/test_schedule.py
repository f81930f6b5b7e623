import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import DENSE, run_config

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schedule import (
    ENDLESS,
    borders,
    length_at,
    micro_batches,
    padded_rows,
    rows_before,
    stage_at,
    stages,
    step_at_tokens,
    step_of_row,
    tokens_before,
    total_steps,
)
from opendeep_jax.config.schema import DataConfig, DataPhase, MTPConfig, Phase, RampStage, TrainConfig

ramps = st.lists(st.builds(RampStage, st.integers(1, 50), st.integers(1, 10_000)), max_size=4)
middle_phases = st.lists(
    st.builds(
        DataPhase,
        tokens=st.integers(1, 5000),
        sequence_length=st.sampled_from([0, 3, 17, 40]),
        batch_size=st.integers(0, 9),
    ),
    max_size=3,
)


def config_of(ramp=(), phases=(), length=7, batch_size=5, **train):
    named = [DataPhase(f"{i}", p.tokens, p.weights, p.sequence_length, p.packing, p.batch_size) for i, p in phases]
    return run_config(
        DENSE,
        data=DataConfig(tokenizer="none.json", sequence_length=length, phases=tuple(named)),
        train=TrainConfig(batch_size=batch_size, batch_ramp=tuple(ramp), **{"steps": 1000} | train),
    )


@st.composite
def configs(draw):
    ramp, phases = draw(ramps), draw(middle_phases)
    if phases:  # the ramp lies inside the first
        first = DataPhase(tokens=sum(stage.tokens for stage in ramp) + draw(st.integers(1, 3000)))
        phases = [first, *phases, DataPhase(batch_size=3)]
    return config_of(ramp, list(enumerate(phases)), draw(st.integers(3, 40)), draw(st.integers(1, 60)))


@settings(max_examples=100, deadline=None)
@given(config=configs(), step=st.integers(0, 400))
def test_tokens_rows_and_steps_follow_from_each_steps_shape(config, step):
    shapes = [(stage_at(config, i).phase, stage_at(config, i).batch_size, length_at(config, i)) for i in range(step)]
    assert tokens_before(config, step) == sum(rows * length for _, rows, length in shapes)
    assert step_at_tokens(config, tokens_before(config, step)) == pytest.approx(step)
    for phase in range(max(len(config.data.phases), 1)):
        assert rows_before(config, step, phase) == sum(rows for p, rows, _ in shapes if p == phase)


@settings(max_examples=100, deadline=None)
@given(config=configs(), step=st.integers(0, 400))
def test_the_step_of_a_row_is_the_one_that_takes_it(config, step):
    stage = stage_at(config, step)
    first = rows_before(config, step, stage.phase)
    assert step_of_row(config, stage.phase, first) == (step, 0)
    assert step_of_row(config, stage.phase, first + stage.batch_size - 1) == (step, stage.batch_size - 1)


def test_a_row_behind_a_phases_end_has_no_step():
    config = config_of(phases=[(0, DataPhase(tokens=70)), (1, DataPhase())])
    assert step_of_row(config, 0, 9) == (1, 4)
    assert step_of_row(config, 0, 10) is None


@settings(max_examples=50, deadline=None)
@given(ramp=ramps, length=st.integers(3, 40), final=st.integers(1, 60))
def test_after_the_ramp_the_batch_is_the_recipes(ramp, length, final):
    config = config_of(ramp, length=length, batch_size=final)
    tokens = sum(math.ceil(stage.tokens / (stage.batch_size * length)) * stage.batch_size * length for stage in ramp)
    assert stage_at(config, math.ceil(step_at_tokens(config, tokens))).batch_size == final


def test_phases_have_their_own_length_and_batch_and_the_ramp_lies_in_the_first():
    phases = [DataPhase(tokens=700), DataPhase(tokens=400, sequence_length=40, batch_size=2), DataPhase()]
    config = config_of([RampStage(2, 100)], list(enumerate(phases)))
    assert [stage[:3] for stage in stages(config)] == [(0, 0, 8), (0, 8, 17), (1, 25, 5), (2, 30, ENDLESS)]
    assert [stage[3:] for stage in stages(config)] == [(2, 7), (5, 7), (2, 40), (5, 7)]


def test_a_run_of_tokens_ends_in_the_phase_that_holds_its_last():
    config = config_of(phases=[(0, DataPhase(tokens=700)), (1, DataPhase())], steps=0, total_tokens=701)
    assert total_steps(config) == 21


@pytest.mark.parametrize(
    "phases, words",
    [
        ([DataPhase(tokens=100)], "the last phase never ends"),
        ([DataPhase(), DataPhase()], "only the last phase has no length"),
        ([DataPhase(tokens=1, weights=(1.0, 2.0)), DataPhase()], "one weight for each of the 1 sources"),
        ([DataPhase(tokens=1, weights=(0.0,)), DataPhase()], "one of them above 0"),
        ([DataPhase(tokens=1, sequence_length=1), DataPhase()], r"data.phases.0.sequence_length = 1: must exceed"),
        ([DataPhase(tokens=10), DataPhase()], "must exceed the 100 tokens of train.batch_ramp"),
    ],
)
def test_phases_that_cannot_work_are_refused(phases, words):
    with pytest.raises(ConfigError, match=words):
        config_of([RampStage(2, 100)], list(enumerate(phases)))


def test_phases_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="shared by two phases"):
        run_config(DENSE, data=DataConfig(tokenizer="none.json", phases=(DataPhase(tokens=1), DataPhase())))


@given(rows=st.integers(1, 64), micros=st.integers(1, 4), shards=st.integers(1, 9), per_device=st.integers(0, 5))
def test_padding_is_the_least_that_lets_all_micro_batches_divide_over_the_devices(rows, micros, shards, per_device):
    train = TrainConfig(batch_size=rows * micros, accumulation_steps=micros, rows_per_device=per_device)
    padded = padded_rows(train, rows * micros, shards)
    parts = micro_batches(train, padded, shards)
    assert parts == micro_batches(train, rows * micros, shards)  # the step sees only the padded batch
    assert padded >= rows * micros and padded % (parts * shards) == 0
    assert padded - rows * micros < parts * shards * (per_device or 1)
    if per_device:
        assert padded // shards // parts == per_device
    else:
        assert parts == micros


def test_a_stage_of_the_ramp_keeps_its_own_micro_batches_when_its_batches_are_padded():
    train = TrainConfig(batch_size=30, accumulation_steps=5, batch_ramp=(RampStage(8, 100, accumulation_steps=2),))
    assert [micro_batches(train, rows, 3) for rows in (8, 12, 30)] == [2, 2, 5]
    assert padded_rows(train, 8, 3) == 12


BORDERS = {
    "nothing": ({}, ()),
    "phases of data": ({"data": {"phases": (DataPhase("a", 640, (1.0,)), DataPhase("b", sequence_length=32))}}, (5,)),
    "a ramp of batches": ({"train": {"batch_ramp": (RampStage(2, 96), RampStage(4, 128))}}, (3, 5)),
    "a ramp inside a phase": (
        {
            "train": {"batch_ramp": (RampStage(4, 192),)},
            "data": {"phases": (DataPhase("a", 448), DataPhase("b", batch_size=2))},
        },
        (3, 5),
    ),
    "a rate that jumps": (
        {
            "optimizer": {
                "schedule": "phases",
                "warmup_steps": 2,
                "phases": (Phase("constant", 1, 256), Phase("constant", 0.1, 128), Phase("linear", 0, 128), Phase()),
            }
        },
        (4, 6),
    ),
    "less multi-token prediction": ({"model": {"mtp": MTPConfig(depth=1, final_from_tokens=300)}}, (3,)),
}


@pytest.mark.parametrize("name", BORDERS)
def test_borders_are_where_the_configuration_itself_changes_the_loss(name):
    changes, expected = BORDERS[name]
    config = run_config(length=16, batch_size=8)
    parts = {part: dataclasses.replace(getattr(config, part), **fields) for part, fields in changes.items()}
    assert borders(dataclasses.replace(config, **parts)) == expected
