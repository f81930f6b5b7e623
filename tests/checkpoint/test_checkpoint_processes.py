"""Several processes save together, and any number of processes reads what they saved."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import opendeep_jax
from opendeep_jax.checkpoint.checkpoints import Checkpoints
from opendeep_jax.config.schema import CheckpointConfig

PROGRAM = """
import os, sys, json
import jax
address, count, index, workdir, local, action = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
if int(count) > 1:
    jax.distributed.initialize(address, int(count), int(index))
import jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from opendeep_jax.config.schema import CheckpointConfig
from opendeep_jax.checkpoint.checkpoints import Checkpoints
from opendeep_jax.checkpoint.local import common_steps
from opendeep_jax.checkpoint.digests import deviating_devices
from opendeep_jax.faults.health import new_health
from opendeep_jax.train.state import TrainState

mesh = Mesh(np.array(jax.devices()), ("fsdp",))
def place(array, spec):
    sharding = NamedSharding(mesh, spec)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
def state_at(step, wrong=0):
    weight = np.random.default_rng(step).normal(size=(12, 5)).astype(np.float32)
    whole = PartitionSpec()
    health = jax.tree.map(lambda x: place(x, whole), new_health())
    params = {"divided": place(weight, PartitionSpec("fsdp")), "whole": place(weight * 2 + wrong, whole)}
    moments = {"mu": place(weight * 3, PartitionSpec("fsdp"))}
    return TrainState(place(np.int32(step), whole), params, moments, {}, health)
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_at(0))
tiers = dict(local_directory=local, local_every=1) if local else {}
with Checkpoints(workdir, CheckpointConfig(keep=2, **tiers)) as checkpoints:
    notes, found = [], None
    if action == "save":
        for step in (2, 4, 6):
            checkpoints.save(state_at(step), measure=1.0 / step)
        for step in (7, 8, 9):
            if local:
                checkpoints.save(state_at(step), durable=False)
        checkpoints.wait()
    elif action == "common":
        found = common_steps(checkpoints.steps())
    else:
        state, notes = checkpoints.restore(abstract)
        found = int(state.step)
        for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(found))):
            for shard, wanted in zip(one.addressable_shards, other.addressable_shards):
                np.testing.assert_array_equal(shard.data, wanted.data)
        if action == "discard":
            checkpoints.discard_from(6)
        for step in (found + 1, found + 2) if action == "go on" else ():
            report = checkpoints.save(state_at(step), durable=False)
            notes += report.notes if report else ("not saved",)
        checkpoints.wait()
    deviating = deviating_devices(state_at(1, wrong=jax.process_index())) if jax.process_count() > 1 else []
    processes = [process for _, _, process in deviating]
    print(json.dumps({"steps": checkpoints.steps(), "found": found, "notes": notes, "deviating": processes}))
"""


def run(count: int, action: str, workdir, local="") -> list[dict]:
    """What each of `count` processes, of one device each, printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(opendeep_jax.__file__).parents[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(count), str(index), str(workdir), str(local), action],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        ends = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, ends[0][1][-3000:] + ends[-1][1][-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in ends]


def test_two_processes_save_and_one_and_two_read(tmp_path):
    saved = run(2, "save", tmp_path)
    assert [one["steps"] for one in saved] == [[4, 6]] * 2
    assert [one["deviating"] for one in saved] == [[0, 1]] * 2  # two copies differ: both are named, by both
    assert run(1, "restore", tmp_path)[0]["found"] == 6
    both = run(2, "discard", tmp_path)
    assert [(one["found"], one["steps"]) for one in both] == [(6, [4])] * 2


@pytest.mark.slow
def test_each_process_keeps_its_part_in_the_local_tier(tmp_path):
    saved = run(2, "save", tmp_path / "run", tmp_path / "fast")
    assert [one["steps"] for one in saved] == [[4, 6, 8, 9]] * 2
    assert [one["found"] for one in run(2, "restore", tmp_path / "run", tmp_path / "fast")] == [9, 9]
    (other,) = (tmp_path / "fast").glob("*/process_1/checkpoints/9/shards")
    (other / "manifest.ocdbt").unlink()
    found = run(2, "restore", tmp_path / "run", tmp_path / "fast")
    assert [one["found"] for one in found] == [8, 8] and all("step 9" in one["notes"][0] for one in found)
    (alone,) = run(1, "restore", tmp_path / "run", tmp_path / "fast")  # another number of processes
    assert alone["found"] == 6 and "other devices or processes" in alone["notes"][0]


@pytest.mark.slow
def test_local_checkpoints_that_only_one_process_has_are_in_nobodys_way(tmp_path):
    """The others would wait for the save that it leaves out, or its own newer ones be kept in place of the next."""
    assert run(1, "save", tmp_path / "run", tmp_path / "fast")[0]["steps"] == [4, 6, 9]
    both = run(2, "go on", tmp_path / "run", tmp_path / "fast")
    assert [(one["found"], one["steps"], one["notes"]) for one in both] == [(6, [4, 6, 7, 8], [])] * 2


@pytest.mark.slow
def test_one_process_without_a_local_disk_leaves_it_out_for_all(tmp_path):
    run(2, "save", tmp_path / "run", tmp_path / "fast")
    (other,) = (tmp_path / "fast").glob("*/process_1")
    shutil.rmtree(other)
    other.write_text("")
    both = run(2, "go on", tmp_path / "run", tmp_path / "fast")
    assert [one["found"] for one in both] == [6, 6]
    assert all(one["notes"] == ["not saved"] * 2 for one in both)


@pytest.mark.slow
def test_all_checkpoints_of_a_long_run_are_seen_by_all(tmp_path):
    """One far back, before many that are newer, is what a rollback needs."""
    for step in range(1, 13):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    both = run(2, "common", tmp_path)
    assert [one["found"] for one in both] == [list(range(1, 13))] * 2


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_has_the_digests_of_one(tmp_path):
    run(2, "save", tmp_path / "two")
    run(1, "save", tmp_path / "one")
    records = [
        json.loads((tmp_path / name / "checkpoints" / "6" / "digests" / "metadata").read_text())["arrays"]
        for name in ("one", "two")
    ]
    assert records[0] == records[1] and len(records[0]) == 9
    with Checkpoints(tmp_path / "two", CheckpointConfig()) as checkpoints:
        assert checkpoints.steps() == [4, 6]
    assert np.all([len(entry["digest"]) == 16 for entry in records[0].values()])
