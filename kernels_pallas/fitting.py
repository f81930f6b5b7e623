"""Blocks of kernels by what a chip has: its shared memory, or its vector memory.

What Triton takes of shared memory is read off the compiler (benchmarks/kernels.py asks it again): a loop's operands lie
in it once for each stage of its pipeline, or one time less where matrix products take them from registers; what is
loaded before the loop lies there too; and a few KiB are for what is exchanged between threads.
"""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax

from kernels_pallas.chips import KIB, OnChip

ON_GPU, ON_TPU = ("bfloat16", "float16", "float32"), ("bfloat16", "float32")
"""Dtypes of operands that the kernels take."""
EXCHANGED = 4 * KIB
"""Bytes beside the operands: sums over rows, barriers, masks."""

B = TypeVar("B")


def from_shared_memory(chip: OnChip, itemsize: int) -> bool:
    """Return whether matrix products read operands from shared memory (wgmma, tcgen05): 16 bits, since Hopper."""
    return itemsize == 2 and chip.generation >= 9


def copies(chip: OnChip, itemsize: int, stages: int) -> int:
    """Return how many copies of a loop step's operands lie in shared memory."""
    return stages if from_shared_memory(chip, itemsize) else max(stages - 1, 1)


def fit(kernel: str, blocks: Iterable[B], needed: Callable[[B], int], memory: int, kind: str = "shared memory") -> B:
    """The first of the blocks that needs no more memory than there is.

    Args:
        kernel, kind: names of the kernel and of the memory, for an error's text.

    Raises:
        NotImplementedError: where none does.
    """
    least = math.inf
    for block in blocks:
        least = min(least, needed(block))
        if least <= memory:
            return block
    raise NotImplementedError(
        f"{kernel}: its smallest blocks need {least:,} bytes of {kind} at these sizes, and on this chip there are "
        f"{memory:,}. Take another implementation, or leave the choice empty."
    )


def check_dtypes(kernel: str, taken: tuple[str, ...], *operands: jax.Array) -> None:
    """Raise NotImplementedError unless the operands are all of one of the dtypes that are taken."""
    names = list(dict.fromkeys(operand.dtype.name for operand in operands))
    if len(names) > 1 or names[0] not in taken:
        raise NotImplementedError(
            f"{kernel}: operands of {' and '.join(names)}: all must be of one dtype, {' or '.join(taken)}. Cast them, "
            "or take another implementation."
        )
