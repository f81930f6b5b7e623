"""Absorbed latent decoding over a paged cache for GPUs, in Pallas Triton.

All heads read the same latents, so one program takes 64 heads, whose products fill the tensor cores, and each latent is
read once for keys and values alike. One token a row gives too few programs for a GPU: the cache of a row is divided
among several (flash decoding), and their outputs are put together by their log-sum-exps.

B rows, H heads, C latent size, R rotated size, P pages of the cache; D parts of a row's cache.
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas.chips import OnChip
from kernels_pallas.fitting import EXCHANGED, ON_GPU, check_dtypes, fit, from_shared_memory
from kernels_pallas.target import on_chip

LOG2_E = math.log2(math.e)
PROGRAMS = 264
"""Two for each of an H100's processors: what the parts of the rows are to fill."""
STAGES = 2
LARGEST, FEW = 64, 32
"""Heads, and positions, of a block at most; and below which positions are only taken when heads are as few as can be:
the fewer heads a program takes, the oftener the cache is read."""


class DecodeBlocks(NamedTuple):
    """Heads and positions of a block; a block of positions lies within one page."""

    heads: int
    positions: int


def blocks_for(heads: int, page: int, latent: int, rope: int, itemsize: int, chip: OnChip) -> DecodeBlocks:
    """Blocks for so many heads and pages of so many positions.

    Raises:
        NotImplementedError: where no block fits the chip's shared memory.
    """

    most, long = (min(LARGEST, max(16, pl.next_power_of_2(size))) for size in (heads, page))
    wide = [DecodeBlocks(group, block) for group in _halves(most, 16) for block in _halves(long, FEW)]
    blocks = [*wide, *(DecodeBlocks(16, block) for block in _halves(min(long, FEW), 16))]
    return fit("mla_decode", blocks, partial(shared_memory, latent, rope, itemsize, chip), chip.memory)


def shared_memory(latent: int, rope: int, itemsize: int, chip: OnChip, blocks: DecodeBlocks) -> int:
    """Bytes that the compiler asks for at most."""
    queries, latents = ((latent + rope) * size * itemsize for size in blocks)
    if not from_shared_memory(chip, itemsize) or blocks.heads < 64:
        weights = blocks.heads * blocks.positions * itemsize  # as operand of the next product
        return queries + max(STAGES - 1, 1) * latents + weights + EXCHANGED
    sums = 4 * blocks.heads * latent if chip.generation >= 10 else 0  # to be scaled
    return queries + STAGES * latents + sums + EXCHANGED


def _halves(size, least):
    """The size, its half, … down to `least`, or itself alone if it is below."""
    while size > least:
        yield size
        size //= 2
    yield size


