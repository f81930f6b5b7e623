"""Every kernel compiles for every chip and dtype, or is refused before anything is compiled; blocks fit what there is.

`benchmarks/kernels.py --check` compiles the whole table; here one odd size of each for one TPU and one GPU.
"""

import importlib.util
import re
import sys
from functools import cache, partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernel_cases as table

from kernels_pallas.chips import CHIPS, UNKNOWN
from kernels_pallas.cross_entropy import tpu as cross_entropy_tpu
from kernels_pallas.flash_mla import gpu as attention_gpu
from kernels_pallas.flash_mla import tpu as attention_tpu
from kernels_pallas.flash_mla import tpu_parts
from kernels_pallas.grouped_matmul import gpu as grouped_gpu
from kernels_pallas.mla_decode import gpu as decode_gpu

GPUS = [chip for chip in (*CHIPS.values(), UNKNOWN["gpu"]) if chip.generation]
TPUS = [chip for chip in (*CHIPS.values(), UNKNOWN["tpu"]) if not chip.generation]
gpus, tpus, sizes, itemsizes = (
    st.sampled_from(GPUS),
    st.sampled_from(TPUS),
    st.integers(1, 20_000),
    st.sampled_from([2, 4]),
)
heads, ropes = st.integers(1, 256), st.integers(1, 128)


@cache
def mesh_of(chip, shared_memory=0):
    module = "libtpu" if chip.startswith("v") else "jax_cuda13_plugin"
    if importlib.util.find_spec(module) is None:
        pytest.skip("its compiler is not installed")
    return table.mesh_of(chip, shared_memory)


# ------------------------------------------------------------------------------------------------------ the compilers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", table.SIZES, ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("chip", ["h100", "v5e"])
def test_every_kernel_compiles_at_sizes_that_no_block_divides(chip, kernel, dtype):
    name = table.OWN[kernel].get("tpu" if chip == "v5e" else "gpu")
    assert table.compile_case(mesh_of(chip), kernel(dtype, **table.SIZES[kernel]["odd"]), name)


def test_a_loss_of_width_1_goes_to_the_next_implementation_on_tpus():
    case = table.cross_entropy("bfloat16", **table.SIZES[table.cross_entropy]["one token"])
    assert table.compile_case(mesh_of("v5e"), case)
    with pytest.raises(NotImplementedError, match="width 2 or more"):
        table.compile_case(mesh_of("v5e"), case, "mosaic_tpu")


def test_fp8_products_of_float16_compile_where_mosaic_cannot_write_it():
    assert table.compile_case(mesh_of("v7x"), table.fp8("float16", **table.SIZES[table.fp8]["one row"]))


def test_a_dtype_that_a_kernel_does_not_take_goes_to_the_next_implementation_and_by_name_is_refused():
    case = table.grouped("float16", rows=5, groups=2, inner=8, width=8)
    assert table.compile_case(mesh_of("v5e"), case)
    with pytest.raises(NotImplementedError, match="operands of float16: all must be of one dtype, bfloat16 or float32"):
        table.compile_case(mesh_of("v5e"), case, "mosaic")


def test_heads_that_no_block_holds_go_to_the_next_implementation_and_by_name_are_refused():
    case = table.attention("float32", length=3, nope=4096, rope=16, value=4096)
    assert table.compile_case(mesh_of("h100"), case)
    with pytest.raises(NotImplementedError, match=r"need .* bytes of shared memory at these sizes, .* 232,448"):
        table.compile_case(mesh_of("h100"), case, "triton")


def asked_for(chip, case, name):
    """Bytes of shared memory that the compiler asks for, which it says where there are none."""
    with pytest.raises(Exception, match="Shared memory size limit exceeded") as error:
        table.compile_case(mesh_of(chip, shared_memory=64), case, name)
    return int(re.search(r"requested (\d+)", str(error.value))[1])


@pytest.mark.parametrize("itemsize, dtype", [(4, "float32"), (2, "bfloat16")])
@pytest.mark.parametrize("chip", ["a100", "h100", "b200"])
def test_the_compiler_asks_for_no_more_shared_memory_than_is_computed(chip, itemsize, dtype):
    here = CHIPS[chip]
    decode = dict(heads=64, latent=512, rope=64, page=64, pages=2)
    blocks = decode_gpu.blocks_for(64, 64, 512, 64, itemsize, here)
    computed = decode_gpu.shared_memory(512, 64, itemsize, here, blocks)
    assert computed / 2 < asked_for(chip, table.decode(dtype, **decode), "triton") <= computed <= here.memory
    product = table.grouped(dtype, rows=512, groups=2, inner=256, width=300)._replace(differentiable=0)
    computed = grouped_gpu.shared_memory(1, itemsize, here, grouped_gpu.blocks_for(256, 300, 256, 1, itemsize, here))
    assert computed / 2 < asked_for(chip, product, "triton") <= computed <= here.memory


