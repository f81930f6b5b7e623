"""Blocks of the Triton kernels by the shared memory of the chip: what the compiler asks for, and blocks that fit it.

Read off the compiler (benchmarks/kernels.py asks it again): a loop's operands lie in shared memory once for each stage
of its pipeline, or one time less where matrix products take them from registers; what is loaded before the loop lies
there too; and a few KiB are for what is exchanged between threads.
"""

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

from kernels_pallas.chips import KIB, OnChip

EXCHANGED = 4 * KIB
"""Bytes beside the operands: sums over rows, barriers, masks."""

B = TypeVar("B")


def from_shared_memory(chip: OnChip, itemsize: int) -> bool:
    """Whether matrix products read their operands from shared memory (wgmma, tcgen05): 16 bits, Hopper and later."""
    return itemsize == 2 and chip.generation >= 9


def copies(chip: OnChip, itemsize: int, stages: int) -> int:
    """How many times the operands of a loop's step lie in shared memory."""
    return stages if from_shared_memory(chip, itemsize) else max(stages - 1, 1)


def fit(kernel: str, blocks: Iterator[B], needed: Callable[[B], int], chip: OnChip) -> B:
    """The first of the blocks that needs no more shared memory than there is.

    Raises:
        NotImplementedError: where none does.
    """
    least = math.inf
    for block in blocks:
        least = min(least, needed(block))
        if least <= chip.memory:
            return block
    raise NotImplementedError(
        f"{kernel} on GPU: its smallest blocks need {least:,} bytes of shared memory at these sizes, and this chip has "
        f"{chip.memory:,}. Take another implementation, or leave the choice empty."
    )
