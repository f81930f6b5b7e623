"""A training step over pipeline stages has the loss, gradients and expert loads of the step on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import DENSE, V3, packed_batch, random_arrays, run_config

from opendeep_jax.config.schema import OptimizerConfig, ParallelConfig, TrainConfig
from opendeep_jax.models.parameters import skeleton
from opendeep_jax.parallel.mesh import make_mesh, put_batch
from opendeep_jax.train.health import new_health
from opendeep_jax.train.state import TrainState, state_shardings
from opendeep_jax.train.step import make_train_step

BATCH = packed_batch(rows=8, length=16, seed=5)


def run_step(model, devices: int, micros: int, **parallel):
    """One step from random parameters whose update keeps the gradients as its state: (gradients, metrics, state)."""
    config = run_config(
        model,
        optimizer=OptimizerConfig(warmup_steps=0, clip_norm=0.0),
        train=TrainConfig(steps=10, batch_size=8, loss_chunk=24, accumulation_steps=micros),
        parallel=ParallelConfig(**{"fsdp": 1} | parallel),
    )
    bones, mesh = skeleton(model), make_mesh(config.parallel, jax.devices()[:devices])
    params, router_bias = random_arrays(bones)
    zeros = jax.tree.map(jnp.zeros_like, params)
    rule = optax.GradientTransformation(lambda params: zeros, lambda grads, state, params: (zeros, grads))
    state = TrainState(jnp.int32(0), params, rule.init(params), router_bias, new_health())
    with jax.set_mesh(mesh):
        state = jax.device_put(state, state_shardings(state, bones, mesh))
        state, metrics = jax.jit(make_train_step(config, bones, rule))(state, put_batch(BATCH, mesh))
    return state.opt_state, metrics, state


CASES = {
    # One dense layer and five of experts, which do not fill four chunks evenly.
    "V3": (dataclasses.replace(V3, num_layers=6), 4, 2, {"stage": 2, "stage_chunks": 2, "expert": 2}),
    "dense": (dataclasses.replace(DENSE, num_layers=4), 8, 8, {"stage": 4, "tensor": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pipelined_step_is_the_step_on_one_device(case):
    model, devices, micros, parallel = CASES[case]
    wanted, metrics, state = run_step(model, 1, 1)
    grads, pipelined, pipelined_state = run_step(model, devices, micros, **parallel)
    assert pipelined.keys() == metrics.keys()
    for name in metrics.keys() & {"loss", "lm_loss", "mtp_loss", "balance_loss", "grad_norm"}:
        np.testing.assert_allclose(pipelined[name], metrics[name], rtol=3e-6, err_msg=name)
    for name, load in metrics["load"].items():
        np.testing.assert_array_equal(pipelined["load"][name], load, err_msg=name)
    for name, bias in state.router_bias.items():
        np.testing.assert_array_equal(pipelined_state.router_bias[name], bias, err_msg=name)
    for name, right in wanted.items():
        np.testing.assert_allclose(grads[name], right, rtol=0, atol=1e-5 * np.max(np.abs(right)), err_msg=name)
