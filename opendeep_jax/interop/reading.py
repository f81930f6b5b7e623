"""Parts shared by all readers: the dtype to compute in, arrays that JAX takes uncopied, and their placement."""

import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.models.parameters import ModelDefinition
from opendeep_jax.parallel.axes import partition_spec

MAX_NAMED = 20
ALIGNMENT = 64
"""Bytes; JAX takes a host array that begins at a multiple of this without copying it."""


def compute_dtype(dtype) -> np.dtype:
    """Return the named dtype. Raises ConfigError for any but float32 and bfloat16."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype = {name}: a model computes in float32 or bfloat16. Choose one of the two.")
    return jnp.dtype(name)


def empty(shape: Sequence[int], dtype) -> np.ndarray:
    """Return an uninitialized array that begins where JAX can take it as it is."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def weight_sharding(definition: ModelDefinition, name: str, mesh: Mesh | None) -> NamedSharding | None:
    """Return the training sharding of one of a model's arrays; None, the default device, without a mesh."""
    if mesh is None:
        return None
    return NamedSharding(
        mesh, partition_spec(definition.axes()[name], definition.shapes()[name].shape, mesh, at_rest=True)
    )


def describe_mismatch(problems: Mapping[str, Sequence[str]]) -> str:
    """`2 missing: a, b; 1 unexpected: c` of names by what is wrong with them; empty where there are none.

    Only the first few are named: one missing expert layer is hundreds of tensors.
    """
    parts = []
    for kind, names in problems.items():
        more = f", and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        if names:
            parts.append(f"{len(names)} {kind}: {', '.join(sorted(names)[:MAX_NAMED])}{more}")
    return "; ".join(parts)
