"""Models read onto a mesh: every device its own part, and all together what one device reads."""

import tracemalloc
from dataclasses import replace

import jax
import numpy as np
import pytest
from hf_directories import ALL, arrays_of, assert_same_bits, family, name_of, random_model

from opendeep_jax.config.schema import ParallelConfig
from opendeep_jax.interop import config_from_hf, load_hf, save_hf
from opendeep_jax.models.parameters import split
from opendeep_jax.parallel.axes import partition_spec
from opendeep_jax.parallel.mesh import make_mesh

LAYOUTS = [
    ParallelConfig(fsdp=2, tensor=2, data=2),
    ParallelConfig(fsdp=8),
    ParallelConfig(fsdp=1, expert=5),
    ParallelConfig(stage=2, fsdp=2, tensor=2),
]


def mesh_of(parallel: ParallelConfig):
    count = parallel.fsdp * parallel.tensor * parallel.data * parallel.expert * parallel.stage
    return make_mesh(parallel, jax.devices()[:count])


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_a_model_on_a_mesh_is_the_model_on_one_device(case):
    mesh = mesh_of(LAYOUTS[0])
    assert_same_bits(arrays_of(load_hf(case, mesh=mesh)), arrays_of(load_hf(case)))


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", ["gpt_oss", "gpt_oss_mxfp4", "qwen3_moe", "moonlight"])
def test_any_mesh_gives_the_same_model_laid_as_training_lays_it(case, parallel):
    mesh = mesh_of(parallel)
    model = load_hf(family(case), mesh=mesh)
    assert_same_bits(arrays_of(model), arrays_of(load_hf(family(case))))
    frame, params, router_bias = split(model)
    for name, array in (params | router_bias).items():
        assert array.sharding.spec == partition_spec(frame.axes()[name], array.shape, mesh, at_rest=True), name


def test_something_is_really_divided():
    model = load_hf(family("gpt_oss"), mesh=mesh_of(LAYOUTS[2]))
    gate = model.moe_layers.moe.gate[...]
    assert {shard.data.shape[1] for shard in gate.addressable_shards} == {gate.shape[1] // 5}


def test_a_model_on_a_mesh_is_written_as_it_was_read(tmp_path):
    save_hf(load_hf(family("gpt_oss"), mesh=mesh_of(LAYOUTS[2])), tmp_path / "saved")
    assert_same_bits(arrays_of(load_hf(tmp_path / "saved")), arrays_of(load_hf(family("gpt_oss"))))


def test_reading_needs_no_second_copy_of_the_model(tmp_path):
    # Two arrays of 24 MB and tiny ones: a copy of one would show.
    config = replace(config_from_hf(family("llama3")), vocab_size=200_000)
    save_hf(random_model(config), tmp_path / "model")
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    tracemalloc.start()
    model = load_hf(tmp_path / "model")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < peak < 1.3 * size
    assert np.isfinite(np.asarray(model.final_norm.scale[...])).all()
