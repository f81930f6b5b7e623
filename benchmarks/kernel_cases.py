"""Every kernel at sizes that are no multiple of any block, and at those of models: what must compile for every chip.

Used by `benchmarks/kernels.py --check` and by tests/kernels/test_every_chip.py.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.cross_entropy import fused_cross_entropy
from kernels_pallas.flash_mla import flash_mla
from kernels_pallas.fp8_matmul import fp8_grouped_matmul, fp8_matmul
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels_pallas.mla_decode import mla_decode

CHIPS = {
    "v5e": "2x2",
    "v5p": "2x2x1",
    "v6e": "2x2",
    "v7x": "2x2x1",
    **dict.fromkeys(("a100", "h100", "h200", "b200", "gb200"), ""),
}
"""All chips, with the shape of the smallest slice that libtpu compiles for."""
DTYPES = ("float32", "bfloat16", "float16")


class Case(NamedTuple):
    """A call of a kernel: `function(*arguments, implementation)`, and how many arguments have gradients."""

    function: Callable
    arguments: list[jax.ShapeDtypeStruct]
    differentiable: int


def attention(dtype, rows=1, length=130, heads=1, nope=128, rope=64, value=128) -> Case:
    widths = heads * nope, heads * rope, heads * nope, rope, heads * value
    operands = [array(dtype, rows, length, width) for width in widths]

    def function(*operands, name):
        return flash_mla(*operands, num_heads=heads, scale=0.1, implementation=name)

    return Case(function, operands + [array("int32", rows, length)] * 2, 5)


def grouped(dtype, rows=130, groups=3, inner=200, width=300) -> Case:
    operands = array(dtype, rows, inner), array(dtype, groups, inner, width), array("int32", groups)
    return Case(lambda *x, name: grouped_matmul(*x, name), operands, 2)


def swiglu(dtype, rows=130, groups=3, inner=200, width=300) -> Case:
    matrix = array(dtype, groups, inner, width)
    operands = array(dtype, rows, inner), matrix, matrix, array("float32", rows), array("int32", groups)
    return Case(lambda x, gate, up, w, sizes, name: grouped_swiglu(x, gate, up, sizes, w, name), operands, 4)


def fp8(dtype, rows=130, inner=200, width=300) -> Case:
    return Case(lambda *x, name: fp8_matmul(*x, name), [array(dtype, rows, inner), array(dtype, inner, width)], 2)


def fp8_grouped(dtype, rows=130, groups=3, inner=200, width=300) -> Case:
    operands = array(dtype, rows, inner), array(dtype, groups, inner, width), array("int32", groups)
    return Case(lambda *x, name: fp8_grouped_matmul(*x, name), operands, 2)


def cross_entropy(dtype, tokens=130, width=200, vocab=1003) -> Case:
    operands = array(dtype, tokens, width), array(dtype, width, vocab), array("int32", tokens), array("bool", tokens)
    return Case(lambda *x, name: fused_cross_entropy(*x, implementation=name)[0], operands, 2)


def decode(dtype, rows=3, heads=5, latent=64, rope=16, page=16, pages=7) -> Case:
    cache = array(dtype, rows * pages, page, -(-(latent + rope) // 128) * 128)
    queries = array(dtype, rows, heads, latent), array(dtype, rows, heads, rope)
    tables = array("int32", rows, pages), array("int32", rows)
    return Case(lambda *x, name: mla_decode(*x, 0.1, name), [*queries, cache, *tables], 0)


def array(dtype, *shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


OWN = {
    attention: {"tpu": "mosaic", "gpu": "triton"},
    grouped: {"tpu": "mosaic", "gpu": "triton"},
    swiglu: {"tpu": "mosaic", "gpu": "triton"},
    decode: {"tpu": "mosaic", "gpu": "triton"},
    cross_entropy: {"tpu": "mosaic_tpu", "gpu": "chunks"},
    fp8: {},
    fp8_grouped: {},
}
"""Each kernel, and the implementation of ours that each platform has; those of FP8 are the chip's."""

