import io
import itertools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from opendeep_jax.jobs.watch.terminal import frame
from opendeep_jax.record import goodput
from opendeep_jax.record.files import GOODPUT
from opendeep_jax.record.goodput import GoodputClock, InputWatch, account, read_goodput
from opendeep_jax.record.record import Record
from opendeep_jax.record.report import goodput_section
from opendeep_jax.record.run_view import RunView
from opendeep_jax.record.time_kinds import KINDS, Kind


@pytest.fixture
def now(monkeypatch):
    """A clock that the test moves: now[0] is perf_counter, now[1] the wall clock."""
    clock = [100.0, 5000.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(goodput.time, "time", lambda: clock[1])
    return clock


def wait(now, seconds):
    now[0] += seconds
    now[1] += seconds


def line(start, wall, step, first_step=0, skipped=0, /, **seconds):
    return {
        "start": start, "time": "", "wall": wall, "step": step, "first_step": first_step, "skipped": skipped,
        "seconds": seconds,
    }  # fmt: skip


# The clock of one process


def test_every_second_belongs_to_one_kind(tmp_path, now):
    clock = GoodputClock(Record(tmp_path), begun=98.0)
    wait(now, 1)  # 3 seconds of start
    with clock.counting("compile"):
        wait(now, 20)
    wait(now, 0.5)
    clock.default = "step"
    wait(now, 5)
    with clock.counting("data"):
        wait(now, 2)
        with clock.counting("checkpoint"):  # taken out of data
            wait(now, 4)
        wait(now, 1)
    clock.write(10)
    (record,) = map(json.loads, (tmp_path / GOODPUT).read_text().splitlines())
    spent = {kind: seconds for kind, seconds in record["seconds"].items() if seconds}
    assert spent == {"start": 3.5, "compile": 20, "step": 5, "data": 3, "checkpoint": 4}
    assert clock.total() == 35.5 and clock.total("data", "step") == 8


def test_a_block_that_raises_is_counted_and_ended(tmp_path, now):
    clock = GoodputClock(Record(tmp_path), begun=100.0)
    with pytest.raises(OSError), clock.counting("checkpoint"):
        wait(now, 2)
        raise OSError
    wait(now, 1)
    assert clock.total("checkpoint") == 2 and clock.total("start") == 1


def test_a_kind_that_does_not_exist_is_refused(tmp_path):
    clock = GoodputClock(Record(tmp_path), begun=time.perf_counter())
    with pytest.raises(ValueError, match="waste"), clock.counting("waste"):
        pass
    with pytest.raises(ValueError, match="nothing"):
        clock.default = "nothing"


def test_a_process_that_does_not_write_makes_no_file(tmp_path):
    GoodputClock(Record(tmp_path, writes=False), begun=time.perf_counter()).write(3)
    assert not (tmp_path / GOODPUT).exists() and read_goodput(tmp_path) is None


def test_a_long_run_does_not_write_a_line_at_every_log(tmp_path, now):
    clock = GoodputClock(Record(tmp_path), begun=100.0)
    for step in range(10):  # a young one does
        wait(now, 1)
        clock.log(step)
    assert len((tmp_path / GOODPUT).read_text().splitlines()) == 10
    wait(now, 1e6)
    for step in range(10, 130):
        wait(now, 1)
        clock.log(step)
    assert len((tmp_path / GOODPUT).read_text().splitlines()) == 12
    clock.write(130)
    assert read_goodput(tmp_path).total == pytest.approx(1e6 + 130)


def test_a_line_that_an_earlier_start_left_half_spoils_nothing(tmp_path, now):
    clock = GoodputClock(Record(tmp_path), begun=100.0)
    wait(now, 3)
    clock.write(1)
    with open(tmp_path / GOODPUT, "a") as file:
        file.write('{"start": "x", "wa')
    GoodputClock(Record(tmp_path), begun=103.0).write(1)
    assert read_goodput(tmp_path).starts == 2


def test_a_new_kind_of_time_needs_one_line(tmp_path, now, monkeypatch):
    monkeypatch.setitem(KINDS, "rollout", Kind("pale green", "@", "sampling what is trained on"))
    assert len(KINDS) == 11
    clock = GoodputClock(Record(tmp_path), begun=100.0)
    with clock.counting("rollout"):
        wait(now, 4)
    clock.default = "step"
    wait(now, 4)
    clock.write(1)
    found = read_goodput(tmp_path)
    assert found.seconds["rollout"] == 4 and "rollout 50.0%" in str(found)
    assert "sampling what is trained on" in goodput_section(found)
    run = RunView(tmp_path)
    run.refresh()
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(frame([run], ["run"], console))
    assert "rollout 50.0%" in console.file.getvalue()


# All starts together


def test_the_time_between_two_starts_is_restart_and_steps_done_twice_are_waste(tmp_path, now):
    first = GoodputClock(Record(tmp_path), begun=100.0)
    first.default = "step"
    wait(now, 10)
    first.write(50)
    wait(now, 30)
    with first.counting("data"):
        wait(now, 10)
    first.write(150)  # 0.3 s of step and 0.1 s of data each
    wait(now, 5)  # until it is killed
    wait(now, 15)  # until it is started again
    second = GoodputClock(Record(tmp_path), begun=now[0], first_step=100)
    with second.counting("restore"):
        wait(now, 2)
    second.default = "step"
    wait(now, 40)
    second.write(200)
    found = read_goodput(tmp_path)
    expected = {"step": 10 + 15 + 40, "data": 5, "waste": 20, "restart": 20, "restore": 2}
    assert {kind: value for kind, value in found.seconds.items() if value} == pytest.approx(expected)
    assert found.starts == 2 and found.total == pytest.approx(112) and found.goodput == pytest.approx(65 / 112)
    assert str(found) == "goodput 58.0% of 1 min 52 s: waste 17.9%, restart 17.9%, data 4.5%, restore 1.8%"


def test_a_rollback_wastes_what_it_undoes(tmp_path, now):
    clock = GoodputClock(Record(tmp_path), begun=100.0)
    clock.default = "step"
    wait(now, 100)
    clock.write(100)
    wait(now, 8)
    clock.rollback(108, 40)
    wait(now, 60)
    clock.write(100)
    found = read_goodput(tmp_path)
    assert found.seconds["step"] == pytest.approx(100) and found.seconds["waste"] == pytest.approx(68)
    assert found.starts == 1


def test_a_rollback_that_is_killed_before_it_goes_on_is_counted_once(tmp_path, now):
    clock = GoodputClock(Record(tmp_path), begun=100.0)
    clock.default = "step"
    wait(now, 100)
    clock.rollback(100, 50)
    again = GoodputClock(Record(tmp_path), begun=now[0], first_step=50)
    again.default = "step"
    wait(now, 50)
    again.write(100)
    assert read_goodput(tmp_path).seconds["waste"] == pytest.approx(50)


def test_a_skipped_update_is_waste(tmp_path, now):
    clock = GoodputClock(Record(tmp_path), begun=100.0)
    clock.default = "step"
    wait(now, 20)
    clock.write(10)
    wait(now, 20)
    clock.skipped(3)
    clock.write(20)
    assert read_goodput(tmp_path).seconds["waste"] == pytest.approx(6)


def test_steps_that_are_skipped_and_then_undone_are_wasted_once():
    found = account([line("a", 10, 10, 0, 5, step=10.0), line("b", 20, 10, step=10.0)])
    assert found.seconds["waste"] == pytest.approx(10) and found.seconds["step"] == pytest.approx(10)


def test_a_clock_that_was_set_back_gives_no_negative_gap():
    found = account([line("a", 1e9, 10, step=10.0), line("b", 5.0, 20, 10, step=10.0)])
    assert found.seconds["restart"] == 0 and found.total == pytest.approx(20)


def test_broken_lines_are_skipped(tmp_path):
    sound = line("a", 10.0, 10, step=8.0, data=2.0)
    broken = ["{", "[1]", "null", json.dumps(sound | {"seconds": None}), json.dumps(sound | {"step": "x"}),
              json.dumps(sound | {"wall": None}), json.dumps(sound | {"start": 3}),
              json.dumps(sound | {"seconds": {"step": "1"}}), '{"start": "a", "wall": NaN, "step": 1, "seconds": {}}',
              "\x00" * 20]  # fmt: skip
    (tmp_path / GOODPUT).write_text("\n".join([*broken, json.dumps(sound), json.dumps(sound)[:30]]))
    found = read_goodput(tmp_path)
    assert found.total == 10 and found.goodput == 0.8


@settings(max_examples=100, deadline=None)
@given(
    st.lists(  # starts: (checkpoint it goes on from, gap, windows: (steps, step s, data s, other s, skipped, back to))
        st.tuples(
            st.integers(0, 400),
            st.floats(-50, 50),
            st.lists(
                st.tuples(
                    st.integers(0, 60), st.floats(0, 9), st.floats(0, 9), st.floats(0, 9), st.integers(0, 70),
                    st.none() | st.integers(0, 400),
                ),
                max_size=6,
            ),
        ),
        min_size=1,
        max_size=5,
    )
)  # fmt: skip
def test_all_kinds_add_up_to_all_time_and_useful_time_is_that_of_each_steps_last_pass(starts):
    records, wall, expected, useful, step = [], 1000.0, 0.0, {}, 0
    for name, (resume, gap, windows) in enumerate(starts):
        if not windows:
            continue
        step = first = min(resume, step)  # no checkpoint lies ahead of what was done
        useful = {at: seconds for at, seconds in useful.items() if at < first}
        wall += gap
        expected += max(gap, 0) if records else 0
        total, skipped_before = {"step": 0.0, "data": 0.0, "other": 0.0}, 0
        for steps, computing, waiting, other, skipped, back in windows:
            for kind, seconds in zip(total, (computing, waiting, other), strict=True):
                total[kind] += seconds
            wall, expected = wall + computing + waiting + other, expected + computing + waiting + other
            done = min(skipped, steps)
            for at in range(step, step + steps):
                useful[at] = computing / steps * (1 - done / steps)
            if not steps:
                useful[step - 0.5] = useful.get(step - 0.5, 0.0) + computing  # belongs to no step: kept with the last
            step, skipped_before = step + steps, skipped_before + skipped
            records.append(line(str(name), wall, step, first, skipped_before, **total))
            if back is not None and back < step:
                step = first = back
                useful = {at: seconds for at, seconds in useful.items() if at < back}
                records.append(line(str(name), wall, step, first, skipped_before, **total))
    found = account(records)
    if not records:
        assert found is None
        return
    assert sum(found.seconds.values()) == pytest.approx(expected, abs=1e-6) == found.total
    assert all(seconds >= 0 for seconds in found.seconds.values()) and set(found.seconds) == set(KINDS)
    assert found.seconds["step"] == pytest.approx(sum(useful.values()), abs=1e-6)
    assert 0 <= found.goodput <= 1


def test_a_long_record_is_added_up_quickly():
    records = (line("a", float(i), i, step=float(i)) for i in range(1, 30_001))
    begun = time.perf_counter()
    assert account(itertools.chain(records, [line("b", 30_000.0, 15_000, step=0.0)])).seconds["waste"] == 30_000
    assert time.perf_counter() - begun < 5


# Late input and slow steps


def windows(watch, *kinds):
    """Feeds windows of ten steps; returns (index, kind) of what was said."""
    measured = {
        "good": (10, 10.0, 0.1, 2.0),
        "late": (10, 20.0, 18.0, 1.0),  # steps of one second wait for batches of two
        "hidden": (10, 10.0, 5.0, 1.0),  # batches of half a second while steps of one second are computed
        "slow": (10, 20.0, 0.2, 2.0),
    }
    said = ((index, watch.window(*measured[kind])) for index, kind in enumerate(kinds))
    return [(index, event[0]) for index, event in said if event]


def test_late_input_is_told_once_and_so_is_its_end():
    said = windows(InputWatch(), *["good"] * 6, *["late"] * 9, *["good"] * 5)
    assert said == [(7, "starved"), (16, "recovered_speed")]


def test_slow_steps_are_told_from_late_input():
    said = windows(InputWatch(), *["good"] * 6, *["slow"] * 100, *["late"] * 4, "good", "good")
    assert said == [(7, "slow"), (107, "starved"), (111, "recovered_speed")]


def test_waiting_for_data_while_the_device_computes_is_no_starvation():
    assert windows(InputWatch(), *["hidden"] * 20) == []


def test_each_wait_counts_where_every_step_is_logged():
    watch = InputWatch()
    assert [watch.window(1, 1.5, 0.5, 1.0) for _ in range(2)][1][0] == "starved"
    watch = InputWatch()
    assert [watch.window(1, 1.1, 0.1, 1.0) for _ in range(9)] == [None] * 9


def test_input_that_is_late_from_the_first_step_on_is_told():
    assert windows(InputWatch(), "late", "late", "late") == [(1, "starved")]


def test_a_single_odd_window_says_nothing():
    assert windows(InputWatch(), *["good"] * 6, *["late", "good", "slow", "good"] * 5) == []


def test_steps_of_another_size_are_learned_anew():
    watch = InputWatch()
    windows(watch, *["good"] * 6)
    watch.reset()
    assert windows(watch, *["slow"] * 10) == []


def test_the_texts_name_numbers_and_a_cure():
    watch = InputWatch()
    events = [watch.window(10, 20.0, 12.0, 0.5) for _ in range(2)]
    assert "60% of the time over the last 10 steps" in events[1][1] and "data.workers" in events[1][1]


def test_empty_windows_are_skipped():
    watch = InputWatch()
    assert watch.window(0, 1.0, 0.5, 0.0) is None and watch.window(3, 0.0, 0.0, 0.0) is None


@pytest.mark.parametrize("log_every", [1, 2, 10])
@pytest.mark.parametrize("steps_ahead", [1, 2, 8])
@pytest.mark.parametrize("batch_seconds", [0.05, 0.15, 0.5, 0.9, 1.6, 3.0])
def test_input_counts_as_late_where_a_device_is_idle(log_every, steps_ahead, batch_seconds):
    """A loop that waits for batches, begins steps of one second, and may be so many steps ahead of the device."""
    watch, said, under_way = InputWatch(), [], []
    now = device_free = began = idle = waited = 0.0
    for step in range(1, 8 * log_every + 1):
        now, waited = now + batch_seconds, waited + batch_seconds
        idle += max(now - device_free, 0.0)
        device_free = max(now, device_free) + 1.0
        under_way.append(device_free)
        if len(under_way) > steps_ahead:
            now = max(now, under_way.pop(0))
        if step % log_every == 0:
            said.append(watch.window(log_every, device_free - began, waited, device_free - now))
            share = idle / (device_free - began)
            now, began, idle, waited = device_free, device_free, 0.0, 0.0
    starved = any(event and event[0] == "starved" for event in said)
    assert starved if share > 0.3 else not starved
