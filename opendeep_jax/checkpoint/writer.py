"""Writing checkpoints with Orbax, in a thread of its own, from a copy that the next step cannot touch."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from opendeep_jax.checkpoint.files import RECORD, Items, quieten_orbax, read_measure, remove_partial
from opendeep_jax.checkpoint.local import SHARDS, ShardsHandler, ShardsSave
from opendeep_jax.checkpoint.policy import KeepPolicy
from opendeep_jax.config.operations import CheckpointConfig
from opendeep_jax.record.files import checkpoint_steps


class Writer:
    """Blocking writer of checkpoints to one directory; deletes those that the policy does not keep.

    Processes wait for each other through the coordination service, never through the devices, so `save` may run
    beside the training step.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        items: tuple[str, ...],
        alone: bool = False,
        origin: int | None = None,
    ):
        """
        Args:
            items: names of the pytrees that a checkpoint holds besides its record.
            alone: this process writes without the others, into a directory of its own.
            origin: the step of the checkpoint that the run began from.
        """
        quieten_orbax()
        self.directory, self.items, self.alone = directory, items, alone
        directory.mkdir(parents=True, exist_ok=True)
        me, count = jax.process_index(), jax.process_count()
        processes = {me} if alone else set(range(count)) if count > 1 else None
        several = ocp.options.MultiprocessingOptions(me if alone else 0, processes, directory.name if alone else None)
        # Weights hardly compress, and compressing them takes most of a save's time.
        arrays = functools.partial(ocp.PyTreeCheckpointHandler, use_compression=False, multiprocessing_options=several)
        handlers = {item: ShardsHandler() if item == SHARDS else arrays() for item in items}
        handlers[RECORD] = ocp.JsonCheckpointHandler(multiprocessing_options=several)
        self.measures = {step: read_measure(directory / str(step)) for step in checkpoint_steps(directory)}
        self.manager = ocp.CheckpointManager(
            directory,
            item_handlers=handlers,
            options=ocp.CheckpointManagerOptions(
                create=False,
                enable_async_checkpointing=False,
                multiprocessing_options=several,
                preservation_policy=KeepPolicy(config, self.measures, origin),
                save_root_metadata=False,
            ),
        )

    def save(self, step: int, items: Items, record: dict) -> None:
        """Write a checkpoint, then delete those that are no longer kept."""
        self.measures[step] = record["measure"]
        kinds = {SHARDS: ShardsSave}
        parts = {item: kinds.get(item, ocp.args.PyTreeSave)(arrays) for item, arrays in items.items()}
        self.manager.save(step, args=ocp.args.Composite(**parts, **{RECORD: ocp.args.JsonSave(record)}), force=True)

    def delete(self, step: int) -> None:
        """Delete the checkpoint of a step."""
        self.manager.delete(step)

    def reload(self) -> None:
        """Reread the directory after a checkpoint was moved out of it."""
        self.manager.reload()

    def close(self) -> None:
        """Close the manager and delete incomplete checkpoints."""
        try:
            self.manager.close()
        finally:
            if self.alone or jax.process_index() == 0:
                remove_partial(self.directory)


def snapshot(arrays: Any) -> Any:
    """Start copying a pytree of arrays to their hosts' memory, without waiting.

    Device memory holds no second copy, and what becomes of the originals, donation included, does not reach this one.
    """
    return jax.tree.map(_on_host, arrays)


def _on_host(array: jax.Array) -> jax.Array:
    kinds = {memory.kind for memory in next(iter(array.sharding.addressable_devices)).addressable_memories()}
    if "pinned_host" not in kinds:
        return jnp.copy(array)
    sharding = array.sharding.with_memory_kind("pinned_host")
    if array.is_fully_addressable:
        return jax.device_put(array, sharding)
    shards = [
        jax.device_put(shard.data, shard.data.sharding.with_memory_kind("pinned_host"))
        for shard in array.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)
