"""What a step is compiled with: kernels that the platform has, and the options of its chip."""

import dataclasses
import threading
import time

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_models import DENSE, run_config

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ExecutionConfig
from opendeep_jax.parallel.mesh import make_mesh
from opendeep_jax.train import setup
from opendeep_jax.train.setup import assemble, check_implementations, compiler_options
from opendeep_jax.train.state import bytes_on_each_device


def config_with(**execution):
    return run_config(dataclasses.replace(DENSE, execution=ExecutionConfig(**execution)))


@pytest.mark.parametrize(
    "execution, words",
    [
        ({"attention": "mosaic"}, ["model.execution.attention = 'mosaic'", "runs on tpu", "for cpu", "blocks"]),
        ({"grouped_matmul": "trition"}, ["model.execution.grouped_matmul = 'trition'", "must be one of", "triton"]),
        ({"cross_entropy": "mosaic_tpu"}, ["model.execution.cross_entropy", "chunks"]),
    ],
)
def test_an_implementation_that_is_not_here_is_refused_with_those_that_are(execution, words):
    with pytest.raises(ConfigError) as error:
        check_implementations(config_with(**execution))
    assert [word for word in words if word not in str(error.value)] == []


def test_implementations_that_are_here_are_taken():
    check_implementations(config_with(attention="reference", grouped_matmul="blocks", cross_entropy="chunks"))


def config_and_state(**train):
    """A run on 8 devices, and the shapes of its state."""
    config = config_with()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
    return config, assemble(config, make_mesh(config.parallel)).template


def test_a_tpus_scheduler_gets_the_working_memory_beside_each_devices_state_and_gradients():
    name = "xla_tpu_scheduler_percent_shared_memory_limit"
    config, state = config_and_state(working_memory_gb=41.12)
    weights = sum(x.size for x in state.params.values()) * 4 / 8
    assert weights <= bytes_on_each_device(state.params) < 1.2 * weights  # the smallest are whole everywhere
    assert compiler_options(config, "v5p", "tpu", state)[name] == "40"
    large = state._replace(params={"w": jax.ShapeDtypeStruct((8, 10**10), "int8", sharding=some_sharding(state))})
    assert compiler_options(config, "v5p", "tpu", large)[name] == "59"  # 10 GB of weights, 10 GB of gradients
    assert name not in compiler_options(config, "h100", "gpu", state)
    assert name not in compiler_options(config_with(), "v5p", "tpu", state)


def some_sharding(state):
    """How the first axis of something of the state is divided over all devices."""
    return NamedSharding(jax.tree.leaves(state)[0].sharding.mesh, PartitionSpec("fsdp"))


def test_a_chips_options_come_with_those_of_the_run_for_its_platform():
    config, state = config_and_state(compiler_options=("xla_tpu_one=1", "xla_gpu_two=2", "xla_three=a=b"))
    v5p = compiler_options(config, "v5p", "tpu", state)
    assert v5p["xla_tpu_one"] == "1" and v5p["xla_three"] == "a=b" and "xla_gpu_two" not in v5p
    assert "xla_tpu_enable_sparse_core_collective_offload_all_gather" in v5p
    assert "xla_tpu_enable_async_ragged_all_to_all" in v5p
    assert compiler_options(config, "h100", "gpu", state) == {"xla_gpu_two": "2", "xla_three": "a=b"}


def test_no_process_begins_its_first_step_before_all_have_compiled_it(monkeypatch):
    here = {"0": ""}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(setup, "get_values", lambda name: dict(here))
    late = threading.Timer(0.4, lambda: here.update({"1": ""}))
    begun = time.monotonic()
    late.start()
    setup._barrier("compiled/1")
    assert time.monotonic() - begun >= 0.4
