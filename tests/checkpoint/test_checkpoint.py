"""Checkpoints hold the whole state, to the bit, on any mesh, and are never half there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GQA, random_arrays, run_config

from opendeep_jax.checkpoint.checkpoints import Checkpoints, load_model, remove_partial_saves
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config, save_run_config
from opendeep_jax.config.schema import CheckpointConfig, OptimizerConfig, ParallelConfig
from opendeep_jax.faults.health import new_health
from opendeep_jax.models.parameters import model_definition, split
from opendeep_jax.parallel.mesh import make_mesh
from opendeep_jax.train.optimizer import make_optimizer
from opendeep_jax.train.state import TrainState, state_shardings

CONFIG = run_config(GQA, optimizer=OptimizerConfig(kind="muon", first_moment_dtype="bfloat16", warmup_steps=0))
BONES = model_definition(GQA)


def state_on(devices: int, step: int = 3, seed: int = 0, **parallel) -> TrainState:
    """A state of random numbers on a mesh over the first devices."""
    params, router_bias = random_arrays(BONES, seed)
    optimizer = make_optimizer(CONFIG, BONES.axes())
    opt_state = jax.eval_shape(optimizer.init, params)
    random = np.random.default_rng(seed)
    opt_state = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape) * 9, x.dtype), opt_state)
    state = TrainState(jnp.int32(step), params, opt_state, router_bias, new_health())
    mesh = make_mesh(ParallelConfig(**parallel), jax.devices()[:devices])
    return jax.device_put(state, state_shardings(state, BONES, mesh))


def abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(directory, *states, keep=0):
    with Checkpoints(directory, CheckpointConfig(keep=keep)) as checkpoints:
        for state in states:
            checkpoints.save(state)


def test_a_restored_state_is_the_saved_one_to_the_bit(tmp_path):
    state = state_on(1)
    save(tmp_path, state)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored, _ = checkpoints.restore(abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert [x.dtype for x in jax.tree.leaves(restored)] == [x.dtype for x in jax.tree.leaves(state)]
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("there, here", [((1, {}), (8, {"fsdp": 8})), ((8, {"fsdp": 8}), (8, {"data": 2, "fsdp": 4}))])
def test_a_state_moves_to_another_mesh(there, here, tmp_path):
    state, wanted = (state_on(devices, **parallel) for devices, parallel in (there, here))
    save(tmp_path, state)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored, _ = checkpoints.restore(abstract(wanted))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert [x.sharding for x in jax.tree.leaves(restored)] == [x.sharding for x in jax.tree.leaves(wanted)]


def test_the_newest_state_is_restored_and_older_ones_are_dropped(tmp_path):
    save(tmp_path, *(state_on(1, step, seed=step) for step in (2, 4, 6)), keep=2)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.steps() == [4, 6]
        assert int(checkpoints.restore(abstract(state_on(1)))[0].step) == 6


def test_saving_a_step_again_keeps_the_first(tmp_path):
    save(tmp_path, state_on(1, 5, seed=1), state_on(1, 5, seed=2))
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored, _ = checkpoints.restore(abstract(state_on(1)))
    np.testing.assert_array_equal(restored.params["final_norm.scale"], random_arrays(BONES, 1)[0]["final_norm.scale"])


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.steps() == [] and checkpoints.restore(abstract(state_on(1))) is None


def test_half_written_checkpoints_are_never_read_and_can_be_removed(tmp_path):
    save(tmp_path, state_on(1, 2))
    half = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "model").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2]
    remove_partial_saves(tmp_path)
    assert not half.exists() and (tmp_path / "checkpoints" / "2").is_dir()


def test_the_model_of_a_run_is_loaded_with_its_configuration(tmp_path):
    save_run_config(CONFIG, CONFIG, tmp_path)
    save(tmp_path, state_on(1, 2, seed=2), state_on(1, 4, seed=4))
    model, config = load_model(tmp_path)
    assert config == CONFIG == load_run_config(tmp_path)
    assert model.config.context_length == CONFIG.data.sequence_length  # which it follows, also outside of its run
    for step, wanted in ((None, 4), (2, 2)):
        _, params, router_bias = split(load_model(tmp_path, step)[0])
        jax.tree.map(np.testing.assert_array_equal, (params, router_bias), random_arrays(BONES, wanted))


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(ConfigError, match="no run can be read there"):
        load_model(tmp_path)
    save_run_config(CONFIG, CONFIG, tmp_path)
    for step in (None, 3):
        with pytest.raises(ConfigError, match="has no checkpoint yet"):
            load_model(tmp_path, step)
    (tmp_path / "checkpoints").mkdir()  # as of a run before its first one
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        load_model(tmp_path)
    save(tmp_path, state_on(1, 2), state_on(1, 4))
    with pytest.raises(ConfigError, match="no checkpoint of step 3; there are: 2, 4"):
        load_model(tmp_path, 3)
