"""Small states, their checkpoints, and harm done to files, for the tests of checkpoints."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from opendeep_jax.checkpoint.checkpoints import Checkpoints
from opendeep_jax.config.schema import CheckpointConfig
from opendeep_jax.faults.health import new_health
from opendeep_jax.train.state import TrainState


def state_at(step: int) -> TrainState:
    """A small state of numbers that no two steps share."""
    random = np.random.default_rng(step)
    params = {name: jnp.asarray(random.normal(size=(40, 9)), jnp.float32) for name in ("embed", "head.weight")}
    moments = ({"mu": jax.tree.map(lambda x: (x * 2).astype(jnp.bfloat16), params)}, jnp.int32(step))
    return TrainState(jnp.int32(step), params, moments, {"bias": jnp.ones(2) * step}, new_health(step))


def abstract() -> TrainState:
    """Shapes, dtypes and shardings of `state_at`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_at(0))


def save(workdir: Path, *steps, measures=None, **config) -> None:
    """Saves `state_at` each step; what is not in `config` keeps all."""
    with Checkpoints(workdir, CheckpointConfig(**{"keep": 0, **config})) as checkpoints:
        for step in steps:
            checkpoints.save(state_at(step), measure=(measures or {}).get(step))


def files_of(path: Path) -> list[Path]:
    """All files under a directory that are not empty."""
    return sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)


def payload(path: Path) -> list[Path]:
    """The files of a checkpoint's item that hold its arrays or its records.

    Among them are some that the writer has left and no reader needs, a few of those as big as any: harm that shall be
    noticed has to be done to all.
    """
    return [file for file in files_of(path) if file.parent.name == "d" or file.name == "metadata"]


def flip(file: Path, place: float = 0.5) -> None:
    """Flips a bit at a place, from 0 to 1, in a file."""
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x10
    file.write_bytes(data)
