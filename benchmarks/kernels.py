"""Our kernels at DeepSeek-V3's and V2-Lite's sizes, forwards and backwards, one JSON line each.

    python benchmarks/kernels.py [--chips=v5p,h100] [NAME ...]
    python benchmarks/kernels.py --check [--chips=v5p,h100] [KERNEL ...]

Without `--chips`, on the GPU or TPU at hand: milliseconds (the median of 10 runs) and TFLOP/s of the mathematics,
without what a backward pass computes again. With it, compiled for chips that are not there (extras tpu-compiler and
gpu-compiler): seconds to compile and the bytes of temporaries, which show that neither scores nor padded copies are
kept; nothing of it says how fast. A kernel's own implementation is named, so nothing else can step in.

`--check` compiles the table of `kernel_cases.py`, every kernel at odd sizes in every dtype, for every chip: `own` is
our kernel, `other` one that steps in where ours says that it can't.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
from kernel_cases import compile_case, compile_for, mesh_of

from kernels_pallas.cross_entropy import fused_cross_entropy
from kernels_pallas.flash_mla import flash_mla
from kernels_pallas.fp8_matmul import fp8_grouped_matmul
from kernels_pallas.fp8_matmul.api import CHIPS as FP8_CHIPS
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels_pallas.mla_decode import mla_decode
from kernels_pallas.target import chip, platform
from opendeep_jax.plan.shortage import shortage_in

KERNELS = {"tpu": "mosaic", "gpu": "triton"}
FP8_KERNELS = {chip: name for name, chips in FP8_CHIPS.items() for chip in chips}


def with_gradients(function, operands):
    """A function that pulls ones back through `function`, to the first `operands` of its arguments."""

    def run(*arguments):
        out, pull = jax.vjp(lambda *x: function(*x, *arguments[operands:]), *arguments[:operands])
        return out, pull(jax.tree.map(jnp.ones_like, out))

    return run


def bf16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


# Each case: the function, how many of its arguments have gradients, the arguments, the forward and all FLOPs.
def attention(rows, length, heads):
    """Causal attention over one document a row."""
    shapes = [(heads * 128,), (heads * 64,), (heads * 128,), (64,), (heads * 128,)]
    segments = np.ones((rows, length), np.int32)
    pairs = rows * heads * length * (length + 1) // 2

    def function(*x):
        return flash_mla(*x, num_heads=heads, scale=192**-0.5, implementation=KERNELS[platform()])

    return function, 5, [*(bf16(rows, length, *x) for x in shapes), segments, segments], (640 * pairs, 2304 * pairs)


def experts(rows, groups, inner, width):
    """gate, up and SwiGLU of balanced groups."""
    operands = [bf16(rows, inner), bf16(groups, inner, width), bf16(groups, inner, width)]
    flops = 4 * rows * inner * width
    function = lambda *x: grouped_swiglu(*x, implementation=KERNELS[platform()])  # noqa: E731
    return function, 3, [*operands, balanced(rows, groups)], (flops, 3 * flops)


def down(rows, groups, inner, width):
    """One grouped matmul of balanced groups."""
    operands, flops = [bf16(rows, inner), bf16(groups, inner, width)], 2 * rows * inner * width
    function = lambda *x: grouped_matmul(*x, implementation=KERNELS[platform()])  # noqa: E731
    return function, 2, [*operands, balanced(rows, groups)], (flops, 3 * flops)


def fp8(rows, groups, inner, width):
    """One grouped matmul of balanced groups in FP8, quantization included."""
    operands, flops = [bf16(rows, inner), bf16(groups, inner, width)], 2 * rows * inner * width
    function = lambda *x: fp8_grouped_matmul(*x, implementation=FP8_KERNELS[chip()])  # noqa: E731
    return function, 2, [*operands, balanced(rows, groups)], (flops, 3 * flops)


def cross_entropy(tokens, width, vocab):
    """The head and its loss: the fused kernel on TPUs, elsewhere in chunks."""
    targets, mask = np.zeros(tokens, np.int32), np.ones(tokens, bool)
    flops = 2 * tokens * width * vocab

    def function(*x):
        name = "mosaic_tpu" if platform() == "tpu" else "chunks"
        return fused_cross_entropy(*x, chunk=2048, implementation=name)[0]

    return function, 2, [bf16(tokens, width), bf16(width, vocab), targets, mask], (flops, 3 * flops)


def decode(rows, length, heads, page=64):
    """One token a row over full pages."""
    operands = [bf16(rows, heads, 512), bf16(rows, heads, 64), bf16(rows * length // page, page, 576)]
    pages = np.arange(rows * length // page, dtype=np.int32).reshape(rows, -1)
    function = lambda *x: mla_decode(*x, 192**-0.5, KERNELS[platform()])  # noqa: E731
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
    "fp8_down_v3": lambda: fp8(131072, 32, 2048, 7168),
    "cross_entropy_v3": lambda: cross_entropy(16384, 7168, 129_280),
    "decode_v3": lambda: decode(16, 8192, 128),
}


def measured(function, arguments, flops):
    """Milliseconds and TFLOP/s on the GPU or TPU at hand."""
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


def compiled(mesh, function, arguments, flops):
    """Seconds to compile for the mesh's chips, and the bytes of temporaries there."""
    begun = time.perf_counter()
    done = compile_for(mesh, function, arguments)
    seconds = time.perf_counter() - begun
    return {"seconds_to_compile": seconds, "temporaries_bytes": done.memory_analysis().temp_size_in_bytes}


