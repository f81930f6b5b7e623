"""What a step is compiled with: kernels that the platform has, and the options of its chip."""

import dataclasses

import pytest
from small_models import DENSE, run_config

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ExecutionConfig
from opendeep_jax.train.programs import check_implementations, compiler_options


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


def test_a_chips_options_come_with_those_of_the_run_for_its_platform():
    config = config_with()
    train = dataclasses.replace(config.train, compiler_options=("xla_tpu_one=1", "xla_gpu_two=2", "xla_three=a=b"))
    config = dataclasses.replace(config, train=train)
    v5p = compiler_options(config, "v5p", "tpu")
    assert v5p["xla_tpu_one"] == "1" and v5p["xla_three"] == "a=b" and "xla_gpu_two" not in v5p
    assert "xla_tpu_enable_sparse_core_collective_offload_all_gather" in v5p
    assert "xla_tpu_enable_async_ragged_all_to_all" in v5p
    assert compiler_options(config, "h100", "gpu") == {"xla_gpu_two": "2", "xla_three": "a=b"}