# ------------------------------------------------------------------------------------------------------ arithmetic
@given(chip=gpus, itemsize=itemsizes, rows=sizes, columns=sizes, inner=sizes, matrices=st.integers(1, 2))
def test_blocks_of_a_grouped_matmul_fit_the_shared_memory_of_any_gpu(chip, itemsize, rows, columns, inner, matrices):
    blocks = grouped_gpu.blocks_for(rows, columns, inner, matrices, itemsize, chip)
    assert grouped_gpu.shared_memory(matrices, itemsize, chip, blocks) <= chip.memory
    assert all(size >= 16 and size & (size - 1) == 0 for size in blocks[:3])


@given(chip=gpus, itemsize=itemsizes, nope=heads, rope=ropes, value=heads)
def test_blocks_of_attention_fit_the_shared_memory_of_any_gpu(chip, itemsize, nope, rope, value):
    widths = tuple(map(attention_gpu._columns, (nope, rope, value)))
    for kernel, blocks in attention_gpu.blocks_for(nope, rope, value, itemsize, chip)._asdict().items():
        assert attention_gpu.shared_memory(kernel, widths, itemsize, chip, blocks) <= chip.memory
        assert min(blocks.q, blocks.k) >= 16


@given(chip=gpus, itemsize=itemsizes, num_heads=heads, page=sizes, latent=st.integers(4, 10), rope=st.integers(4, 7))
def test_blocks_of_decoding_fit_the_shared_memory_of_any_gpu_or_are_refused(
    chip, itemsize, num_heads, page, latent, rope
):
    needed = partial(decode_gpu.shared_memory, 2**latent, 2**rope, itemsize, chip)
    if needed(decode_gpu.DecodeBlocks(16, 16)) > chip.memory:
        with pytest.raises(NotImplementedError, match="bytes of shared memory"):
            decode_gpu.blocks_for(num_heads, page, 2**latent, 2**rope, itemsize, chip)
        return
    blocks = decode_gpu.blocks_for(num_heads, page, 2**latent, 2**rope, itemsize, chip)
    assert needed(blocks) <= chip.memory and min(blocks) >= 16


@pytest.mark.parametrize("chip", ["a100", "h100", "h200", "b200", "gb200"])
def test_what_was_tuned_in_16_bits_at_models_sizes_is_not_shrunk(chip):
    here = CHIPS[chip]
    assert attention_gpu.blocks_for(128, 64, 128, 2, here) == attention_gpu.LARGEST[2]
    assert grouped_gpu.blocks_for(4096, 2048, 7168, 1, 2, here) == grouped_gpu.LARGEST[2]
    assert attention_tpu.fit_blocks((8192, 16384), 128, 128, 2) == ((512, 512), (512, 512), (8192, 16384))


@given(length=sizes, keys=sizes, nope=heads, value=heads, itemsize=itemsizes)
def test_blocks_of_attention_fit_the_vector_memory(length, keys, nope, value, itemsize):
    nope, value = (-(-size // 128) * 128 for size in (nope, value))
    forward, backward, longest = attention_tpu.fit_blocks((length, keys), nope, value, itemsize)
    held = tuple(min(most, -(-size // 128) * 128) for most, size in zip(longest, (length, keys), strict=True))
    limit = tpu_parts.VMEM_LIMIT
    assert tpu_parts.forward_memory(forward, nope, value, itemsize) <= limit < min(chip.memory for chip in TPUS)
    assert tpu_parts.backward_memory(backward, held, nope, value, itemsize) <= limit


@given(chip=tpus, tokens=sizes, width=st.integers(1, 8192), vocab=st.integers(1, 200_000), itemsize=itemsizes)
def test_tiles_of_the_cross_entropy_fit_the_vector_memory(chip, tokens, width, vocab, itemsize):
    rows, columns = cross_entropy_tpu.tile_sizes(tokens, width, vocab, itemsize, chip.memory)
    needed = partial(cross_entropy_tpu.vmem, rows, columns, width=width, itemsize=itemsize)
    assert max(needed(result=0), needed(result=columns)) < chip.memory
    assert columns % 128 == 0 and (rows % 16 == 0)
