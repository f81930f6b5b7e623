"""The GPU kernels at DeepSeek-V3's and V2-Lite's sizes, forwards and backwards, one JSON line each.

    python benchmarks/gpu_kernels.py [NAME ...]

On a GPU: milliseconds (the median of 10 runs) and TFLOP/s of the mathematics, without what a backward pass computes
again. Without one every case is compiled for an H100 that is not there (extra gpu-compiler): seconds to compile and
the bytes of temporaries, which show that neither scores nor padded copies are kept; nothing of it says how fast.
"""

import json
import statistics
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.flash_mla import gpu as flash_mla
from kernels_pallas.grouped_matmul import gpu as grouped_matmul
from kernels_pallas.mla_decode import gpu as mla_decode


def with_gradients(function, operands):
    """A function that pulls ones back through `function`, to the first `operands` of its arguments."""

    def run(*arguments):
        out, pull = jax.vjp(lambda *x: function(*x, *arguments[operands:]), *arguments[:operands])
        return out, pull(jnp.ones_like(out))

    return run


def bf16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


# Each case: the function, how many of its arguments have gradients, the arguments, the forward and all FLOPs.
def attention(rows, length, heads):
    """Causal attention over one document a row."""
    kernel = partial(flash_mla.flash_mla, num_heads=heads, scale=192**-0.5)
    shapes = [(heads * 128,), (heads * 64,), (heads * 128,), (64,), (heads * 128,)]
    segments = np.ones((rows, length), np.int32)
    pairs = rows * heads * length * (length + 1) // 2
    function = lambda *x: kernel(*x, None, None)  # noqa: E731
    return function, 5, [*(bf16(rows, length, *x) for x in shapes), segments, segments], (640 * pairs, 2304 * pairs)


def experts(rows, groups, inner, width):
    """gate, up and SwiGLU of balanced groups."""
    operands = [bf16(rows, inner), bf16(groups, inner, width), bf16(groups, inner, width)]
    flops = 4 * rows * inner * width
    return grouped_matmul.grouped_swiglu, 3, [*operands, balanced(rows, groups)], (flops, 3 * flops)


def down(rows, groups, inner, width):
    """One grouped matmul of balanced groups."""
    operands, flops = [bf16(rows, inner), bf16(groups, inner, width)], 2 * rows * inner * width
    return grouped_matmul.grouped_matmul, 2, [*operands, balanced(rows, groups)], (flops, 3 * flops)


def decode(rows, length, heads, page=64):
    """One token a row over full pages."""
    operands = [bf16(rows, heads, 512), bf16(rows, heads, 64), bf16(rows * length // page, page, 576)]
    pages = np.arange(rows * length // page, dtype=np.int32).reshape(rows, -1)
    function = partial(mla_decode.mla_decode, scale=192**-0.5)
    return function, 0, [*operands, pages, np.full(rows, length, np.int32)], (2 * rows * length * heads * 1088, 0)


def balanced(rows, groups):
    return np.full(groups, rows // groups, np.int32)


CASES = {
    "attention_v3": lambda: attention(1, 4096, 128),
    "attention_v2_lite": lambda: attention(4, 2048, 16),
    "experts_v3": lambda: experts(131072, 32, 7168, 2048),
    "down_v3": lambda: down(131072, 32, 2048, 7168),
    "experts_v2_lite": lambda: experts(49152, 64, 2048, 1408),
    "down_v2_lite": lambda: down(49152, 64, 1408, 2048),
    "decode_v3": lambda: decode(16, 8192, 128),
}


def measured(function, arguments, flops):
    """Milliseconds and TFLOP/s on the GPU at hand."""
    make = lambda x: jax.random.normal(jax.random.key(0), x.shape, x.dtype)  # noqa: E731
    arguments = [jnp.asarray(x) if isinstance(x, np.ndarray) else make(x) for x in arguments]
    run, seconds = jax.jit(function), []
    jax.block_until_ready(run(*arguments))
    for _ in range(10):
        begun = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - begun)
    taken = statistics.median(seconds)
    return {"milliseconds": 1e3 * taken, "tflops": flops / taken / 1e12}


def compiled(function, arguments, flops):
    """Seconds to compile for an H100, and the bytes of temporaries there."""
    from jax.experimental import topologies

    from opendeep_jax.parallel.chips import CHIPS
    from opendeep_jax.plan.gpu_target import gpu_target

    target = gpu_target(CHIPS["h100"])
    h100 = topologies.get_topology_desc(platform="cuda", topology_name="h100", topology="1x1x1", target_config=target)
    mesh, everywhere = topologies.make_mesh(h100, (1,), ("x",)), jax.sharding.PartitionSpec()
    sharding = jax.sharding.NamedSharding(mesh, everywhere)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments]
    program = jax.shard_map(function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    begun = time.perf_counter()
    done = jax.jit(program).trace(*shapes).lower(lowering_platforms=("cuda",)).compile()
    seconds = time.perf_counter() - begun
    return {"seconds_to_compile": seconds, "temporaries_bytes": done.memory_analysis().temp_size_in_bytes}


def main(names):
    look = measured if jax.default_backend() == "gpu" else compiled
    for name in names or CASES:
        function, operands, arguments, (forward, both) = CASES[name]()
        print(json.dumps({"case": name, "pass": "forward", **look(function, arguments, forward)}), flush=True)
        if operands:
            result = look(with_gradients(function, operands), arguments, both)
            print(json.dumps({"case": name, "pass": "forward and backward", **result}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