def mla_decode(
    query_latent: Float[Array, "B H C"],
    query_rope: Float[Array, "B H R"],
    cache: Float[Array, "P page CR"],
    page_table: Int[Array, "B pages"],
    lengths: Int[Array, "B"],
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B H C"]:
    """See `api.mla_decode`. A row of length 0 gives zeros.

    Raises:
        NotImplementedError: for sizes C or R that are no powers of two from 16 or that no block of this chip's shared
            memory holds, or operands that are not bfloat16, float16 or float32, or not of one dtype.
    """
    (batch, heads, latent), rope, page = query_latent.shape, query_rope.shape[2], cache.shape[1]
    check_dtypes("mla_decode", ON_GPU, query_latent, query_rope, cache)
    if any(size < 16 or size & (size - 1) for size in (latent, rope)):
        raise NotImplementedError(
            f"mla_decode on GPU: latents of {latent} + {rope}: both must be powers of two from 16. "
            "Take another implementation."
        )
    group, block = blocks_for(heads, page, latent, rope, cache.dtype.itemsize, on_chip("gpu"))
    blocks_in_page, groups = pl.cdiv(page, block), pl.cdiv(heads, group)
    parts = max(1, min(PROGRAMS // (batch * groups), page_table.shape[1] * blocks_in_page))
    factor = scale * LOG2_E

    def kernel(query_latent, query_rope, cache, page_table, lengths, out, log_sum):
        part, first_head, row = pl.program_id(0), pl.program_id(1) * group, pl.program_id(2)
        length, at = lengths[row], (row, pl.ds(first_head, group))
        present = first_head + jnp.arange(group) < heads
        query = plgpu.load(query_latent.at[(*at, slice(None))], mask=_wide(present, latent), other=0)
        rotated = plgpu.load(query_rope.at[(*at, slice(None))], mask=_wide(present, rope), other=0)

        def step(i, carry):
            total, largest, weight_sum = carry
            inside = i % blocks_in_page * block + jnp.arange(block)
            position = i // blocks_in_page * page + inside
            seen = (inside < page) & (position < length)
            where = page_table[row, i // blocks_in_page], pl.ds(i % blocks_in_page * block, block)
            latents = plgpu.load(cache.at[(*where, pl.ds(0, latent))], mask=_wide(seen, latent), other=0)
            ropes = plgpu.load(cache.at[(*where, pl.ds(latent, rope))], mask=_wide(seen, rope), other=0)
            scores = _dot(query, latents.T) + _dot(rotated, ropes.T)
            scores = jnp.where(seen[None], scores * factor, -jnp.inf)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
            weights, decay = jnp.exp2(scores - new_largest[:, None]), jnp.exp2(largest - new_largest)
            total = total * decay[:, None] + _dot(weights.astype(latents.dtype), latents)
            return total, new_largest, weight_sum * decay + jnp.sum(weights, axis=1)

        count = (length + page - 1) // page * blocks_in_page
        each = (count + parts - 1) // parts
        # Finite, so that a part that sees nothing does not subtract infinities.
        start = jnp.full(group, -1e30, jnp.float32), jnp.zeros(group, jnp.float32)
        total = jnp.zeros((group, latent), jnp.float32)
        bounds = jnp.minimum(part * each, count), jnp.minimum((part + 1) * each, count)
        total, largest, weight_sum = lax.fori_loop(*bounds, step, (total, *start))
        weight_sum = jnp.where(weight_sum > 0, weight_sum, 1)
        where = (row, part, pl.ds(first_head, group))
        plgpu.store(out.at[(*where, slice(None))], total / weight_sum[:, None], mask=_wide(present, latent))
        plgpu.store(log_sum.at[where], largest + jnp.log(weight_sum) * LOG2_E, mask=present)

    kernel.__name__ = "mla_decode"
    outs = [
        jax.ShapeDtypeStruct((batch, parts, heads, latent), jnp.float32),
        jax.ShapeDtypeStruct((batch, parts, heads), jnp.float32),
    ]
    positions = batch * page_table.shape[1] * page
    cost = pl.CostEstimate(
        flops=2 * positions * heads * (2 * latent + rope),
        transcendentals=positions * heads,
        bytes_accessed=positions * (latent + rope) * cache.dtype.itemsize,
    )
    out, log_sum = pl.pallas_call(
        kernel,
        grid=(parts, groups, batch),
        out_shape=outs,
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=STAGES),
        cost_estimate=cost,
        # The Triton lowering drops the estimate; this it writes into the program, as `serialized_metadata`.
        metadata={key: str(value) for key, value in dataclasses.asdict(cost).items()},
        interpret=interpret,
        name="mla_decode",
    )(query_latent, query_rope, cache, page_table.astype(jnp.int32), lengths.astype(jnp.int32))
    weights = jnp.exp2(log_sum - jnp.max(log_sum, axis=1, keepdims=True))
    out = jnp.sum(out * weights[..., None], axis=1) / jnp.sum(weights, axis=1)[..., None]
    return out.astype(query_latent.dtype)


def _wide(mask, columns):
    """A mask of rows [n] for a block [n, columns]."""
    return jnp.broadcast_to(mask[:, None], (*mask.shape, columns))


def _dot(a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
