"""A run that is killed again and again ends with the bits of one that nobody disturbed: benchmarks/kills.py."""

import json
import re

import kills


def test_a_run_killed_in_a_step_and_in_the_middle_of_a_save_ends_bitwise_the_same(tmp_path, capsys):
    assert kills.main(["--kills=2", "--steps=60", "--seed=1", f"--directory={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    counts = {place: int(count) for count, place in re.findall(r"^ +(\d+) kills (.*)$", printed, flags=re.MULTILINE)}
    assert sum(counts.values()) == 2 and counts["while a checkpoint was written"] >= 1
    assert "final state: bitwise equal\n60 lines of metrics: equal\n" in printed
    assert list(tmp_path.iterdir()) == []


def write_lines(run, lines):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_comparison_sees_a_number_a_missing_line_and_no_times(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    lines = [{"step": step, "loss": 1 / step, "seconds": 0.1 * step} for step in range(1, 9)]
    write_lines(one, lines)
    write_lines(other, [line | {"seconds": 7.0, "first_step_seconds": 1.0} for line in lines])
    assert kills.lines_that_differ(one, other) == []
    lines[3]["loss"] += 1e-7
    write_lines(other, lines[:-1])
    assert kills.lines_that_differ(one, other) == ["metrics.jsonl: 8 and 7 lines", "metrics.jsonl, line 4"]


def test_the_last_step_is_read_from_a_file_that_is_being_written(tmp_path):
    assert kills.steps_done(tmp_path) == 0 == kills.written(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert kills.steps_done(tmp_path) == 2
    (tmp_path / "metrics.jsonl").write_text('{"st')
    assert kills.steps_done(tmp_path) == 0
