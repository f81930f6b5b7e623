"""Grouped matmul for TPUs: the kernels of `tpu_rows.py` and `tpu_groups.py`, their tile sizes and their derivatives.

M rows, G groups, K inner size, N output size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels_pallas import target
from kernels_pallas.chips import CHIPS, MIB, UNKNOWN
from kernels_pallas.fitting import ON_TPU, check_dtypes
from kernels_pallas.grouped_matmul import tpu_groups, tpu_rows
from kernels_pallas.tiles import tiles

WIDE = {"granule": 256, "edge": 128, "sub_columns": 512, "chunk": 1792}
"""Tiles for matrix units that are 256 wide (v6e, v7x): fewer rows don't cover the time that loading weights into them
takes."""

MARGIN = 6
"""MiB of it that tiles leave to the compiler: spilled registers, and its own windows."""


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    expected_rows: int | None = None,
    interpret=False,
) -> Float[Array, "M N"]:
    """See `api.grouped_matmul`. Products are summed in float32.

    Args:
        interpret: `pltpu.InterpretParams(...)` runs the kernels in Pallas' interpreter.
    Raises:
        NotImplementedError: for rows that are not bfloat16 or float32, or a contraction, forwards or backwards, too
            long for the chip's vector memory.
    """
    _check(lhs, rhs)
    return _grouped_matmul(_TPUCall(expected_rows, interpret), lhs, rhs.astype(lhs.dtype), group_sizes)


def grouped_swiglu(
    lhs: Float[Array, "M K"],
    gate: Float[Array, "G K N"],
    up: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    row_weights: Float[Array, "M"] | None = None,
    expected_rows: int | None = None,
    interpret=False,
) -> Float[Array, "M N"]:
    """See `api.grouped_swiglu`: both products in one kernel, which reads the rows once and writes what is asked for."""
    _check(lhs, gate, up)
    weights = gate.astype(lhs.dtype), up.astype(lhs.dtype)
    return _grouped_swiglu(_TPUCall(expected_rows, interpret), lhs, *weights, group_sizes, row_weights)


class _TPUCall(NamedTuple):
    """Static arguments of a call."""

    expected_rows: int | None
    interpret: object


def _check(lhs, *rhs):
    """Raise NotImplementedError for operands that the kernels of a product or of its gradients do not take."""
    check_dtypes("grouped_matmul", ON_TPU, lhs)
    (M, K), N, pairs, item, here = lhs.shape, rhs[0].shape[2], len(rhs), lhs.dtype.itemsize, target.chip()
    forward = tpu_rows.RowsShape(M, K, N, 1, pairs, 2 * pairs - 1, item)
    for shape in (forward, tpu_rows.RowsShape(M, N, K, pairs, pairs, 1, item)):
        tpu_rows.fit(defaults(here), shape, cores(here), memory(here))


# ------------------------------------------------------------------------------------------------------ derivatives
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(static, lhs, rhs, group_sizes):
    return _rows(static, [lhs], [rhs], group_sizes)[0]


def _matmul_forward(static, lhs, rhs, group_sizes):
    return _grouped_matmul(static, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _matmul_backward(static, saved, d_out):
    lhs, rhs, group_sizes = saved
    (d_lhs,) = _rows(static, [d_out], [rhs], group_sizes, transposed=True)
    return d_lhs, _groups(static, lhs, d_out, group_sizes), None


_grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_swiglu(static, lhs, gate, up, group_sizes, row_weights):
    return _swiglu(static, lhs, gate, up, group_sizes, row_weights, 1)[0]


def _swiglu_forward(static, lhs, gate, up, group_sizes, row_weights):
    hidden, gated, upped = _swiglu(static, lhs, gate, up, group_sizes, row_weights, 3)
    saved = checkpoint_name(gated, "expert_gate"), checkpoint_name(upped, "expert_up")
    return hidden, (lhs, gate, up, group_sizes, row_weights, *saved)


def _swiglu_backward(static, saved, d_hidden):
    lhs, gate, up, group_sizes, row_weights, gated, upped = saved
    d_gated, d_upped, d_row_weights = swiglu_gradients(d_hidden, gated, upped, row_weights)
    if row_weights is not None:
        # Beyond the groups d_hidden may be anything; the kernels never look there.
        beyond = jnp.arange(lhs.shape[0]) >= jnp.sum(group_sizes)
        d_row_weights = jnp.where(beyond, 0, d_row_weights).astype(row_weights.dtype)
    (d_lhs,) = _rows(static, [d_gated, d_upped], [gate, up], group_sizes, transposed=True)
    d_gate, d_up = (_groups(static, lhs, d, group_sizes) for d in (d_gated, d_upped))
    return d_lhs, d_gate, d_up, None, d_row_weights


_grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def swiglu_gradients(
    d_hidden: Float[Array, "M N"],
    gated: Float[Array, "M N"],
    upped: Float[Array, "M N"],
    row_weights: Float[Array, "M"] | None,
) -> tuple[Float[Array, "M N"], Float[Array, "M N"], Float[Array, "M"] | None]:
    """Return the gradients of sum(silu(gated) * upped * row_weights * d_hidden); those of the weights in float32."""
    d_hidden, gated, upped, dtype = *(x.astype(jnp.float32) for x in (d_hidden, gated, upped)), gated.dtype
    gate = jax.nn.sigmoid(gated)
    silu = gated * gate
    d_row_weights = None if row_weights is None else jnp.sum(d_hidden * silu * upped, axis=1)
    if row_weights is not None:
        d_hidden *= row_weights.astype(jnp.float32)[:, None]
    d_gated = d_hidden * upped * gate * (1 + gated - silu)
    return d_gated.astype(dtype), (d_hidden * silu).astype(dtype), d_row_weights


# ---------------------------------------------------------------------------------------------------------- kernels
def _swiglu(static, lhs, gate, up, group_sizes, row_weights, outputs):
    silu = dict(epilogue=tpu_rows.silu_product, outputs=outputs)
    return _rows(static, [lhs], [gate, up], group_sizes, row_weights, **silu)


def _rows(static, lhs, rhs, group_sizes, row_weights=None, transposed=False, **options):
    """`tpu_rows.rows_by_groups` with this chip's tiles, memory and cost."""
    (M, C), G, pairs = lhs[0].shape, rhs[0].shape[0], len(rhs)
    W, outputs = rhs[0].shape[1 if transposed else 2], options.get("outputs", 1)
    kind = "grouped_swiglu" if "epilogue" in options else "grouped_matmul"
    kind += "_transposed" * transposed + "_sum" * (len(lhs) > 1)
    chip = target.chip()
    shape = tpu_rows.RowsShape(M, C, W, len(lhs), pairs, outputs, lhs[0].dtype.itemsize)
    sizes = tpu_rows.fit(wanted(kind, chip, C, W), shape, cores(chip), memory(chip))
    rows = static.expected_rows or M
    item = lhs[0].dtype.itemsize
    moved = len(lhs) * rows * C * -(-W // sizes.columns) + pairs * G * C * W + outputs * rows * W
    return tpu_rows.rows_by_groups(
        lhs,
        rhs,
        group_sizes,
        row_weights,
        tiles=sizes,
        transposed=transposed,
        vmem_limit=limit(chip),
        cost=pl.CostEstimate(
            flops=2 * pairs * rows * C * W,
            transcendentals=rows * W if kind == "grouped_swiglu" else 0,
            bytes_accessed=moved * item,
        ),
        name=kind,
        interpret=static.interpret,
        **options,
    )


def _groups(static, x, y, group_sizes):
    """`tpu_groups.groups_from_rows` with this chip's tiles, memory and cost; in the operands' dtype."""
    (M, K), N, G, chip, item = x.shape, y.shape[1], group_sizes.shape[0], target.chip(), x.dtype.itemsize
    kind = "grouped_matmul_weights"
    shape = tpu_groups.GroupsShape(M, K, N, item)
    sizes = tpu_groups.fit(wanted(kind, chip, K, N), shape, cores(chip), memory(chip))
    rows = static.expected_rows or M
    moved = rows * K * -(-N // sizes.columns) + rows * N * -(-K // sizes.inner) + G * K * N
    return tpu_groups.groups_from_rows(
        x,
        y,
        group_sizes,
        dtype=x.dtype,
        tiles=sizes,
        vmem_limit=limit(chip),
        cost=pl.CostEstimate(flops=2 * rows * K * N, transcendentals=0, bytes_accessed=moved * item),
        name=kind,
        interpret=static.interpret,
    )


def defaults(chip: str) -> dict[str, int]:
    """Return this chip's deviations from the kernels' default tiles."""
    return WIDE if _facts(chip).matrix > 128 else {}


def wanted(kind: str, chip: str, inner: int, out: int) -> dict[str, int]:
    """Return a kernel's tiles from the table, with this chip's defaults for the rest."""
    return defaults(chip) | tiles(kind, chip, inner=inner, out=out)


def cores(chip: str) -> int:
    """Return the number of TensorCores that share a kernel's columns."""
    return _facts(chip).cores


def memory(chip: str) -> int:
    """Bytes that a kernel's windows and scratch may take."""
    return _facts(chip).memory - MARGIN * MIB


def limit(chip: str) -> int:
    """The limit that a kernel asks the compiler for, in bytes."""
    return _facts(chip).memory - MIB


def _facts(chip):
    return CHIPS.get(chip, UNKNOWN["tpu"])
