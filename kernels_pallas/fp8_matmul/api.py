"""Matrix products as DeepSeek-V3 trains with them: FP8 operands with fine scales, float32 sums (report, section 3.3).

Activations and their gradients are E4M3 in tiles of 1x128 along the contraction, weights in blocks of 128x128, each
with a float32 scale; all three products of a layer are so: `y = x w`, `dx = dy w^T` and, contracted over the tokens,
`dw = x^T dy`, for which x and dy are cut again into tiles of 128x1 down the tokens. Sums of 128 products are scaled
and added up in float32.

Departs from the report in that x is kept as it came, not in FP8 (so the 128x1 tiles of `dw` are not rounded twice),
and in that all scales are what the largest magnitude says, none a rounded power of two.

T tokens, M rows sorted by group, G groups, K inner size, N output size.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.fp8_matmul import emulated, gpu, groups, reference, tpu
from kernels_pallas.fp8_matmul.quantize import E4M3, TILE, fill, quantize_blocks, quantize_columns, quantize_rows
from kernels_pallas.target import chip, choose, platform, run

Implementation = Literal["mosaic_tpu", "mosaic_gpu", "emulated", "reference"]


class Products(NamedTuple):
    """An implementation: the two products of quantized operands, as `reference` defines them, and what they take."""

    rows_product: Callable[..., jax.Array]
    groups_product: Callable[..., jax.Array]
    carrier: Any
    """The type that holds the E4M3 numbers."""
    rows: int
    """Rows of a tile, a multiple of 128; each group begins with one."""
    check: Callable[[int, int], None] = lambda inner, outputs: None
    """Raises NotImplementedError for sizes K, N of a matrix that they can't take."""


IMPLEMENTATIONS: dict[str, tuple[Products, tuple[str, ...]]] = {
    "mosaic_tpu": (Products(tpu.rows_product, tpu.groups_product, E4M3, tpu.ROWS, tpu.check), ("tpu",)),
    "mosaic_gpu": (Products(gpu.rows_product, gpu.groups_product, E4M3, gpu.ROWS), ("gpu",)),
    "emulated": (Products(emulated.rows_product, emulated.groups_product, jnp.float32, TILE), ("cpu", "tpu", "gpu")),
    "reference": (Products(reference.rows_product, reference.groups_product, jnp.float32, TILE), ("cpu", "tpu", "gpu")),
}

CHIPS = {"mosaic_tpu": ("v7x",), "mosaic_gpu": ("h100", "h200")}
"""The chips with units for E4M3 that an implementation is written for."""


def fp8_matmul(
    x: Float[Array, "T K"], w: Float[Array, "K N"], implementation: Implementation | None = None
) -> Float[Array, "T N"]:
    """`x @ w` through FP8, in x's dtype; differentiable, with both gradients through FP8 as well.

    Args:
        x: activations, of any float type.
        w: weights, of any float type; their blocks are taken from these values, not from a cast to x's type.
        implementation: a name in IMPLEMENTATIONS; None takes FP8 units where the chip has them and
            they take the sizes, else the emulation.
    Raises:
        ValueError: for an implementation of another name.
        NotImplementedError: for a named implementation that this platform lacks, or that can't take these sizes.
    """
    sizes = jnp.full((1,), x.shape[0], jnp.int32)
    return _product(_implementation(implementation, *w.shape), True, x, w[None], sizes)


def fp8_grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """Consecutive row groups of `lhs` through FP8 by their own matrix, as `grouped_matmul` without FP8.

    The 128x1 tiles of the weights' gradient begin with each group's first row, so no tile mixes two experts' tokens.

    Args:
        lhs: rows sorted by group.
        rhs: one matrix per group.
        group_sizes: int32 rows in each group, any of them 0; rows beyond their sum give zeros and no gradient.
        implementation: as for `fp8_matmul`.
    Raises:
        ValueError, NotImplementedError: as `fp8_matmul`.
    """
    return _product(_implementation(implementation, *rhs.shape[1:]), False, lhs, rhs, group_sizes)


def _implementation(name, inner, outputs):
    """Return the named implementation, or the platform's first that supports this chip and these sizes."""
    fitting = {key: entry for key, entry in IMPLEMENTATIONS.items() if chip() in CHIPS.get(key, (chip(),))}
    if name is not None:
        choose("fp8_matmul", IMPLEMENTATIONS, name)
    if name is not None and name not in fitting:
        raise NotImplementedError(
            f"fp8_matmul: implementation = {name!r} needs FP8 units of {' or '.join(CHIPS[name])}, and this program "
            f"is for {chip()}. Here there are {', '.join(fitting)}; leave the choice empty to take what fits."
        )

    def checked(products):
        products.check(inner, outputs)
        return products

    table = {key: (functools.partial(checked, products), where) for key, (products, where) in fitting.items()}
    return run("fp8_matmul", table, name)


def _alignment(implementation, dense, x, group_sizes):
    if dense:
        return groups.dense(x.shape[0], implementation.rows)
    return groups.align(group_sizes, x.shape[0], implementation.rows)


def _aligned(dense, x, alignment, tile):
    return fill(x, 0, tile) if dense else groups.take(x, alignment.sources)


def _aligned_columns(implementation, dense, x, alignment):
    """x in tiles of 128x1 down the aligned rows, its columns filled up too."""
    x = _aligned(dense, x, alignment, implementation.rows)
    if not dense and platform() == "tpu":
        # libtpu 0.0.42 dies of rows that are gathered in 16 bits and converted to 8 in one fusion.
        x = lax.optimization_barrier(x.astype(jnp.float32))
    return jax.tree.map(lambda part: fill(part, 1), quantize_columns(x, implementation.carrier))


def _rows(implementation, dense, x, w, group_sizes, transposed):
    """Rows of x times their group's w, or its transpose."""
    alignment = _alignment(implementation, dense, x, group_sizes)
    # Rows are quantized one by one, so the 8-bit values are what moves.
    rows = quantize_rows(x, implementation.carrier)
    rows = jax.tree.map(lambda part: _aligned(dense, part, alignment, implementation.rows), rows)
    blocks = quantize_blocks(w, implementation.carrier)
    out = implementation.rows_product(rows, blocks, alignment.tile_groups, transposed, x.dtype)
    out = out[: x.shape[0]] if dense else groups.take(out, alignment.places)
    return out[:, : w.shape[1] if transposed else w.shape[2]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(implementation, dense, x, w, group_sizes):
    return _rows(implementation, dense, x, w, group_sizes, transposed=False)


def _forward(implementation, dense, x, w, group_sizes):
    return _product(implementation, dense, x, w, group_sizes), (x, w, group_sizes)


def _backward(implementation, dense, saved, cotangent):
    x, w, group_sizes = saved
    dx = _rows(implementation, dense, cotangent, w, group_sizes, transposed=True).astype(x.dtype)
    alignment = _alignment(implementation, dense, x, group_sizes)
    columns = [_aligned_columns(implementation, dense, part, alignment) for part in (x, cotangent)]
    dw = implementation.groups_product(*columns, alignment.tile_groups, w.shape[0], w.dtype)
    return dx, dw[:, : w.shape[1], : w.shape[2]], None


_product.defvjp(_forward, _backward)
