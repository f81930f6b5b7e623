"""Absorbed latent decoding over a paged cache on TPUs, through Mosaic.

A step reads several pages, wherever they lie, and all heads of a row meet them at once: each latent is read once, for
keys and values alike. Steps beyond the longest row don't exist, and those beyond a row's own length read nothing.

B rows, H heads, C latent size, R rotated size, P pages of the cache, s positions of a step.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.chips import MIB
from kernels_pallas.fitting import ON_TPU, check_dtypes, fit
from kernels_pallas.target import on_chip

POSITIONS = 512
"""Positions of a step, about."""
HIDDEN = -1e30
"""Score of a position that isn't there; finite, so that no difference of scores is NaN."""


def mla_decode(query_latent, query_rope, cache, page_table, lengths, scale, interpret=False):
    """See `api.mla_decode`.

    Raises:
        NotImplementedError: for pages that are no multiple of 16 positions or too large for the chip's vector memory,
            or operands that are not bfloat16 or float32, or not of one dtype.
    """
    (batch, heads, latent), (_, page, width) = query_latent.shape, cache.shape
    query = jnp.concatenate([query_latent, query_rope], axis=-1)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, width - query.shape[-1])))
    if page % 16:
        raise NotImplementedError(f"mla_decode: pages of {page} positions: the TPU kernel takes multiples of 16.")
    check_dtypes("mla_decode", ON_TPU, query_latent, query_rope, cache)
    together = max(1, min(POSITIONS // page, page_table.shape[1]))
    needed = vmem(heads, together * page, width, latent, cache.dtype.itemsize)
    memory = on_chip("tpu").memory - MIB
    fit("mla_decode", [together], lambda _: needed, memory, "vector memory")
    lengths, page_table = lengths.astype(jnp.int32), page_table.astype(jnp.int32)
    steps = jnp.maximum(1, pl.cdiv(jnp.max(lengths), together * page))

    def pages(which):
        def index(row, step, table, lengths):
            last = jnp.maximum(pl.cdiv(lengths[row], page) - 1, 0)
            return table[row, jnp.minimum(step * together + which, last)], 0, 0

        return pl.BlockSpec((None, page, width), index)

    positions = batch * page_table.shape[1] * page
    of_row = lambda row, step, table, lengths: (row, 0, 0)  # noqa: E731
    return pl.pallas_call(
        functools.partial(_kernel, scale=scale * math.log2(math.e)),
        name="mla_decode",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, steps),
            in_specs=[pl.BlockSpec((None, heads, width), of_row), *(pages(which) for which in range(together))],
            out_specs=pl.BlockSpec((None, heads, latent), of_row),
            scratch_shapes=[
                pltpu.VMEM((heads, latent), jnp.float32),
                pltpu.VMEM((heads, 1), jnp.float32),
                pltpu.VMEM((heads, 1), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, latent), query_latent.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=min(max(2 * needed, 16 * MIB), memory)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * positions * heads * (width + latent),
            transcendentals=positions * heads,
            bytes_accessed=positions * width * cache.dtype.itemsize,
        ),
        interpret=interpret,
    )(page_table, lengths, query, *[cache] * together)


def vmem(heads: int, positions: int, width: int, latent: int, itemsize: int) -> int:
    """Bytes of a step: pages, queries and outputs twice, the sums, and beside them pages put together and scores."""
    heads, width, latent = (-(-size // unit) * unit for size, unit in ((heads, 16), (width, 128), (latent, 128)))
    held = itemsize * (4 * positions * width + 2 * heads * (width + latent))
    return held + 4 * heads * (3 * latent + 256) + 16 * heads * positions + 4 * MIB


def _dot(lhs, rhs, contract):
    """Product over axis contract[0] of lhs and contract[1] of rhs, in float32."""
    precision = lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(lhs, rhs, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _kernel(table, lengths, query, *refs, scale):
    """All heads of a row and the positions [s] of some pages."""
    *pages, out, total_out, total, largest = refs
    step, length = pl.program_id(1), lengths[pl.program_id(0)]
    positions, latent = len(pages) * pages[0].shape[0], out.shape[1]

    @pl.when(step == 0)
    def _():
        total_out[...] = jnp.zeros_like(total_out)
        total[...] = jnp.zeros_like(total)
        largest[...] = jnp.full_like(largest, HIDDEN)

    def visit(present):
        cached = jnp.concatenate([page[...] for page in pages], axis=0)
        if present is not None:
            row = lax.broadcasted_iota(jnp.int32, cached.shape, 0)
            cached = jnp.where(row < present, cached, jnp.zeros_like(cached))
        scores = _dot(query[...], cached, (1, 1)) * scale
        if present is not None:
            scores = jnp.where(lax.broadcasted_iota(jnp.int32, scores.shape, 1) < present, scores, HIDDEN)
        before = largest[...]
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights, fade = jnp.exp2(scores - now), jnp.exp2(before - now)
        largest[...] = now
        total[...] = total[...] * fade + jnp.sum(weights, axis=1, keepdims=True)
        total_out[...] = total_out[...] * fade + _dot(weights.astype(cached.dtype), cached[:, :latent], (1, 0))

    @pl.when((step + 1) * positions <= length)
    def _():
        visit(None)

    @pl.when((step * positions < length) & (length < (step + 1) * positions))
    def _():
        visit(length - step * positions)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out[...] = jnp.where(length > 0, total_out[...] / jnp.maximum(total[...], 1e-30), 0).astype(out.dtype)
