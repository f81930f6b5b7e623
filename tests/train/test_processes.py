"""A job of several processes is one run: the same batches and losses, saved by some and gone on with by others."""

import json
import shutil
import subprocess

import numpy as np
import processes
import pytest

from opendeep_jax.checkpoint.checkpoints import Checkpoints
from opendeep_jax.checkpoint.origin import read_origin
from opendeep_jax.checkpoint.tools import differences
from opendeep_jax.record.events import read_events
from opendeep_jax.record.metrics import read_jsonl

STEPS = 10


@pytest.fixture(scope="module")
def recipe(text_corpus, tmp_path_factory):
    """A run of ten steps in rows that three devices don't divide, saved every four."""
    directory = tmp_path_factory.mktemp("processes")
    config = processes.tiny_config(text_corpus, directory / "data", steps=STEPS)
    return processes.write_recipe(config, directory / "recipe.py")


@pytest.fixture(scope="module")
def alone(recipe):
    """The work directory of the run in one process, on one device."""
    workdir = recipe.parent / "alone"
    assert processes.run(recipe, workdir, "--checkpoint.every=4")[0][0] == 0
    return workdir


@pytest.fixture(scope="module")
def stopped(recipe, alone):
    """The work directory of the run in two processes, one of which gets SIGTERM in step 3; and what each said."""
    workdir = recipe.parent / "two"
    return workdir, processes.run(recipe, workdir, "--faults.drill=sigterm@3:1", processes=2)


