"""The generator's programs compile for real chips that are not there, with the kernels meant for them."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from opendeep_jax.config.rules import ROW_AXES
from opendeep_jax.config.schema import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, ParallelConfig
from opendeep_jax.generation.cache import cache_spec, page_shapes
from opendeep_jax.generation.forward import Rows
from opendeep_jax.generation.programs import programs_of
from opendeep_jax.generation.weights import Weights
from opendeep_jax.parallel.mesh import make_mesh
from opendeep_jax.plan.topology import compile_only_devices, parse_topology

MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=512,
    num_layers=2,
    num_dense_layers=1,
    mlp_size=1024,
    context_length=4096,
    attention=AttentionConfig(
        num_heads=8, q_lora_rank=256, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
    moe=MoEConfig(num_experts=16, experts_per_token=4, expert_size=256),
    mtp=MTPConfig(depth=1),
)
PAGES, PAGE, SLOTS = 64, 32, 16


@pytest.fixture(scope="module")
def compiled():
    """A function (first, rows, new tokens) to the program for eight TPUs of two groups of rows, heads and experts."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the compiler for TPUs is not installed")
    devices = compile_only_devices(parse_topology("v5e:2x4"))
    mesh = make_mesh(ParallelConfig(data=2, tensor=2, expert=2), devices)
    programs = programs_of(MODEL, mesh, MODEL.vocab_size, 0, False)
    layout = programs.layout
    specs, rows_spec = layout.specs(), PartitionSpec(ROW_AXES)

    def abstract(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def arrays(definition, specs):
        return {
            name: abstract(x.shape, jnp.bfloat16 if len(x.shape) > 1 and "router" not in name else x.dtype, specs[name])
            for name, x in definition.shapes().items()
        }

    weights = Weights(
        tuple(arrays(block, spec) for block, spec in zip(layout.blocks, specs.runs, strict=True)),
        arrays(layout.shared, specs.shared),
    )
    pools = {
        name: abstract((4 * PAGES, *shape), jnp.bfloat16, cache_spec(name))
        for name, shape in page_shapes(MODEL, PAGE, "tpu").items()
    }

    def compiled(first: bool, rows: int, new: int):
        shapes = (rows, new), (rows,), (rows,), (rows, 16)
        given = Rows(*(abstract(shape, jnp.int32, rows_spec) for shape in shapes))
        return programs.next_logits[first].lower(weights, (pools,) * MODEL.num_layers, given).compile()

    return compiled


@pytest.mark.parametrize(
    "first, rows, new, kernel",
    [(False, SLOTS, 1, "mla_decode"), (True, 4, 256, "flash_mla"), (False, 4, 256, "flash_mla")],
)
def test_programs_compile_for_tpus_with_their_kernels_and_write_the_cache_in_its_place(
    compiled, first, rows, new, kernel
):
    program = compiled(first, rows, new)
    text = program.as_text()
    assert kernel in text and "grouped" in text
    of_a_device = MODEL.num_layers * PAGES * PAGE * 640 * 2
    assert program.memory_analysis().alias_size_in_bytes >= of_a_device
