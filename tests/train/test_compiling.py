"""While XLA compiles a person reads what, and how long it took last time; XLA's alarms are kept from them."""

import io
import json
import sys

import pytest

from opendeep_jax.train import compiling as module
from opendeep_jax.train.compiling import TIMES_FILE, Times, compiling, print_once, quiet_alarms


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def compile_for(clock, seconds, directory, key="a model", say=None):
    said = []
    with compiling("the step", directory, key, said.append if say is None else say):
        clock[0] += seconds
    return said


def test_it_is_said_what_is_compiled_and_how_long_it_took_the_last_time(clock, tmp_path):
    cache = str(tmp_path / "cache")
    assert compile_for(clock, 41.0, cache) == ["compiling the step", "compiled in 41.0 s"]
    assert compile_for(clock, 200.0, cache) == [
        "compiling the step; it took 41.0 s last time",
        "compiled in 3 min 20 s",
    ]
    assert compile_for(clock, 0.5, cache, "another model") == ["compiling the step"]
    assert compile_for(clock, 0.5, cache)[0] == "compiling the step; it took 3 min 20 s last time"
    assert len(json.loads((tmp_path / "cache" / TIMES_FILE).read_text())) == 2


def test_what_fails_to_compile_leaves_no_time(clock, tmp_path):
    with pytest.raises(RuntimeError), compiling("the step", str(tmp_path), "key", lambda _: None):
        raise RuntimeError("out of memory")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', "null"])
def test_a_record_that_cannot_be_read_is_made_anew(clock, tmp_path, content):
    (tmp_path / TIMES_FILE).write_text(content)
    assert compile_for(clock, 5.0, str(tmp_path))[0] == "compiling the step"
    assert Times(str(tmp_path), "a model").last == 5.0


def test_other_processes_say_and_keep_nothing_and_so_does_a_run_without_a_cache(clock, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with compiling("the step", str(tmp_path), "key", None):
        clock[0] += 9.0
    assert compile_for(clock, 9.0, "") == ["compiling the step", "compiled in 9 s"]
    (tmp_path / "file").touch()
    assert compile_for(clock, 9.0, str(tmp_path / "file"))[0] == "compiling the step"  # no place to keep it
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and capsys.readouterr().out == ""


def test_a_terminal_shows_a_running_clock(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with compiling("the step", str(tmp_path), "key", print_once):
        pass
    assert "compiling the step" in sys.stdout.getvalue() and "0:00:00" in sys.stdout.getvalue()


@pytest.mark.parametrize(
    "setting, levels", [(None, [3, 1]), ("1", [3, 1]), ("2", [3, 2]), ("0", []), ("3", []), ("loud", [])]
)
def test_alarms_of_the_compiler_are_kept_back_unless_its_log_was_asked_for(setting, levels, monkeypatch):
    seen = []
    monkeypatch.setattr(module.utils, "absl_set_min_log_level", seen.append)
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    if setting is not None:
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", setting)
    with pytest.raises(ValueError), quiet_alarms():
        raise ValueError
    assert seen == levels
