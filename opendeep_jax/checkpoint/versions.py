"""Checkpoints that an older version wrote (format 0), read as what they would be now."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from opendeep_jax.checkpoint.files import (
    OPTIMIZER,
    CorruptCheckpoint,
    Items,
    open_array,
    read_items,
    read_record,
    reading,
)

LAST_UPDATE = ".health.last_update"
IN_A_ROW = ".health.skipped_in_a_row"
"""Updates skipped since the last one, which LAST_UPDATE has replaced."""
NEW = {".health.norms": np.nan, ".health.high": 0, LAST_UPDATE: 0, ".health.stretch": 0}
"""Arrays that checkpoints with IN_A_ROW lack, each with the value that a new run fills it with."""


def read_any_version(path: Path, items: Items, read: Callable[[Path, Items], Items] | None = None) -> Items:
    """Return what `files.read_items` does; what an older checkpoint lacks has the value of a new run.

    Raises as that does.
    """
    try:
        older = IN_A_ROW in read_record(path)["arrays"]
    except CorruptCheckpoint:
        older = False  # the reader says what is wrong with it, in all processes
    if not older or OPTIMIZER not in items:
        return read_items(path, items, read)
    abstract = items[OPTIMIZER]
    wanted = {name: array for name, array in abstract.items() if name not in NEW}
    found = read_items(path, items | {OPTIMIZER: wanted | {IN_A_ROW: abstract[LAST_UPDATE]}}, read)
    in_a_row = int(found[OPTIMIZER].pop(IN_A_ROW).addressable_data(0))
    values = NEW | {LAST_UPDATE: int(path.name) - in_a_row}
    return found | {OPTIMIZER: found[OPTIMIZER] | {name: _filled(values[name], abstract[name]) for name in NEW}}


def _filled(value: float, like: jax.ShapeDtypeStruct) -> jax.Array:
    whole = np.full(like.shape, value, like.dtype)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: jnp.asarray(whole[index]))


def last_update_in(path: Path) -> int:
    """Return the step of the last update in a checkpoint's state; its own step where that cannot be told."""
    try:
        record = read_record(path)
        if "last_update" in record:
            return record["last_update"]
        if IN_A_ROW not in record["arrays"]:
            return int(path.name)
        with reading(path):
            skipped = open_array(path / OPTIMIZER, IN_A_ROW, tensorstore.Context()).read().result()
        return int(path.name) - int(skipped)
    except CorruptCheckpoint:
        return int(path.name)
