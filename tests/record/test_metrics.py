import hashlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opendeep_jax.record.events import read_events
from opendeep_jax.record.files import read_jsonl
from opendeep_jax.record.metrics import MetricsWriter
from opendeep_jax.record.record import Record, to_json_line


def _steps(path):
    return [record["step"] for record in read_jsonl(path)]


def _write_run(workdir, steps, resume_step=0):
    record = Record(workdir)
    record.rewind(resume_step)
    writer = MetricsWriter(record, resume_step)
    for step in steps:
        writer.scalars({"step": step, "tokens": step * 10, "loss": 9.0 - step})
        writer.evaluation({"step": step, "tokens": step * 10, "held_out_bits_per_byte": 2.0})
        writer.experts(step, [[1, 3]], [[0.1, -0.1]])
        writer.sample(step, "import ", "os")
    writer.close()


def test_every_line_is_on_disk_before_the_writer_closes(tmp_path):
    writer = MetricsWriter(Record(tmp_path))
    writer.scalars({"step": 1, "loss": np.float32(2.5), "tokens": np.int64(8), "grad_norm": np.ones((1,))})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5, "tokens": 8, "grad_norm": 1.0}]
    writer.close()
    writer.close()


def test_floats_survive_with_every_bit():
    loss = float(np.float32(2.3456789))
    assert json.loads(to_json_line({"step": 1, "loss": loss}))["loss"] == loss


def test_numbers_that_are_not_finite_become_null_and_are_named():
    line = to_json_line({"step": 3, "loss": float("nan"), "grad_norm": np.float32("inf"), "mfu": 0.5})
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record == {
        "step": 3, "loss": None, "grad_norm": None, "mfu": 0.5, "non_finite": {"loss": "nan", "grad_norm": "inf"}
    }  # fmt: skip


def test_lists_may_hold_numbers_that_are_not_finite():
    record = json.loads(to_json_line({"step": 3, "peaks": [1.5, float("inf")], "fine": [1.0]}))
    assert record == {"step": 3, "peaks": [1.5, None], "fine": [1.0], "non_finite": {"peaks": "[1.5, inf]"}}


def test_expert_loads_are_written_over_the_mean_of_their_layer(tmp_path):
    writer = MetricsWriter(Record(tmp_path))
    writer.experts(5, np.array([[1, 3], [0, 0]]), np.array([[0.123456, float("nan")], [0, 0]]))
    writer.close()
    (record,) = read_jsonl(tmp_path / "experts.jsonl")
    assert record == {"step": 5, "load": [[0.5, 1.5], [0.0, 0.0]], "bias": [[0.1235, None], [0.0, 0.0]]}


@pytest.mark.parametrize("name", ["metrics", "evaluation", "experts", "samples"])
def test_resuming_drops_the_lines_of_the_lost_part(tmp_path, name):
    _write_run(tmp_path, range(1, 8))
    _write_run(tmp_path, [6, 7], resume_step=5)
    assert _steps(tmp_path / f"{name}.jsonl") == [1, 2, 3, 4, 5, 6, 7]
    _write_run(tmp_path, [1], resume_step=0)
    assert _steps(tmp_path / f"{name}.jsonl") == [1]


