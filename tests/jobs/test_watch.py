import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_recipe, to_json
from opendeep_jax.config.schema import DataPhase, Phase, RampStage
from opendeep_jax.jobs.watch.watch import Watch, find_runs, labels
from opendeep_jax.record import files as record_files
from opendeep_jax.record.files import HEARTBEAT, Tail, last_record
from opendeep_jax.record.run_view import POINTS, Curve, RunView, data_phase, rate_phase


def add(path, *records):
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def logged(step, loss=3.0):
    return {
        "step": step,
        "tokens": step * 100,
        "loss": loss,
        "tokens_per_second": 50.0,
        "step_seconds": 2.0,
        "mfu": 0.3,
    }


def steps_of(tail):
    """What is new, of a file that is known not to have been replaced."""
    assert not tail.restarted()
    return [record["step"] for record in tail.read()]


def a_config(**train):
    config = load_recipe("quickstart")
    optimizer = replace(config.optimizer, warmup_steps=2)
    return replace(config, train=replace(config.train, **train), optimizer=optimizer)


# Files that grow


def test_a_tail_reads_each_line_once_and_half_a_line_when_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert steps_of(tail) == []
    add(path, {"step": 1}, {"step": 2})
    with open(path, "a") as file:
        file.write('{"step"')
    assert steps_of(tail) == [1, 2] and steps_of(tail) == []
    with open(path, "a") as file:
        file.write(': 3}\n{"step": 4}\n')
    assert steps_of(tail) == [3, 4]


def test_a_tail_passes_over_what_is_no_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\xff\xfe\n{"step": 1}\nnull\n[1]\n\n{"step": 2\n' + b"[" * 100_000 + b'\n{"step": 3}\n\x00\x00')
    assert steps_of(Tail(path)) == [1, 3]


def test_a_tail_reads_a_file_that_was_replaced_or_cut_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    add(path, {"step": 1}, {"step": 2})
    tail = Tail(path)
    assert steps_of(tail) == [1, 2]
    (tmp_path / "new").write_text('{"step": 1}\n{"step": 7}\n{"step": 8}\n')
    os.replace(tmp_path / "new", path)
    assert tail.restarted() and steps_of(tail) == [1, 7, 8]
    path.write_text('{"step": 9}\n')
    assert tail.restarted() and steps_of(tail) == [9]
    path.unlink()
    assert tail.restarted() and steps_of(tail) == []


def test_lines_longer_than_a_piece_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "CHUNK", 10)
    path = tmp_path / "metrics.jsonl"
    add(path, *({"step": step, "pad": "x" * step} for step in range(40)))
    assert steps_of(Tail(path)) == list(range(40))


def test_a_long_backlog_is_sampled_evenly_and_its_end_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    add(path, *({"step": step, "pad": "x" * 500} for step in range(40_000)))
    tail = Tail(path, samples=100)
    steps = steps_of(tail)
    assert steps[0] == 0 and steps[-1000:] == list(range(39_000, 40_000)) and 1500 < len(steps) < 3000
    gaps = [b - a for a, b in zip(steps[:90], steps[1:91], strict=True)]
    assert 300 < min(gaps) <= max(gaps) < 500
    add(path, {"step": 40_000})
    assert steps_of(tail) == [40_000]
    assert len(steps_of(Tail(path))) == 40_001  # what must be whole is


@pytest.mark.parametrize("content, expected", [
    ("", None), ('{"a": 1}', None), ('{"a": 1}\n', 1), ('{"a": 1}\n{"a": 2}\n{"a"', 2), ('{"a": 1}\n{"a":\n\n', 1),
    ('{"a": 1}\n{"a": 2, "pad": "' + "x" * 300_000 + '"}\n{', 2), ("nothing\n" * 10_000, None),
])  # fmt: skip
def test_the_last_record_is_read_from_the_end(tmp_path, content, expected):
    (tmp_path / "experts.jsonl").write_text(content)
    record = last_record(tmp_path / "experts.jsonl")
    assert (record and record["a"]) == expected


def test_a_curve_of_any_length_keeps_its_mean_its_spikes_and_its_end():
    curve = Curve()
    for x in range(100_001):
        curve.add(x, 50.0 if x == 33_333 else float(x % 2))
    points = curve.points()
    assert POINTS / 2 <= len(points) <= POINTS and len(curve) <= 2 * POINTS
    assert max(high for *_, high in points) == 50 and min(low for _, low, *_ in points) == 0
    assert points[0][0] == 0 and points[-1][0] > 99_000
    assert all(0.45 < mean < 0.8 for _, _, mean, _ in points)
    assert len(curve.points(7)) <= 7
    curve.add(None, 3.0), curve.add(3.0, None)
    assert curve.points() == points