BATCHES = """
import json, os, sys
from opendeep_jax.config.load import load_recipe
from opendeep_jax.config.schema import ParallelConfig
from opendeep_jax.parallel.cluster import find_cluster
from opendeep_jax.parallel.distributed import primary_first, start
start(find_cluster(os.environ))
import jax
from opendeep_jax.data.pipeline import open_data
from opendeep_jax.parallel.mesh import global_rows, make_mesh, put_batch, rows_here
from opendeep_jax.checkpoint.digests import digests
config = load_recipe(sys.argv[1])
data = primary_first("data", lambda: open_data(config, progress=False))
found = []
for layout in (dict(fsdp=4), dict(data=2, fsdp=1, context=2), dict(fsdp=1, context=2, tensor=2)):
    mesh = make_mesh(ParallelConfig(**layout))
    for step in (0, 7):
        rows = global_rows(config, 8, mesh)
        batch = put_batch(data.batch(step, rows_here(mesh, rows)), mesh, rows)
        found.append(digests(batch))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_the_batches_of_several_processes_are_those_of_one_to_the_bit(count, recipe, alone):
    """Also where processes hold parts of the same rows."""
    whole, *parts = (
        json.loads(output.splitlines()[-1])
        for each in ((1, 4), (count, 4 // count))
        for output in processes.python(BATCHES, str(recipe), processes=each[0], devices=each[1])
    )
    assert len(whole) == 6 and parts == [whole] * count


def losses(workdir) -> np.ndarray:
    return np.array([line["loss"] for line in read_jsonl(workdir / "metrics.jsonl")])


def test_sigterm_to_one_process_stops_all_after_the_same_step_saved_and_asking_to_be_resumed(stopped):
    workdir, ended = stopped
    assert [status for status, _ in ended] == [75] * 2, [text[-2000:] for _, text in ended]
    with Checkpoints(workdir) as checkpoints:
        (step,) = checkpoints.steps()
    assert 3 <= step < STEPS and len(losses(workdir)) == step
    assert [event["step"] for event in read_events(workdir, "preempted")] == [step]


def test_two_processes_have_the_losses_of_one(stopped, alone):
    ours = losses(stopped[0])
    np.testing.assert_allclose(ours, losses(alone)[: len(ours)], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("count, devices", [(1, 1), (4, 1)])
def test_what_two_processes_saved_one_and_four_go_on_with(stopped, alone, recipe, count, devices, tmp_path):
    workdir = shutil.copytree(stopped[0], tmp_path / "resumed")
    ended = processes.run(recipe, workdir, processes=count, devices=devices)
    assert [status for status, _ in ended] == [0] * count, [text[-2000:] for _, text in ended]
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-6)
    summary, whole = (json.loads((place / "summary.json").read_text()) for place in (workdir, alone))
    for name in ("steps", "tokens", "parameters"):
        assert summary[name] == whole[name]
    assert summary["held_out_bits_per_byte"] == pytest.approx(whole["held_out_bits_per_byte"], rel=1e-6)
    assert len((workdir / "goodput.jsonl").read_text().splitlines()) > 1


@pytest.mark.slow
def test_a_job_on_more_devices_than_its_rows_divide_over_has_the_same_losses(alone, recipe, tmp_path):
    ended = processes.run(recipe, tmp_path / "three", processes=1, devices=3)
    assert ended[0][0] == 0, ended[0][1][-2000:]
    np.testing.assert_allclose(losses(tmp_path / "three"), losses(alone), rtol=1e-6)


@pytest.mark.slow
def test_the_launcher_goes_on_with_the_processes_that_are_left_and_the_same_losses(alone, recipe, tmp_path):
    flags = ["--faults.drill=sigkill@6:1", "--faults.peer_seconds=3", "--checkpoint.every=4"]
    status, said = processes.launch(recipe, tmp_path / "run", "--processes=2", "--min_processes=1", *flags)
    assert status == 0, said[-3000:]
    assert "process 1 was killed by SIGKILL" in said and "starting 1 again (1 of 100)" in said
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=1e-6)


@pytest.mark.slow
def test_a_branch_in_two_processes_begins_with_what_one_process_saved(alone, recipe, tmp_path):
    ended = processes.run(recipe, tmp_path / "branch", f"--from={alone}@8", "--checkpoint.keep=0", processes=2)
    assert [status for status, _ in ended] == [0, 0], [text[-2000:] for _, text in ended]
    assert read_origin(tmp_path / "branch")["parent"] == str(alone)
    np.testing.assert_allclose(losses(tmp_path / "branch"), losses(alone)[8:], rtol=1e-6)
    assert differences(*(run / "checkpoints" / "8" for run in (tmp_path / "branch", alone))) == []
    ended = processes.run(recipe, tmp_path / "other", f"--from={alone}@5", processes=2)
    assert [status for status, _ in ended] == [2, 2]
    assert sum("no checkpoint of step 5; there are: 8, 10." in text for _, text in ended) == 1


LOST = [("sigkill@3:1", 1)]
MORE_LOST = [("sigstop@3:1", 1), ("sigkill@3:0", 0), ("sigstop@3:0", 0)]
LOST += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_LOST]


@pytest.mark.parametrize("drill, missing", LOST)
def test_a_lost_peer_is_named_in_bounded_time(drill, missing, recipe, alone, tmp_path):
    started = processes.start(
        recipe, tmp_path / "run", f"--faults.drill={drill}", "--faults.peer_seconds=4", processes=2
    )
    survivor = started[1 if drill.endswith(":0") else 0]
    status = survivor.wait(240)
    lost = started[1 - started.index(survivor)]
    lost.kill()
    said = "".join(text for _, text in processes.finish(started))
    assert status in (75, -6), said[-3000:]  # JAX aborts where process 0 is gone
    assert f"process {missing} on " in said and "start the same command again" in said, said[-3000:]
    stacks = list((tmp_path / "run" / "stacks").iterdir())
    assert any("loop.py" in path.read_text() for path in stacks)


@pytest.mark.slow
@pytest.mark.parametrize("limited", ["0"])
def test_what_ends_one_process_for_good_ends_all_with_its_status(limited, recipe, alone, tmp_path, monkeypatch):
    """Here its files may not grow. The others would end with 75, or aborted by JAX, and a cluster would start again."""
    start = subprocess.Popen

    def with_a_limit(command, env, **more):
        if env["OPENDEEP_PROCESS_ID"] == limited:
            command = ["bash", "-c", 'ulimit -f 40; exec "$@"', "run", *command]
        return start(command, env=env, **more)

    monkeypatch.setattr(subprocess, "Popen", with_a_limit)
    ended = processes.run(recipe, tmp_path / "run", "--checkpoint.every=4", processes=2)
    assert [status for status, _ in ended] == [2, 2], [text[-2000:] for _, text in ended]
    other = ended[1 - int(limited)][1]
    assert f"process {limited} on " in other and "has ended with status 2" in other and "may be so large" in other


@pytest.mark.slow
def test_a_peer_that_does_not_come_is_named_and_asked_for_again(recipe, tmp_path):
    started = processes.start(recipe, tmp_path / "run", "--faults.join_seconds=1", processes=3)
    absent = started.pop(1)
    absent.kill()
    absent.communicate()
    for status, text in processes.finish(started):
        assert status == 75 and "process 1 of 3 (environment) did not come within 1 seconds" in text
        assert "Traceback" not in text and "coordination" not in text


@pytest.mark.slow
def test_what_process_0_refuses_all_refuse_and_it_is_said_once(recipe, tmp_path):
    (tmp_path / "run").write_text("a file")
    ended = processes.run(recipe, tmp_path / "run", processes=2)
    assert [status for status, _ in ended] == [2, 2]
    assert sum("cannot write there (it is a file)" in text for _, text in ended) == 1
