"""Compile time of the training step for 8 and for 61 layers of the same block, as one JSON line.

    python benchmarks/compile_depth.py

Layers of one kind are stacked and scanned, so the two should differ by little; nothing is trained.
"""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
from train_cpu import config

from opendeep_jax.parallel.mesh import make_mesh
from opendeep_jax.train.setup import assemble


def seconds_to_compile(layers: int) -> float:
    """Lowering and compiling one training step."""
    run = config()
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=layers, hidden_size=64))
    mesh = make_mesh(run.parallel)
    with jax.set_mesh(mesh):
        programs = assemble(run, mesh).programs
        begun = time.perf_counter()
        programs.of(run.train.batch_size, run.data.sequence_length)
        return time.perf_counter() - begun


if __name__ == "__main__":
    jnp.zeros(1).block_until_ready()
    seconds = {layers: seconds_to_compile(layers) for layers in (8, 61)}
    print(json.dumps({"seconds": seconds, "ratio": seconds[61] / seconds[8]}))