# A run


def test_a_run_is_followed_as_it_grows(tmp_path):
    (tmp_path / "config.json").write_text(to_json(a_config(steps=10, batch_size=2)))
    run = RunView(tmp_path)
    run.refresh()
    assert run.name == "quickstart" and run.total == 10 and run.step == 0 and run.state() == ("running", "starting")
    add(tmp_path / "metrics.jsonl", logged(1), logged(2, 2.0))
    add(tmp_path / "evaluation.jsonl", {"step": 2, "tokens": 200, "held_out_bits_per_byte": 2.5})
    add(tmp_path / "experts.jsonl", {"step": 2, "load": [[1, 1], [0.5, None]]})
    add(tmp_path / "events.jsonl", {"time": "2026-11-22T12:00:00+00:00", "kind": "slow", "step": 2, "text": "Slow."})
    seconds = {"step": 6.0, "data": 2.0}
    add(tmp_path / "goodput.jsonl", {"start": "a", "wall": 1.0, "step": 2, "first_step": 0, "seconds": seconds})
    run.refresh()
    assert run.step == 2 and run.last["loss"] == 2.0 and run.held_out_now == 2.5 and run.goodput.goodput == 0.75
    assert run.load == [[1, 1], [0.5, 0]] and [event["kind"] for event in run.events] == ["slow"]
    assert run.state()[0] == "running"
    per_step = 2 * run.config.data.sequence_length
    assert run.seconds_left() == pytest.approx(8 * per_step / 50.0)
    add(tmp_path / "metrics.jsonl", *(logged(step) for step in range(3, 11)))
    (tmp_path / "summary.json").write_text('{"steps": 10}')
    run.refresh()
    assert run.state() == ("finished", "finished") and run.seconds_left() is None


def test_a_run_that_went_back_to_a_checkpoint_shows_no_doubles(tmp_path):
    path = tmp_path / "metrics.jsonl"
    add(path, *(logged(step) for step in range(1, 9)))
    run = RunView(tmp_path)
    run.refresh()
    assert len(run.curves["loss"]) == 8
    (tmp_path / "rewound").write_text("".join(path.read_text().splitlines(True)[:4]))
    os.replace(tmp_path / "rewound", path)
    add(path, logged(5, 1.0))
    run.refresh()
    assert run.step == 5 and [mean for mean in run.curves["loss"].means()] == [3, 3, 3, 3, 1]


def test_states_tell_silence_from_a_stop(tmp_path):
    run = RunView(tmp_path)
    run.refresh()
    assert run.state()[0] == "empty"
    add(tmp_path / "metrics.jsonl", logged(1), logged(2))
    run.refresh()
    now = time.time()
    assert run.state(now)[0] == "running" and run.state(now - 500)[0] == "running"  # another machine's clock is ahead
    assert run.state(now + 3600) == ("quiet", "no sign for 1 h 00 min")
    then = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    add(tmp_path / "events.jsonl", {"time": then, "kind": "preempted", "step": 2, "text": ""})
    run.refresh()
    assert run.state(now + 3600)[0] == "stopped"
    os.utime(tmp_path / "metrics.jsonl", (now + 3000, now + 3000))  # it goes on
    assert run.state(now + 3010)[0] == "running"


def sign(path, now, **more):
    """A sign of life that a process gave at `now`."""
    beat = {"time": now, "doing": "step", "step": 2, "ended": False} | more
    (path / HEARTBEAT).write_text(json.dumps(beat))
    os.utime(path / HEARTBEAT, (now, now))


def event_at(now, kind):
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(now)), "kind": kind, "step": 2, "text": ""}


