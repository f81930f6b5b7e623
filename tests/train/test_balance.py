"""Router biases alone balance the experts on a stream that is anything but balanced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import V3, random_arrays, run_config

from opendeep_jax.config.schema import MTPConfig, OptimizerConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.faults.health import new_health
from opendeep_jax.models.parameters import model_definition
from opendeep_jax.train.objective import pretraining
from opendeep_jax.train.optimizer import make_optimizer
from opendeep_jax.train.state import TrainState
from opendeep_jax.train.step import make_train_step

ROWS, LENGTH, STEPS, MEASURED = 16, 32, 300, 50
MODEL = dataclasses.replace(
    V3,
    num_layers=2,
    moe=dataclasses.replace(V3.moe, balance_loss_weight=0.0, bias_update_speed=3e-3, num_groups=1, groups_per_token=1),
    mtp=MTPConfig(),
)


def skewed_batch(step: int) -> Batch:
    """Tokens that follow Zipf's law: the first is a quarter of the text."""
    random = np.random.default_rng(step)
    frequency = 1 / np.arange(1, V3.vocab_size) ** 1.2
    tokens = random.choice(np.arange(1, V3.vocab_size), (ROWS, LENGTH + 1), p=frequency / frequency.sum())
    tokens = tokens.astype(np.int32)
    whole = np.ones((ROWS, LENGTH), np.int32)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=whole > 0,
        segment_ids=whole,
        positions=np.cumsum(whole, axis=1) - 1,
    )


@pytest.fixture(scope="module")
def peaks():
    """A function (whether biases are updated) to the mean over the last steps of the largest load over the mean."""
    config = run_config(MODEL, LENGTH, optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=0))
    definition = model_definition(MODEL)
    optimizer = make_optimizer(config, definition.axes())
    step_function = jax.jit(make_train_step(config, definition, optimizer, pretraining(config)))

    def peaks(updated: bool) -> float:
        params, router_bias = random_arrays(definition)
        router_bias = jax.tree.map(jnp.zeros_like, router_bias)
        state, seen = TrainState(jnp.int32(0), params, optimizer.init(params), router_bias, new_health()), []
        for step in range(STEPS):
            if not updated:
                state = state._replace(router_bias=router_bias)
            state, output = step_function(state, skewed_batch(step))
            (load,) = output.loads.values()
            seen.append(load.max(axis=-1) / load.mean(axis=-1))
        return float(np.mean(seen[-MEASURED:]))

    return peaks


def test_loads_even_out_with_bias_updates_and_do_not_without(peaks):
    assert peaks(updated=True) < 1.5 < peaks(updated=False)
