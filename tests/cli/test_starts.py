"""A job that gets nowhere is not started for ever, and one that is told to stop may be as often as anybody likes."""

import json
import signal

import pytest

from opendeep_jax.cli import main as command
from opendeep_jax.cli.starts import MOST_LOSSES, counted, newest_step, told_to_stop
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.exits import PeerEnded, Resume, Stopped, StopRequested
from opendeep_jax.record.files import CHECKPOINTS

JOB = {"OPENDEEP_JOB": "slurm-17"}


def ended(workdir, error: BaseException | None, environ=JOB, process="0") -> BaseException | None:
    """What a start ends with whose training ends with `error`."""
    try:
        with counted(workdir, process, environ, lambda error: command.explanation("train", error)[0] is None):
            if error is not None:
                raise error
    except BaseException as end:
        return end


def save(workdir, step: int) -> None:
    (workdir / CHECKPOINTS / str(step)).mkdir(parents=True)


def test_the_second_crash_without_progress_stops_the_job(tmp_path):
    assert isinstance(ended(tmp_path, ValueError("a")), ValueError)
    end = ended(tmp_path, ValueError("b"))
    assert isinstance(end, Stopped) and "2 starts of job slurm-17" in str(end) and "ValueError" in str(end)
    # Whoever submits it again has mended something.
    assert isinstance(ended(tmp_path, ValueError("c")), ValueError)


def test_a_new_checkpoint_between_two_crashes_is_progress(tmp_path):
    for step in (10, 20, 30):
        assert isinstance(ended(tmp_path, ValueError("a")), ValueError)
        save(tmp_path, step)
    assert isinstance(ended(tmp_path, ValueError("a")), ValueError)
    assert isinstance(ended(tmp_path, ValueError("a")), Stopped)


def test_what_a_start_itself_saved_is_progress(tmp_path):
    for step in (10, 20, 30):
        with pytest.raises(ValueError), counted(tmp_path, "0", JOB, lambda error: True):
            save(tmp_path, step)
            raise ValueError("a")


@pytest.mark.parametrize("error", [Resume("lost a peer"), None])
def test_starts_that_are_lost_without_progress_end(error, tmp_path):
    """By a hang or a lost peer, or killed: then nothing is told at the end."""
    under_way = []
    for _ in range(MOST_LOSSES):
        if error:
            assert ended(tmp_path, error) is error
        else:
            under_way.append(counted(tmp_path, "0", JOB, lambda error: False))
            under_way[-1].__enter__()
    end = ended(tmp_path, None)
    assert isinstance(end, Stopped) and f"{MOST_LOSSES} starts" in str(end)
    assert ended(tmp_path, None) is None


@pytest.mark.parametrize("error", [StopRequested("SIGTERM"), KeyboardInterrupt()])
def test_being_told_to_stop_never_counts(error, tmp_path):
    for _ in range(2 * MOST_LOSSES):
        assert ended(tmp_path, error) is error
    assert ended(tmp_path, ValueError("a")).args == ("a",)


def test_a_process_that_ends_at_once_after_a_signal_does_not_count(tmp_path):
    under_way = []
    for _ in range(2 * MOST_LOSSES):
        under_way.append(counted(tmp_path, "0", JOB, lambda error: False))
        under_way[-1].__enter__()
        told_to_stop()
    assert ended(tmp_path, None) is None


@pytest.mark.parametrize("error", [ConfigError("a"), Stopped("a"), PeerEnded(2, "a"), None])
def test_a_final_end_begins_the_count_again(error, tmp_path):
    ended(tmp_path, ValueError("a"))
    assert ended(tmp_path, error) is error
    assert isinstance(ended(tmp_path, ValueError("a")), ValueError)


def test_another_job_another_process_and_no_job_at_all_count_for_themselves(tmp_path):
    ended(tmp_path, ValueError("a"))
    assert isinstance(ended(tmp_path, ValueError("a"), {"OPENDEEP_JOB": "slurm-18"}, "1"), ValueError)
    assert isinstance(ended(tmp_path, ValueError("a"), {"OPENDEEP_JOB": "slurm-19"}), ValueError)
    for _ in range(4):
        assert isinstance(ended(tmp_path / "alone", ValueError("a"), {}), ValueError)
    assert not (tmp_path / "alone").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": 1}'])
def test_a_damaged_record_is_none(text, tmp_path):
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts/0.json").write_text(text)
    assert isinstance(ended(tmp_path, ValueError("a")), ValueError)
    assert json.loads((tmp_path / "starts/0.json").read_text())["crashes"] == 1


def test_a_directory_that_takes_no_file_hides_nothing(tmp_path):
    (tmp_path / "starts").write_text("a file")
    assert isinstance(ended(tmp_path, ConfigError("a")), ConfigError)


def test_progress_is_looked_for_where_checkpoints_are(tmp_path):
    assert newest_step(tmp_path) == 0
    for name in (9, 100):
        save(tmp_path, name)
    (tmp_path / CHECKPOINTS / "200.partial").mkdir()
    assert newest_step(tmp_path) == 100


def test_signals_have_their_statuses():
    from opendeep_jax.cli.early_stop import STATUSES

    assert STATUSES == {signal.SIGTERM: 75, signal.SIGINT: 130}
