"""Sweeps that are run: with a stand-in for `opendeep train` that takes a fraction of a second, and once for real."""

import collections
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_models import run_config
from xla_flags import xla_flags

import opendeep_jax
from opendeep_jax.cli.main import main
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.exits import INTERRUPTED, OK, RESUME, STOPPED
from opendeep_jax.config.load import load_recipe
from opendeep_jax.jobs.child import gpus_of
from opendeep_jax.jobs.sweep import local as sweep_local
from opendeep_jax.jobs.sweep import run as sweep_module
from opendeep_jax.jobs.sweep.local import locked
from opendeep_jax.jobs.sweep.plan import plan_sweep, read_sweep
from opendeep_jax.jobs.sweep.progress import SweepProgress
from opendeep_jax.jobs.sweep.results import read_result
from opendeep_jax.jobs.sweep.run import run_sweep
from opendeep_jax.record.files import METRICS, last_record

ROOT = Path(opendeep_jax.__file__).parent.parent
GRID = {"optimizer.learning_rate": "1e-4,1e-3", "model.moe.experts_per_token": "1,2"}

# As `opendeep train` does, it goes on from the last step that is saved, and leaves a finished run alone.
STAND_IN = """
import json, os, signal, sys, time
log, workdir, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
def say(*words):
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (" ".join(map(str, words)) + chr(10)).encode())
    os.close(descriptor)
def write(name, text):
    with open(os.path.join(workdir, "." + name), "w") as file:
        file.write(text)
    os.replace(file.name, os.path.join(workdir, name))
name, told = os.path.basename(workdir), []
signal.signal(signal.SIGTERM, lambda *_: told.append(75))
signal.signal(signal.SIGINT, lambda *_: told.append(130))
try:
    step = int(open(os.path.join(workdir, "checkpoint")).read())
except FileNotFoundError:
    step = 0
say("start", name, step, os.getpid())
write("config.json", "{}")
for step in range(step + 1, 11):
    time.sleep(seconds)
    write("checkpoint", str(step))
    if told:
        sys.exit(told[0])
bits = 2 + len(name) % 7 / 10
write("summary.json", json.dumps({"steps": 10, "final_loss": bits, "held_out_bits_per_byte": bits}))
say("end", name)
"""
DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from opendeep_jax.config.load import load_recipe
from opendeep_jax.config.overrides import apply
from opendeep_jax.jobs.sweep.run import run_sweep
from opendeep_jax.jobs.sweep.plan import plan_sweep
directory, stand_in, log, seconds = sys.argv[2:]
base = apply(load_recipe("quickstart"), ["--train.steps=10", "--optimizer.warmup_steps=1"])
settings = {"optimizer.learning_rate": "1e-4,1e-3", "model.moe.experts_per_token": "1,2"}
command = lambda run: [sys.executable, "-S", "-E", stand_in, log, str(run.workdir), seconds]
status = run_sweep(plan_sweep(directory, base, settings, seeds=3), parallel=3, command=command)
assert "jax" not in sys.modules, "JAX takes seconds to load, and memory that the runs need"
sys.exit(status)
"""


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return path


def _drive(tmp_path, stand_in, seconds=0.03):
    """A sweep of 12 runs of a third of a second each, three at a time, in a process of its own."""
    log = tmp_path / "log"
    arguments = [str(ROOT), str(tmp_path / "sweep"), str(stand_in), str(log), str(seconds)]
    output = open(tmp_path / "output", "ab")
    with output:
        return subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], stdout=output, stderr=output)


def _said(tmp_path):
    log = tmp_path / "log"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def _wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _is_midway(directory):
    """Whether a run has saved some of its steps and has most of them before it."""
    saved = (path for path in directory.glob("runs/*/checkpoint") if not (path.parent / "summary.json").exists())
    return any(1 <= int(path.read_text()) <= 5 for path in saved)


@pytest.mark.slow
def test_a_sweep_of_12_runs_that_is_killed_twice_has_12_results_and_did_no_run_twice(tmp_path, stand_in):
    dice = random.Random()
    for kill in (1, 2):
        process = _drive(tmp_path, stand_in)
        _wait_for(lambda: sum(word[0] == "end" for word in _said(tmp_path)) >= 3 * kill)  # noqa: B023
        if kill == 1:
            time.sleep(dice.uniform(0, 0.4))
        else:
            _wait_for(lambda: _is_midway(tmp_path / "sweep"))
        process.kill()
        process.wait()
        begun = [int(words[3]) for words in _said(tmp_path) if words[0] == "start"]
        _wait_for(lambda: not any(map(_is_alive, begun)), 5.0)  # noqa: B023
    assert _drive(tmp_path, stand_in).wait() == OK, (tmp_path / "output").read_text()

    said = _said(tmp_path)
    starts, ends = collections.defaultdict(list), collections.Counter()
    for kind, name, *more in said:
        if kind == "end":
            ends[name] += 1
        else:
            assert ends[name] == 0, f"{name} was started again after its end"
            starts[name].append(int(more[0]))
    assert len(starts) == 12 and set(ends) <= set(starts) and set(ends.values()) == {1}
    for steps in starts.values():
        assert steps == sorted(steps) and steps[0] == 0
    assert sum(map(len, starts.values())) <= 12 + 2 * 3  # what was under way, and nothing else
    assert any(steps[-1] > 0 for steps in starts.values()), "no run had to go on: kill later"
    sweep, runs = read_sweep(tmp_path / "sweep")
    results = [read_result(run) for run in runs]
    assert len(results) == 12 and {result.state for result in results} == {"finished"}
    assert (tmp_path / "sweep" / "best.py").exists()
    assert len((tmp_path / "sweep" / "results.csv").read_text().splitlines()) == 13


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, RESUME), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_is_handed_to_the_runs_which_save(tmp_path, stand_in, number, status):
    process = _drive(tmp_path, stand_in, seconds=0.1)
    _wait_for(lambda: len(_said(tmp_path)) >= 3)
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(20) == status
    saved = [int(path.read_text()) for path in (tmp_path / "sweep" / "runs").glob("*/checkpoint")]
    assert len(saved) == 3 and all(0 < step < 10 for step in saved)
    assert not list((tmp_path / "sweep" / "runs").glob("*.failed"))


def _sweep(tmp_path, settings=None, **more):
    return plan_sweep(tmp_path / "sweep", run_config(), settings or {"optimizer.learning_rate": "1e-4,1e-3"}, **more)


def _python(code):
    return lambda run: [sys.executable, "-S", "-E", "-c", code, str(run.workdir)]


FINISH = """
import json, sys
bits = 2 + ("0.001" in sys.argv[1])
json.dump({"steps": 10, "final_loss": bits, "held_out_bits_per_byte": bits}, open(sys.argv[1] + "/summary.json", "w"))
"""


def test_a_run_that_fails_is_shown_with_its_last_words_and_the_others_go_on(tmp_path, capsys):
    fail = "if '0.0001' in sys.argv[1]: sys.exit('The text is gone.')"
    assert run_sweep(_sweep(tmp_path), command=_python(f"import sys\n{fail}\n{FINISH}")) == STOPPED
    said = capsys.readouterr().out
    assert re.search(r"failed +learning_rate=0.0001,seed=0 after .*: exit status 1", said)
    assert "The text is gone." in (tmp_path / "sweep" / "results.md").read_text()
    # What the user has mended is run again; what has its result is not.
    again = "if '0.001' in sys.argv[1]: sys.exit('started twice')"
    assert run_sweep(_sweep(tmp_path), command=_python(f"import sys\n{again}\n{FINISH}")) == OK
    assert not list((tmp_path / "sweep" / "runs").glob("*.failed"))


def test_a_run_that_asks_to_be_started_again_is_but_not_for_ever(tmp_path, monkeypatch):
    count = "path = sys.argv[1] + '/starts'; open(path, 'a').write('x'); n = len(open(path).read())"
    code = f"import sys\n{count}\nif n < 4 or '0.001' in sys.argv[1]: sys.exit(75)\n{FINISH}"
    monkeypatch.setattr(sweep_local, "RESTARTS", 5)
    assert run_sweep(_sweep(tmp_path), parallel=2, command=_python(code)) == STOPPED
    runs = tmp_path / "sweep" / "runs"
    assert (runs / "learning_rate=0.0001,seed=0" / "starts").read_text() == "xxxx"
    assert (runs / "learning_rate=0.001,seed=0" / "starts").read_text() == "xxxxxx"
    assert (runs / "learning_rate=0.001,seed=0.failed").read_text().startswith("exit status 75")


def test_a_run_that_ends_well_without_a_result_or_is_killed_has_failed(tmp_path):
    code = "import os, sys\nif '0.001' in sys.argv[1]: os.kill(os.getpid(), 9)"
    assert run_sweep(_sweep(tmp_path), command=_python(code)) == STOPPED
    reasons = [path.read_text() for path in sorted((tmp_path / "sweep" / "runs").glob("*.failed"))]
    assert reasons[0].startswith("ended without a result") and reasons[1].startswith("killed by SIGKILL")


def test_runs_at_once_share_the_cores_evenly(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core cannot be divided")
    code = f"import os, sys\nprint(sorted(os.sched_getaffinity(0)))\n{FINISH}"
    run_sweep(_sweep(tmp_path), parallel=2, command=_python(code))
    used = [json.loads(path.read_text()) for path in (tmp_path / "sweep" / "runs").glob("*.log")]
    assert {len(share) for share in used} <= {len(cores) // 2, -(-len(cores) // 2)}
    assert sorted(os.sched_getaffinity(0)) == cores


def test_gpus_are_shared_where_there_are_enough(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    assert [gpus_of(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["3,5", "6,7"]
    assert gpus_of(0, 5) == {}  # all of them for every run


def test_two_sweeps_in_one_directory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_module, "locked", lambda directory, what, seconds: locked(directory, what, 0.0))
    with locked(tmp_path / "sweep", "sweeps"):
        with pytest.raises(ConfigError, match="another process sweeps there"):
            run_sweep(_sweep(tmp_path), command=_python(FINISH))


def test_a_wrong_value_starts_and_writes_nothing(tmp_path):
    with pytest.raises(ConfigError, match="1 of 2 combinations"):
        run_sweep(_sweep(tmp_path, {"model.moe.experts_per_token": "1,99"}), command=_python(FINISH))
    with pytest.raises(ConfigError, match="--parallel=0"):
        run_sweep(_sweep(tmp_path), parallel=0, command=_python(FINISH))
    assert not (tmp_path / "sweep").exists()


def test_optuna_learns_from_the_results_and_goes_on_where_it_was(tmp_path):
    settings = {"optimizer.learning_rate": "1e-4:1e-1:log", "optimizer.kind": "adamw,muon"}
    code = """
