"""Checkpoints that an older version wrote, read as what they would be now."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from opendeep_jax.checkpoint.files import OPTIMIZER, Items, Unsound, open_array, read_items, read_record, reading
from opendeep_jax.faults.health import new_health

IN_A_ROW = ".health.skipped_in_a_row"
"""Updates skipped since the last one, which `.health.last_update` has replaced."""
NEW = (".health.norms", ".health.high", ".health.last_update", ".health.stretch")


def read_any_version(path: Path, items: Items, read: Callable[[Path, Items], Items] | None = None) -> Items:
    """Return what `checkpoint_files.read_items` does; what an older checkpoint lacks has the value of a new run.

    Raises as that does.
    """
    try:
        older = IN_A_ROW in read_record(path)["arrays"]
    except Unsound:
        older = False  # the reader says what is wrong with it, in all processes
    if not older or OPTIMIZER not in items:
        return read_items(path, items, read)
    abstract = items[OPTIMIZER]
    like = abstract[NEW[2]]
    wanted = {name: array for name, array in abstract.items() if name not in NEW}
    found = read_items(path, items | {OPTIMIZER: wanted | {IN_A_ROW: like}}, read)
    in_a_row = int(found[OPTIMIZER].pop(IN_A_ROW).addressable_data(0))
    fresh = new_health(int(path.name) - in_a_row)
    values = {f".health.{name}": np.asarray(value) for name, value in fresh._asdict().items()}
    return found | {OPTIMIZER: found[OPTIMIZER] | {name: _placed(values[name], abstract[name]) for name in NEW}}


def _placed(value: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: jnp.asarray(value[index]))


def last_update(path: Path) -> int:
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
    except Unsound:
        return int(path.name)