SIZES = {
    attention: {
        "odd": dict(length=45, heads=3, nope=20, rope=10, value=36),
        "one position": dict(length=1),
        "one head": dict(),
        "wide": dict(heads=2, nope=200, rope=60, value=200),
        "wider": dict(nope=512, rope=64, value=512),
        "V3, 8192": dict(length=8192, heads=2),
    },
    grouped: {
        "odd": dict(),
        "one row": dict(rows=1, groups=1, inner=1, width=1),
        "more groups than rows": dict(rows=5, groups=9),
        "long": dict(inner=40_001),
        "V3": dict(rows=4096, groups=8, inner=7168, width=2048),
    },
    swiglu: {
        "odd": dict(),
        "one row": dict(rows=1, groups=1, inner=1, width=1),
        "long": dict(inner=40_001),
        "quickstart": dict(rows=8192, groups=16, inner=256, width=128),
        "V3": dict(rows=4096, groups=8, inner=7168, width=2048),
    },
    decode: {
        "odd": dict(),
        "one head": dict(rows=1, heads=1, latent=512, rope=64, pages=1),
        "no power of two": dict(latent=40, rope=24),
        "small pages": dict(page=5),
        "large pages": dict(heads=128, latent=512, rope=64, page=4096, pages=2),
        "V3": dict(heads=128, latent=512, rope=64, page=64, pages=32),
        "latents of 4096": dict(heads=16, latent=4096, rope=64),
    },
    cross_entropy: {
        "odd": dict(),
        "one token": dict(tokens=1, width=1, vocab=2),
        "wide": dict(width=16_400),
        "V3": dict(tokens=1024, width=7168, vocab=129_280),
    },
    fp8: {"odd": dict(), "one row": dict(rows=1, inner=1, width=1), "long": dict(inner=40_001)},
    fp8_grouped: {"odd": dict(), "long": dict(inner=40_001), "V3": dict(rows=4096, groups=8, inner=7168, width=2048)},
}


def cases() -> Iterator[tuple[Callable, str, str]]:
    """Kernel, size, dtype of every case."""
    for kernel, sizes in SIZES.items():
        for size in sizes:
            for dtype in DTYPES:
                yield kernel, size, dtype


def mesh_of(name: str, shared_memory: int = 0) -> Mesh:
    """A mesh of one slice or one GPU of a chip that is not there; with less shared memory where given."""
    from jax.experimental import topologies

    from opendeep_jax.plan.gpu_target import gpu_target
    from opendeep_jax.plan.topology import compile_only_devices, parse_topology

    if CHIPS[name]:
        devices = compile_only_devices(parse_topology(f"{name}:{CHIPS[name]}"))
    else:
        target = gpu_target(name, shared_memory)
        devices = topologies.get_topology_desc(
            platform="cuda", topology_name=name, topology="1x1x1", target_config=target
        ).devices
    return Mesh(np.asarray(devices).ravel(), ("x",))


def compile_for(mesh: Mesh, function: Callable, arguments) -> jax.stages.Compiled:
    """The function compiled for each chip of a mesh to do all of it."""
    everywhere = PartitionSpec()
    sharding = NamedSharding(mesh, everywhere)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments]
    program = jax.shard_map(function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    kind = "cuda" if mesh.devices.flat[0].platform in ("cuda", "gpu") else "tpu"
    with jax.set_mesh(mesh):
        return jax.jit(program).trace(*shapes).lower(lowering_platforms=(kind,)).compile()


def compile_case(mesh: Mesh, case: Case, name: str | None = None) -> jax.stages.Compiled:
    """A case compiled forwards and, where it has gradients, backwards.

    Args:
        name: of an implementation; None for the automatic choice.
    """
    count = case.differentiable

    def run(*arguments):
        if not count:
            return case.function(*arguments, name=name)
        out, pull = jax.vjp(lambda *x: case.function(*x, *arguments[count:], name=name), *arguments[:count])
        return out, pull(jax.tree.map(jnp.ones_like, out))

    return compile_for(mesh, run, case.arguments)