import json, math, re, sys
rate = float(re.search("learning_rate=([^,]*),", sys.argv[1])[1])
bits = abs(math.log10(rate) + 2) + ("muon" in sys.argv[1])
json.dump({"steps": 10, "final_loss": bits, "held_out_bits_per_byte": bits}, open(sys.argv[1] + "/summary.json", "w"))
"""
    halves = plan_sweep(tmp_path / "halves", run_config(), settings, "optuna", trials=8)
    assert run_sweep(halves, parallel=4, command=_python(code)) == OK
    for directory in ("halves", "whole"):
        whole = plan_sweep(tmp_path / directory, run_config(), settings, "optuna", trials=20)
        assert run_sweep(whole, parallel=4, command=_python(code)) == OK
    names = [[run.name for run in read_sweep(tmp_path / directory)[1]] for directory in ("halves", "whole")]
    assert names[0] == names[1] and len(set(names[0])) == 20
    assert sum("adamw" in name for name in names[0][12:]) > 5  # of 8


def test_optuna_ends_when_everything_was_tried_and_checks_every_value_first(tmp_path, capsys):
    sweep = _sweep(tmp_path, method="optuna", trials=5)
    assert run_sweep(sweep, command=_python(FINISH)) == OK
    assert "the search ends after 2 combinations" in capsys.readouterr().out
    wrong = plan_sweep(tmp_path / "wrong", run_config(), {"optimizer.kind": "adamw,sgd"}, "optuna", trials=5)
    with pytest.raises(ConfigError, match="sgd"):
        run_sweep(wrong, command=_python(FINISH))
    assert not (tmp_path / "wrong").exists()


def test_runs_for_a_cluster_are_handed_over_once_and_collected_later(tmp_path, monkeypatch, capsys):
    calls = []

    def launch(command, **_):
        calls.append(command)
        refused = len(calls) == 2
        return subprocess.CompletedProcess(command, 2 if refused else 0, "no such queue" if refused else "job 17")

    monkeypatch.setattr(sweep_module.subprocess, "run", launch)
    with pytest.raises(ConfigError, match="Did you mean slurm"):
        run_sweep(_sweep(tmp_path), target="slrum")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="sbatch is not installed here"):
        run_sweep(_sweep(tmp_path), target="slurm")
    assert not (tmp_path / "sweep").exists()
    monkeypatch.setattr(sweep_module, "check_engine", lambda name: None)
    with pytest.raises(ConfigError, match="could not be handed over:\nno such queue"):
        run_sweep(_sweep(tmp_path), target="slurm")
    assert run_sweep(_sweep(tmp_path), target="slurm") == OK
    names = [next(word for word in call if word.startswith("--workdir")).rpartition("/")[2] for call in calls]
    assert names == ["learning_rate=0.0001,seed=0", "learning_rate=0.001,seed=0", "learning_rate=0.001,seed=0"]
    assert calls[0][3:6] == ["launch", "--target=slurm", f"--config={tmp_path / 'sweep' / 'recipe.py'}"]
    assert "2 of 2 runs have no result yet" in capsys.readouterr().out
    for run in read_sweep(tmp_path / "sweep")[1]:
        run.workdir.mkdir()
        subprocess.check_call(_python(FINISH)(run))
    assert main(["sweep", f"--workdir={tmp_path / 'sweep'}", "--collect"]) == OK
    assert "Best: learning_rate=0.0001" in capsys.readouterr().out and len(calls) == 3


def test_progress_survives_half_a_line_and_a_stream_that_is_gone(tmp_path):
    (run,) = _sweep(tmp_path, {"optimizer.learning_rate": "1e-3"}).runs_of(0, {"optimizer.learning_rate": "1e-3"})
    assert last_record(run.workdir / METRICS) is None
    run.workdir.mkdir(parents=True)
    (run.workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert last_record(run.workdir / METRICS) == {"step": 1, "loss": 3.0}
    stream = io.StringIO()
    stream.close()
    with SweepProgress([run], stream) as progress:
        progress.run_started(run)
        progress.show([run])
        progress.run_ended(run)


@pytest.mark.slow
def test_a_real_sweep_that_is_killed_trains_every_run_once(tmp_path, text_corpus, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # One device, and what one run has compiled serves the other seed.
    monkeypatch.setenv("XLA_FLAGS", xla_flags(devices=1))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    recipe = tmp_path / "tiny.py"
    recipe.write_text(
        "from opendeep_jax.config.schema import *\n"
        "def get_config():\n"
        "    return RunConfig(\n"
        "        model=ModelConfig(vocab_size=262, hidden_size=16, num_layers=1, mlp_size=32, dtype='float32',\n"
        "            attention=AttentionConfig(kind='gqa', num_heads=2, num_kv_heads=1, head_dim=8)),\n"
        f"        data=DataConfig(sources=(SourceConfig('text', {str(text_corpus)!r}),), tokenizer='bytes',\n"
        f"            directory={str(tmp_path / 'data')!r}, sequence_length=32, held_out_fraction=0.2),\n"
        "        optimizer=OptimizerConfig(warmup_steps=1),\n"
        "        train=TrainConfig(steps=12, batch_size=8, log_every=1, compilation_cache=''),\n"
        "        evaluation=EvaluationConfig(final_batches=1), checkpoint=CheckpointConfig(every=2))\n"
    )
    directory = tmp_path / "sweep"
    command = [sys.executable, "-m", "opendeep_jax", "sweep", f"--config={recipe}", f"--workdir={directory}",
               "--sweep.optimizer.learning_rate=1e-4,1e-2", "--seeds=2", "--parallel=2"]  # fmt: skip
    with open(tmp_path / "output", "ab") as output:
        first = subprocess.Popen(command, stdout=output, stderr=output)
        _wait_for(lambda: any(directory.glob("runs/*/metrics.jsonl")) or first.poll() is not None, 240)
        time.sleep(random.uniform(0, 1))
        first.kill()
        first.wait()
        done = {path.parent.name: path.stat().st_mtime_ns for path in directory.glob("runs/*/summary.json")}
        status = subprocess.run(command, stdout=output, stderr=output).returncode
    assert status == OK, (tmp_path / "output").read_text()
    sweep, runs = read_sweep(directory)
    assert [read_result(run).state for run in runs] == ["finished"] * 4
    for run in runs:
        lines = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 13))
        if run.name in done:
            assert (run.workdir / "summary.json").stat().st_mtime_ns == done[run.name]
    assert load_recipe(str(directory / "best.py")).optimizer.learning_rate == 1e-2
