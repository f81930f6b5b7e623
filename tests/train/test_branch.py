"""A branch begins with another run's checkpoint, weights and moments, and goes on with settings of its own."""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import tiny_config

from opendeep_jax.cli.train import check_start
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config
from opendeep_jax.config.overrides import resolve
from opendeep_jax.config.schema import CheckpointConfig, ParallelConfig
from opendeep_jax.parallel.mesh import make_mesh
from opendeep_jax.train import branch, loop
from opendeep_jax.train.branch import STAGED, begin_branch, content_digest
from opendeep_jax.train.checkpoint_files import read_record, steps_in
from opendeep_jax.train.checkpoint_tools import differences
from opendeep_jax.train.metrics import read_jsonl
from opendeep_jax.train.origin import read_origin, write_origin


@pytest.fixture(scope="module")
def trunk(text_corpus, tmp_path_factory) -> Path:
    """The work directory of a finished run of 8 steps on one device, every other of which is saved."""
    directory = tmp_path_factory.mktemp("branches")
    config = tiny_config(text_corpus, directory / "data", steps=8)
    model = dataclasses.replace(config.model, num_layers=2, num_dense_layers=1, hidden_size=16)
    config = dataclasses.replace(
        config,
        model=model,
        parallel=ParallelConfig(fsdp=1),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=2),
        checkpoint=CheckpointConfig(every=2, keep=0),
    )
    with devices(1):
        loop.train(config, directory / "trunk")
    return directory / "trunk"


@contextlib.contextmanager
def devices(count: int):
    """Runs inside have so many devices."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (loop, branch):
            patch.setattr(module, "make_mesh", lambda parallel: make_mesh(parallel, jax.devices()[:count]))
        yield


@pytest.fixture(autouse=True)
def one_device():
    with devices(1):
        yield


def start(*arguments: str) -> tuple:
    """What `opendeep train` does before it trains; returns configuration and launch."""
    config, launch = resolve(arguments, trains=True)
    check_start(config, launch)
    if launch.parent:
        begin_branch(config, launch.recipe, launch.workdir, launch.parent)
    return config, launch


def train(*arguments: str) -> Path:
    config, launch = start(*arguments)
    loop.train(config, launch.workdir, launch.recipe)
    return Path(launch.workdir)


def test_a_branch_with_no_other_setting_is_its_parent_going_on_to_the_bit(trunk, tmp_path):
    workdir = train(f"--from={trunk}@4", f"--workdir={tmp_path / 'branch'}")
    assert differences(workdir / "checkpoints" / "8", trunk / "checkpoints" / "8") == []
    assert steps_in(workdir / "checkpoints") == [4, 6, 8]