@pytest.mark.parametrize(
    "signs, later, state, words",
    [
        ({}, 3, "running", "running"),
        ({"doing": "compile"}, 3, "running", "compiling"),
        ({"doing": "data preparation"}, 3, "running", "preparing text"),
        ({"doing": "restore"}, 3, "running", "restoring"),
        ({}, 45, "quiet", "no sign for 45.0 s"),  # killed, or its machine is gone
        ({"ended": True}, 3, "stopped", "stopped"),  # it failed, without an event
        ({"ended": True}, 9999, "stopped", "stopped"),
        ({"event": "preempted"}, 3, "stopped", "stopped"),  # and had no time for its last sign
        ({"event": "hang"}, 45, "stopped", "stopped"),
        ({"event": "skipped"}, 3, "running", "running"),
    ],
)
def test_time_is_left_only_to_a_run_that_is_alive(tmp_path, signs, later, state, words):
    now = float(int(time.time()))
    (tmp_path / "config.json").write_text(to_json(a_config(steps=10, batch_size=2)))
    add(tmp_path / "metrics.jsonl", logged(1), logged(2))
    if kind := signs.pop("event", None):
        add(tmp_path / "events.jsonl", event_at(now, kind))
    sign(tmp_path, now, **signs)
    for path in tmp_path.iterdir():
        os.utime(path, (now, now))
    run = RunView(tmp_path)
    run.refresh()
    assert run.state(now + later) == (state, words)
    assert (run.seconds_left(now + later) is not None) == (state == "running")


def test_a_run_that_was_started_again_after_a_stop_is_running_while_it_compiles(tmp_path):
    now = time.time()
    add(tmp_path / "metrics.jsonl", logged(1), logged(2))
    add(tmp_path / "events.jsonl", event_at(now, "preempted"))
    sign(tmp_path, now + 600, doing="compile")
    run = RunView(tmp_path)
    run.refresh()
    assert run.state(now + 602) == ("running", "compiling")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"time": "x"}', '{"ended": 3}', "null"])
def test_a_sign_of_life_that_is_none_counts_for_nothing(tmp_path, content):
    add(tmp_path / "metrics.jsonl", logged(1), logged(2))
    (tmp_path / HEARTBEAT).write_text(content)
    run = RunView(tmp_path)
    run.refresh()
    assert run.state()[0] == "running" and run.state(time.time() + 3600)[0] == "quiet"


def test_a_slow_run_is_given_time(tmp_path):
    add(tmp_path / "metrics.jsonl", logged(10) | {"step_seconds": 30.0}, logged(20) | {"step_seconds": 30.0})
    run = RunView(tmp_path)
    run.refresh()
    assert run.state(time.time() + 1000)[0] == "running" and run.state(time.time() + 2000)[0] == "quiet"


HOSTILE = ['{"step": "x"}', '{"step": 1e999}', '{"step": 2, "loss": null, "tokens": []}', "{", "[]", "5", "\x00",
           '{"step": 1, "load": 3, "seconds": 5, "kind": {}, "time": [], "text": null, "start": "a", "wall": 1}',
           '{"step": 3, "load": [[1, "a"], []], "seconds": {"step": "x"}, "start": "a", "wall": 1, "first_step": 0}',
           '{"step": true, "load": [[1e999, 2]], "held_out_bits_per_byte": "low", "name": 5, "steps": "many"}',
           ]  # fmt: skip


def test_files_that_hold_anything_never_stop_the_watch(tmp_path):
    names = ("config.json", "data.json", "summary.json", "metrics.jsonl", "evaluation.jsonl", "experts.jsonl",
             "events.jsonl", "goodput.jsonl")  # fmt: skip
    run = RunView(tmp_path)
    for content in [*HOSTILE, "\n".join(HOSTILE) + "\n", ""]:
        for name in names:
            (tmp_path / name).write_text(content + "\n")
        run.refresh()
        fresh = RunView(tmp_path, details=True).refresh()
        for looked in (run, fresh):
            assert looked.state()[1] and looked.phase() == ("", "") and looked.seconds_left() is None
    for name in names:
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
    run.refresh()


# Phases


def test_the_phase_is_that_of_the_last_step():
    config = load_recipe("quickstart")
    phases = (DataPhase(name="short", tokens=64 * 1000), DataPhase(name="long", sequence_length=128, batch_size=4))
    config = replace(
        config,
        data=replace(config.data, sequence_length=64, phases=phases),
        train=replace(config.train, batch_size=10, steps=300, batch_ramp=(RampStage(2, 1280), RampStage(5, 3200))),
        optimizer=replace(config.optimizer, schedule="wsd", warmup_steps=5, decay_fraction=0.5),
    )
    assert data_phase(config, 0) == "short (1 of 2), batch ramp 1 of 2, 2 × 64 tokens"
    assert data_phase(config, 10) == "short (1 of 2), batch ramp 2 of 2, 5 × 64 tokens"
    assert data_phase(config, 20) == "short (1 of 2), 10 × 64 tokens"
    assert data_phase(config, 299) == "long (2 of 2), 4 × 128 tokens"
    assert data_phase(load_recipe("quickstart"), 0).count(",") == 0
    found = [rate_phase(config, step) for step in (0, 4, 5, 149, 150)]
    assert found == ["warm-up, step 1 of 5", "warm-up, step 5 of 5", "stable", "stable", "decay"]