def test_resuming_mends_a_line_that_was_cut_off(tmp_path):
    _write_run(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert _steps(tmp_path / "metrics.jsonl") == [1, 2]
    _write_run(tmp_path, [3], resume_step=2)
    assert _steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_a_file_with_nothing_to_drop_is_left_as_it_is(tmp_path):
    _write_run(tmp_path, [1, 2])
    before = (tmp_path / "metrics.jsonl").stat()
    assert Record(tmp_path).rewind(2) == 0
    after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_reading_skips_what_is_not_a_whole_object(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\xff\n[1]\n{"step": 2}\n{"step"')
    assert _steps(path) == [1, 2]
    assert read_jsonl(tmp_path / "missing.jsonl") == []


def test_a_limit_spreads_the_lines_and_keeps_both_ends(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(101)))
    assert _steps(path)[:: len(_steps(path)) - 1] == [0, 100]
    assert read_jsonl(path, limit=5) == [{"step": i} for i in (0, 25, 50, 75, 100)]


@given(prompt=st.text(), text=st.text())
def test_any_text_a_model_writes_comes_back(tmp_path_factory, prompt, text):
    writer = MetricsWriter(Record(tmp_path_factory.mktemp("run")))
    writer.sample(1, prompt, text)
    writer.close()
    assert read_jsonl(writer.record.workdir / "samples.jsonl") == [{"step": 1, "prompt": prompt, "text": text}]


@given(st.dictionaries(st.text(min_size=1), st.floats(width=32), max_size=5), st.integers(1, 9), st.integers(0, 9))
def test_rewinding_keeps_exactly_the_lines_up_to_the_step(tmp_path_factory, numbers, lines, step):
    numbers.pop("step", None)
    path = tmp_path_factory.mktemp("run") / "x.jsonl"
    path.write_text("".join(to_json_line({"step": i} | numbers) for i in range(1, lines + 1)))
    assert Record(path.parent).rewind(step, ["x.jsonl"]) == max(lines - step, 0)
    assert _steps(path) == list(range(1, min(step, lines) + 1))


def _events(directory):
    """(step, {tag: value}) of every event in the files of a directory, read as TensorBoard does."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            yield event, {value.tag: value.simple_value for value in event.summary.value}
            data = data[12 + length + 4 :]


def test_tensorboard_gets_the_same_scalars(tmp_path):
    _write_run(tmp_path, [1])
    events = {
        (event.step, tag): value for event, values in _events(tmp_path / "tensorboard") for tag, value in values.items()
    }
    assert events == {
        (1, "train/tokens"): 10, (1, "train/loss"): 8,
        (1, "evaluation/tokens"): 10, (1, "evaluation/held_out_bits_per_byte"): 2,
    }  # fmt: skip


def test_tensorboard_is_told_to_hide_the_lost_part(tmp_path):
    _write_run(tmp_path, range(1, 8))
    _write_run(tmp_path, [6], resume_step=5)
    starts = [event.step for event, _ in _events(tmp_path / "tensorboard") if event.HasField("session_log")]
    assert sorted(starts) == [1, 6]


def test_a_directory_that_cannot_be_made_is_the_callers_to_report(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Record(tmp_path / "file" / "run")


def test_a_rewind_of_the_metrics_is_an_event_with_the_hash_of_what_was_cut(tmp_path):
    _write_run(tmp_path, range(1, 8))
    cut = b"".join((tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[5:])
    _write_run(tmp_path, [6], resume_step=5)
    (event,) = read_events(tmp_path)
    assert (event["kind"], event["step"], event["file"], event["lines"]) == ("rewound", 5, "metrics.jsonl", 2)
    assert event["sha256"] == hashlib.sha256(cut).hexdigest()
    Record(tmp_path).rewind(6)  # nothing is cut, so nothing happened
    assert len(read_events(tmp_path)) == 1


def test_every_write_can_be_chained_and_gives_the_files_back(tmp_path):
    files = {"metrics.jsonl": b'{"step"'}
    (tmp_path / "metrics.jsonl").write_bytes(files["metrics.jsonl"])  # a start that died in the middle of a line

    def ledger(kind, name, data):
        files[name] = {"append": files.get(name, b""), "write": b""}[kind] + data

    record = Record(tmp_path, ledger=ledger)
    for step in range(1, 4):
        record.append("metrics.jsonl", {"step": step})
    record.event("spike", 2, "step 2: …")
    record.write("summary.json", {"steps": 3})
    assert files == {name: (tmp_path / name).read_bytes() for name in files}
    record.rewind(2, ["metrics.jsonl"])
    assert len(files) == 3 and files == {name: (tmp_path / name).read_bytes() for name in files}


def test_events_of_older_versions_have_the_kinds_of_now(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"kind": "unsound_checkpoint", "step": 3, "text": "…"}\n')
    (event,) = read_events(tmp_path, "corrupt_checkpoint")
    assert event == {"kind": "corrupt_checkpoint", "step": 3, "text": "…"}