def outcome(mesh, kernel, size, dtype):
    """`own` where our implementation compiles, `other` where it refuses and the next one compiles, or why not."""
    case = kernel(dtype, **kernel_cases.SIZES[kernel][size])
    own = kernel_cases.OWN[kernel].get("tpu" if mesh.devices.flat[0].platform == "tpu" else "gpu")
    try:
        try:
            compile_case(mesh, case, own)
            return "own"
        except NotImplementedError:
            compile_case(mesh, case)
            return "other"
    except Exception as error:  # whatever the compiler says is the result
        found = shortage_in(str(error))
        return f"FAILS: {found.resource or found.words.splitlines()[0][:60]}"


def check(chips, names):
    """Prints a table of every kernel, size and dtype on each chip; returns how many fail."""
    chips, failed = chips or list(kernel_cases.CHIPS), 0
    meshes = {name: mesh_of(name) for name in chips}
    print(f"{'kernel':15}{'size':23}{'dtype':10}", *(f"{name:6}" for name in chips), flush=True)
    for kernel, size, dtype in kernel_cases.cases():
        if names and kernel.__name__ not in names:
            continue
        print(f"{kernel.__name__:15}{size:23}{dtype:10}", end="", flush=True)
        for mesh in meshes.values():
            result = outcome(mesh, kernel, size, dtype)
            failed += result.startswith("FAILS")
            print(f" {result:6}", end="", flush=True)
        print()
    print(f"\n{failed} fail")
    return failed


def main(chips, names):
    """Prints a line for each case and pass on each chip."""
    looks = {name: partial(compiled, mesh_of(name)) for name in chips} or {chip(): measured}
    for on, look in looks.items():
        for name in names or [case for case in CASES if on in FP8_KERNELS or not case.startswith("fp8")]:
            function, operands, arguments, (forward, both) = CASES[name]()
            say = lambda **entries: print(json.dumps({"chip": on, "case": name, **entries}), flush=True)  # noqa: B023, E731
            say(**{"pass": "forward"}, **look(function, arguments, forward))
            if operands:
                result = look(with_gradients(function, operands), arguments, both)
                say(**{"pass": "forward and backward"}, **result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default="", help="chips to compile for, such as v5p,v7x,h100")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases: {', '.join(CASES)}")
    parser.add_argument("--check", action="store_true", help="compile every kernel at odd sizes for every chip")
    given = parser.parse_args()
    chips = [name for name in given.chips.split(",") if name]
    if chips or given.check:
        from opendeep_jax.plan.compile import prepare_process

        prepare_process()
        jax.config.update("jax_platforms", "cpu")
    sys.exit(check(chips, given.names) > 0) if given.check else main(chips, given.names)