def test_the_phases_of_a_schedule_are_counted():
    config = a_config(batch_size=10, steps=100)
    row = config.data.sequence_length
    phases = (Phase("constant", 1.0, 100 * row), Phase("cosine", 0.1, 200 * row), Phase("constant", 0.1))
    config = replace(config, optimizer=replace(config.optimizer, schedule="phases", warmup_steps=10, phases=phases))
    found = [rate_phase(config, step) for step in (9, 10, 19, 20, 39, 40, 99)]
    assert found == ["warm-up, step 10 of 10", *2 * ["constant (phase 1 of 3)"], *2 * ["cosine (phase 2 of 3)"],
                     *2 * ["constant (phase 3 of 3)"]]  # fmt: skip


# Finding runs


def test_runs_are_found_alone_in_a_sweep_and_by_a_pattern(tmp_path):
    for name in ("sweep/runs/b", "sweep/runs/a", "sweep/runs/no_run", "alone", "runs/x"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("sweep/runs/a", "sweep/runs/b", "alone", "runs/x"):
        (tmp_path / name / "config.json").write_text("{}")

    def found(*places):
        return [str(path.relative_to(tmp_path)) for path in find_runs([str(tmp_path / place) for place in places])]

    assert found("sweep") == ["sweep/runs/a", "sweep/runs/b"]
    assert found("alone", "sweep/runs/b", "alone") == ["alone", "sweep/runs/b"]
    assert found("sweep/runs/*") == ["sweep/runs/a", "sweep/runs/b"]
    assert found("*") == ["alone", "runs/x", "sweep/runs/a", "sweep/runs/b"]
    assert found("sweep/runs/no_run") == ["sweep/runs/no_run"]
    for missing in ("nowhere", "nowhere/*", "alone/config.json"):
        with pytest.raises(ConfigError, match=r"--workdir=.*there is no such directory"):
            find_runs([str(tmp_path / missing)])


def test_a_directory_in_square_brackets_is_no_pattern(tmp_path):
    (tmp_path / "rate=[1]").mkdir()
    assert find_runs([str(tmp_path / "rate=[1]")]) == [tmp_path / "rate=[1]"]


def test_runs_that_begin_later_are_found_and_a_directory_that_goes_away_stays(tmp_path):
    (tmp_path / "runs").mkdir()
    watched = Watch([str(tmp_path / "runs")])
    assert [run.workdir.name for run in watched.refresh()] == ["runs"]
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir()
        add(tmp_path / "runs" / name / "metrics.jsonl", logged(1))
    first = watched.refresh()
    assert [run.workdir.name for run in first] == ["a", "b"]
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert watched.refresh() == first


def test_labels_tell_runs_apart(tmp_path):
    runs = []
    for name in ("x/a", "x/b", "y/a"):
        (tmp_path / name).mkdir(parents=True)
        runs.append(RunView(tmp_path / name))
        runs[-1].name = "same"
    assert labels(runs[:1]) == ["same"] and labels(runs[:2]) == ["a", "b"]
    assert labels(runs) == ["x/a", "x/b", "y/a"]
    for run, name in zip(runs, ("base/rate=1,seed=0", "base/rate=1,seed=1", "base/rate=2,seed=0"), strict=True):
        run.name = name
    assert labels(runs) == ["rate=1,seed=0", "rate=1,seed=1", "rate=2,seed=0"]
    assert labels(runs[:2]) == ["seed=0", "seed=1"]
    runs[1].name = "base/seed=1"
    assert labels(runs) == ["rate=1,seed=0", "seed=1", "rate=2,seed=0"]


def test_watching_needs_no_jax_and_starts_quickly():
    program = (
        "import sys; import opendeep_jax.cli.watch, opendeep_jax.jobs.watch.watch, opendeep_jax.jobs.watch.terminal; "
    )
    program += "print(sorted({'jax', 'numpy', 'matplotlib'} & set(sys.modules)))"
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n" and time.perf_counter() - begun < 5  # half a second on a quiet machine
