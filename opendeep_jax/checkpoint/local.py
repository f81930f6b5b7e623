"""The fast tier: frequent checkpoints on each machine's own disk or memory.

One process keeps the same files as in the work directory. In a job of several processes each keeps the shards of its
own devices, so a checkpoint is only read by as many processes, whose devices hold the same shards.
"""

import dataclasses
import hashlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from opendeep_jax.checkpoint.files import (
    MODEL,
    OPTIMIZER,
    Items,
    OtherLayout,
    key_value_store,
    read_arrays,
    read_record,
)

SHARDS = "shards"


def local_root(local_directory: str, workdir: Path) -> Path:
    """Return this process's directory of the fast tier of a run, named by the work directory's path."""
    return _of_run(local_directory, workdir) / f"process_{jax.process_index()}"


def _of_run(local_directory: str, workdir: Path) -> Path:
    return Path(local_directory).resolve() / hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]


def layout(items: Items) -> str:
    """Return a text that is equal for (possibly abstract) arrays of equal sharding."""
    hashed = hashlib.sha256(str(jax.process_count()).encode())
    for item in (MODEL, OPTIMIZER):
        for name, array in sorted(items[item].items()):
            shards = array.sharding.devices_indices_map(tuple(array.shape)).items()
            placed = sorted((device.id, device.process_index, str(index)) for device, index in shards)
            hashed.update(f"{name} {array.shape} {placed}".encode())
    return hashed.hexdigest()[:16]


def local_shards(items: Items) -> Items:
    """The shards of this process's devices, each once, as numpy arrays of their own."""
    return {
        SHARDS: {
            _shard_name(item, name, index): shard
            for item, arrays in items.items()
            for name, array in arrays.items()
            for index, shard in {str(x.index): np.asarray(x.data) for x in reversed(array.addressable_shards)}.items()
        }
    }


def read_local_shards(path: Path, items: Items) -> Items:
    """Return arrays like the abstract ones in `items` from what all processes kept with `local_shards`.

    Raises CorruptCheckpoint.
    """
    if read_record(path).get("layout") != layout(items):
        raise OtherLayout("its parts were saved by other devices or processes than there are now")
    wanted = {}
    for item, arrays in items.items():
        for name, array in arrays.items():
            shape = array.sharding.shard_shape(tuple(array.shape))
            for device, index in array.sharding.addressable_devices_indices_map(tuple(array.shape)).items():
                sharding = jax.sharding.SingleDeviceSharding(device)
                wanted.setdefault(
                    _shard_name(item, name, str(index)), jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)
                )
    found = read_arrays(path / SHARDS, wanted)

    def whole(item: str, name: str, array: jax.ShapeDtypeStruct) -> jax.Array:
        places = array.sharding.addressable_devices_indices_map(tuple(array.shape)).items()
        shards = [jax.device_put(found[_shard_name(item, name, str(index))], device) for device, index in places]
        return jax.make_array_from_single_device_arrays(tuple(array.shape), array.sharding, shards)

    return {item: {name: whole(item, name, array) for name, array in arrays.items()} for item, arrays in items.items()}


class ShardsHandler(ocp.CheckpointHandler):
    """Writer of one process's numpy arrays in Orbax's format; Orbax itself allows only process 0 to write."""

    def save(self, directory: Path, args: "ShardsSave") -> None:
        """Write all arrays as one transaction."""
        base = key_value_store(Path(directory))
        with tensorstore.Transaction() as transaction:
            writes = []
            for name, array in args.item.items():
                spec = {
                    "driver": "zarr",
                    "kvstore": {**base, "path": f"{name}/"},
                    "metadata": {"compressor": None, "chunks": [max(size, 1) for size in array.shape]},
                }
                store = tensorstore.open(
                    spec, create=True, dtype=array.dtype, shape=array.shape, transaction=transaction
                ).result()
                writes.append(store.write(array))
            for write in writes:
                write.copy.result()

    def restore(self, directory: Path, args: object = None) -> None:
        """Raise NotImplementedError: `read_local_shards` reads."""
        raise NotImplementedError


@ocp.args.register_with_handler(ShardsHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class ShardsSave(ocp.args.CheckpointArgs):
    """Arrays for ShardsHandler, by name."""

    item: dict[str, np.ndarray]


def _shard_name(item: str, name: str, index: str) -> str:
    return f"{item} {name} {index}"


def read_one_process(path: Path, items: Items) -> Items:
    """Read arrays like the abstract ones in `items` from one process's files. Raises CorruptCheckpoint."""
    if (path / SHARDS).is_dir():
        raise OtherLayout("its parts were saved by other devices or processes than there are now")
    return {item: read_arrays(path / item, arrays) for item, arrays in items.items()}


def common_steps(steps: list[int]) -> list[int]:
    """Return the steps that all processes have; a collective call."""
    if jax.process_count() == 1:
        return steps
    most = max(int(_of_all(np.int32(len(steps))).max()), 1)
    own = np.full(most, -1, np.int32)
    own[: len(steps)] = steps
    return sorted(set.intersection(*({int(step) for step in row if step >= 0} for row in _of_all(own))))


def processes_where(fact: bool) -> list[int]:
    """Return the processes that pass True; a collective call."""
    return [int(index) for index in np.flatnonzero(_of_all(np.array(fact)))]


def _of_all(values: np.ndarray) -> np.ndarray:
    """Gather each process's array, [processes, ...]; all have the same shape."""
    if jax.process_count() == 1:
        return values[None]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(values)


def local_roots(local_directory: str, workdir: Path) -> list[Path]:
    """The fast tiers of a run on this machine, one for each process; empty where there are none."""
    return sorted(_of_run(local_directory, workdir).glob("process_*")) if local_directory else []
