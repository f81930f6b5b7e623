"""Weights of the hub's files as numbers: any part of a tensor, in our layout, quantized or not.

DeepSeek publishes float8 with a scale for each block of 128 x 128; OpenAI publishes MXFP4: two 4-bit numbers in a byte,
and an exponent for every 32 (OCP Microscaling Formats 1.0). Both are multiplied out as they are read.
"""

import math
from collections.abc import Mapping

import numpy as np

from opendeep_jax.interop.hf_layout import HubTensor
from opendeep_jax.interop.safetensors import DTYPES, StoredTensor

FP8_BLOCK = 128
MXFP4_BLOCK = 32
FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FLOATS = tuple(DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))
FP8 = (DTYPES["F8_E4M3"],)
BYTES = (DTYPES["U8"],)

Stored = Mapping[str, StoredTensor]
Form = tuple[tuple[int, ...], tuple[np.dtype, ...]]


def forms(tensor: HubTensor, stored: Stored) -> dict[str, Form]:
    """Return the shape and allowed dtypes by name that the files must hold for a tensor, given the names they have."""
    name, shape = tensor.name, tensor.shape
    if f"{name}_blocks" in stored and len(shape) == 3:
        rows = (*shape[:-2], shape[-1], -(-shape[-2] // MXFP4_BLOCK))
        return {f"{name}_blocks": ((*rows, MXFP4_BLOCK // 2), BYTES), f"{name}_scales": (rows, BYTES)}
    if f"{name}_scale_inv" in stored and len(shape) == 2:
        blocks = tuple(-(-size // FP8_BLOCK) for size in shape)
        return {name: (shape, FP8), f"{name}_scale_inv": (blocks, FLOATS)}
    return {name: (shape, FLOATS)}


def read_into(out: np.ndarray, tensor: HubTensor, stored: Stored, part: tuple[slice, ...]) -> None:
    """Fill `out` with a part of a tensor in our layout; only what it needs of the files is looked at.

    Args:
        part: Of each dimension of tensor.our_shape.
    """
    name = tensor.name
    if f"{name}_blocks" in stored:
        _read_mxfp4(out, stored[f"{name}_blocks"].read(), stored[f"{name}_scales"].read(), tensor, part)
    elif f"{name}_scale_inv" in stored:
        _read_fp8(out, stored[name].read(), stored[f"{name}_scale_inv"].read(), tensor, part)
    else:
        out[...] = tensor.from_hub(stored[name].read())[part]


def _read_fp8(
    out: np.ndarray, values: np.ndarray, scales: np.ndarray, tensor: HubTensor, part: tuple[slice, ...]
) -> None:
    """Dequantize values [rows, columns]; the file's rows are our outputs, its columns our inputs."""
    outputs, inputs = part[tensor.inputs :], part[: tensor.inputs]
    rows = np.arange(len(values)).reshape(tensor.our_shape[tensor.inputs :])[outputs].reshape(-1)
    columns = np.arange(values.shape[1]).reshape(tensor.our_shape[: tensor.inputs])[inputs].reshape(-1)
    if not out.size:
        return
    first, last, left = rows.min(), rows.max() + 1, columns.min()
    box = values[first:last, left : columns.max() + 1].astype(np.float32)
    scales = scales.astype(np.float32).repeat(FP8_BLOCK, axis=1)[:, left : columns.max() + 1]
    for block in range(first // FP8_BLOCK, -(-last // FP8_BLOCK)):
        box[max(block * FP8_BLOCK - first, 0) : (block + 1) * FP8_BLOCK - first] *= scales[block]
    if box.size != out.size:  # heads are cut where the box is not
        box = box[np.ix_(rows - first, columns - left)]
    out[...] = box.T.reshape(out.shape)


def _read_mxfp4(
    out: np.ndarray, blocks: np.ndarray, scales: np.ndarray, tensor: HubTensor, part: tuple[slice, ...]
) -> None:
    """Dequantize blocks [E, columns, rows / 32, 16] with scales [E, columns, rows / 32] into [E, rows, columns]."""
    experts, rows, columns = part
    chosen = range(blocks.shape[1])[tensor.columns][columns]
    chosen = slice(chosen.start, chosen.stop, chosen.step)
    for place, expert in enumerate(range(blocks.shape[0])[experts]):
        packed, exponents = blocks[expert, chosen], scales[expert, chosen].astype(np.int32) - 127
        values = np.empty((*packed.shape[:-1], MXFP4_BLOCK), np.float32)
        values[..., 0::2] = FP4_VALUES[packed & 15]
        values[..., 1::2] = FP4_VALUES[packed >> 4]
        values = np.ldexp(values, exponents[..., None]).reshape(len(packed), -1)
        out[place] = values.T[rows]


def elements(stored: Stored) -> int:
    """Return the most numbers that the files can hold."""
    return sum(math.prod(tensor.shape) * (2 if tensor.dtype in BYTES else 1) for tensor in stored.values())
