"""Checkpoints of a run: asynchronous, atomic, readable on any mesh, and never believed without their digests.

A save copies the state to the memory of the hosts and digests it on the devices, which is all that training waits
for; a thread writes the copy with Orbax. docs/checkpoints.md has the times, the two tiers and what is kept.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from opendeep_jax.checkpoint.digests import compile_digests, start_digests
from opendeep_jax.checkpoint.files import (
    MODEL,
    OPTIMIZER,
    STEP,
    Arrays,
    CorruptCheckpoint,
    Items,
    OtherLayout,
    check_frozen,
    checkpoint_path,
    disk_failures,
    flat,
    flat_digests,
    from_items,
    frozen_digests,
    is_of_model,
    make_record,
    model_groups,
    quarantine,
    read_items,
    remove_partial,
    to_items,
)
from opendeep_jax.checkpoint.local import (
    SHARDS,
    common_steps,
    layout,
    local_root,
    local_shards,
    processes_where,
    read_local_shards,
    read_one_process,
)
from opendeep_jax.checkpoint.versions import LAST_UPDATE, last_update_in, read_any_version
from opendeep_jax.checkpoint.writer import Writer, snapshot
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config
from opendeep_jax.config.schema import CheckpointConfig, RunConfig
from opendeep_jax.display.numbers import human_bytes
from opendeep_jax.models.decoder import Decoder
from opendeep_jax.models.moe import RouterBias
from opendeep_jax.models.parameters import model_definition
from opendeep_jax.parallel.axes import partition_spec
from opendeep_jax.record.files import CHECKPOINTS, ORIGIN, QUARANTINE, checkpoint_steps
from opendeep_jax.record.origin import lost_state_error, read_origin, write_origin


class SaveReport(NamedTuple):
    """Cost of a save for the run."""

    step: int
    stall_seconds: float
    """All that training waited for: the save before, the digests, and the copy to the hosts' memory."""
    bytes: int
    """Bytes of the whole state, over all processes."""
    durable: bool
    """False for the local tier."""
    notes: tuple[str, ...]
    """A paragraph for each failure of the local tier since the last save; the run goes on without it."""


class NoSoundCheckpoint(ConfigError):
    """A run has checkpoints, and none that it could go on from."""


class Checkpoints:
    """The checkpoints of a work directory. Use as a context manager: leaving it waits for the last save.

    Saving raises OSError where the disk does not take it (no space, no permission). What was half-written is removed
    on leaving, and older checkpoints stay. In a job of several processes all call the same methods in the same order.
    """

    def __init__(self, workdir: str | Path, config: CheckpointConfig | None = None):
        """
        Args:
            config: what to keep and where; None only reads.
        Raises:
            ConfigError: where what the run began from cannot be read.
            OSError: where the work directory cannot be written.
        """
        self.workdir = Path(workdir).resolve()
        self.directory = self.workdir / CHECKPOINTS
        self.origin = read_origin(self.workdir)
        self.local, self.notes = None, []
        self.durable = None
        self.pool, self.running, self.digesting = ThreadPoolExecutor(1, "checkpoint"), None, None
        self.frozen: dict[str, str] = {}  # digests of frozen weights, which never change
        if config is not None:
            with disk_failures(self.directory):
                self.durable = Writer(self.directory, config, (MODEL, OPTIMIZER), origin=self.origin["step"])
            if config.local_directory and config.local_every:
                self._open_local(config)
                self._agree_on_local()

    def _open_local(self, config: CheckpointConfig) -> None:
        several = jax.process_count() > 1
        # A process may die with a step that others don't have yet, so the one before is kept, too.
        newest = dataclasses.replace(config, keep=1 + several, keep_every=0, keep_best=0)
        root = local_root(config.local_directory, self.workdir)
        try:
            if (root / CHECKPOINTS).is_dir():
                remove_partial(root / CHECKPOINTS)
            self.local = Writer(root / CHECKPOINTS, newest, (SHARDS,) if several else (MODEL, OPTIMIZER), alone=True)
        except OSError as error:
            self.notes.append(_local_note(root, error))

    def _agree_on_local(self) -> None:
        """Disable the local tier if any process has none: all must save and list at the same time."""
        lacking = processes_where(self.local is None)
        if lacking and self.local:
            self.local.close()
            self.local = None
            self.notes.append(f"Process {lacking[0]} cannot write local checkpoints, so the run goes on without any.")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            with disk_failures(self.directory), contextlib.ExitStack() as stack:
                if self.local:
                    stack.callback(self.local.close)
                if self.durable:
                    stack.callback(self.durable.close)
                stack.callback(self.pool.shutdown)
                self.wait()
        finally:
            if self.durable and jax.process_index() == 0:
                remove_partial(self.directory)

    def wait(self) -> None:
        """Wait until the last save is complete. Raises OSError as `save` does."""
        running, self.running = self.running, None
        if running is not None:
            with disk_failures(self.directory):
                running.result()

    def steps(self) -> list[int]:
        """Return the steps with a complete checkpoint that this process can read, over both tiers, in order."""
        return sorted(
            {*checkpoint_steps(self.directory), *(checkpoint_steps(self.local.directory) if self.local else ())}
        )

    def save(self, state: Any, measure: float | None = None, durable: bool = True) -> SaveReport | None:
        """Start a save; return once `state` may be donated to the next step. None if the checkpoint exists.

        Args:
            measure: held-out bits per byte, by which the best are kept.
            durable: False writes to the local tier only, whose failures are notes and never raise.
        Raises:
            OSError: when the save before failed, or there is no space for this one, of which then nothing is written.
        """
        jax.block_until_ready(state)  # training's own time; from here on it is this save's
        begun = time.perf_counter()
        self.wait()
        items = to_items(state)
        step, last_update = (int(items[OPTIMIZER][name]) for name in (STEP, LAST_UPDATE))
        writer = self.durable if durable else self.local
        if writer is None or step in checkpoint_steps(writer.directory):
            return None
        arrays = flat(items)
        size = sum(array.nbytes for array in arrays.values())
        if durable:
            _check_space(self.directory, size)
        lanes, copies = self._start_digests(arrays), snapshot(items)
        names = flat_digests(arrays, lanes)
        known = {"layout": layout(items), "processes": jax.process_count()}
        if state.frozen:
            self.frozen = self.frozen or frozen_digests(state)
            known["frozen"] = self.frozen
        record = make_record(step, measure, arrays, names, **known, last_update=last_update)
        if writer is self.local and SHARDS in writer.items:
            copies = local_shards(copies)
        jax.block_until_ready(copies)
        self.running = self._begin(writer, step, copies, record)
        notes, self.notes = tuple(self.notes), []
        return SaveReport(step, time.perf_counter() - begun, size, durable, notes)

    def _start_digests(self, arrays: Arrays) -> jax.Array:
        """`start_digests`, by the program that was compiled ahead where there is one."""
        return (self.digesting.result() if self.digesting else start_digests)(arrays)

    def _begin(self, writer: Writer, step: int, copies: Items, record: dict) -> Future:
        def write() -> None:
            writer.save(step, copies, record)
            self._note_saved(step)

        def write_local() -> None:
            try:
                write()
            except Exception as error:  # the fast tier is an extra: whatever befalls it, the run has the other
                remove_partial(writer.directory)
                self.notes.append(_local_note(writer.directory, error))

        if writer is self.local:
            return self.pool.submit(write_local)
        return self.pool.submit(write)

    def _note_saved(self, step: int) -> None:
        """Record that the run has had a checkpoint: from then on it never restarts from its seed."""
        known = "saved" in self.origin
        self.origin.setdefault("saved", step)
        if jax.process_index() == 0 and not (known and (self.workdir / ORIGIN).exists()):
            write_origin(self.workdir, **self.origin)

    def begin(self, state: Any) -> str | None:
        """Record the first state of a run without a checkpoint; return a message if it began once before."""
        if self.origin["kind"] != "random" or self.durable is None:
            return None
        arrays = flat(to_items(state))
        found = flat_digests(arrays, self._start_digests(arrays))
        model = {name: digest for name, digest in found.items() if is_of_model(name)}
        start = hashlib.sha256(json.dumps(model).encode()).hexdigest()[:16]
        before = self.origin.get("start")
        self.origin["start"] = start
        if jax.process_index() == 0:
            write_origin(self.workdir, **self.origin)
        if before is None:
            return None
        same = "as they were" if start == before else "not as they were: devices or versions are others"
        return f"The run begins again at step 0, as it has no checkpoint yet. The weights of its seed are {same}."

    def restore(self, abstract: Any, before: int | None = None) -> tuple[Any, list[str]] | None:
        """Restore the newest intact state, with the shapes and shardings of `abstract`; None where the run may begin
        from its seed: it never had a checkpoint, or none before the state that is asked for.

        Corrupt ones are moved out of the way, to WORKDIR/quarantine, and never deleted.

        Args:
            abstract: its frozen weights are arrays, which become the state's.
            before: only states without an update of this step or later.
        Returns:
            The state, and a paragraph on each checkpoint that was not taken.
        Raises:
            NoSoundCheckpoint: where there are or were checkpoints, or weights that the run began from, none sound.
            ConfigError: where they are of another configuration, or were saved beside other frozen weights.
        """
        self.wait()
        items, notes, elsewhere = to_items(abstract), [], None
        candidates = []
        for local, tier in enumerate((self.directory, *([self.local.directory] if self.local else ()))):
            steps = checkpoint_steps(tier)
            if before is not None:
                steps = [step for step in steps if step < before or last_update_in(tier / str(step)) < before]
            candidates += [(step, local, tier) for step in common_steps(steps)]
        for step, local, directory in sorted(candidates, reverse=True):
            read = None
            if local:
                read = read_local_shards if SHARDS in self.local.items else read_one_process
            try:
                found = read_any_version(directory / str(step), items, read)
                self.frozen = self.frozen or frozen_digests(abstract)
                check_frozen(directory / str(step), self.frozen)
                self._forget_local(after=step)
                if self.durable:
                    self._note_saved(min(self.steps(), default=step))
                return from_items(found, abstract), notes
            except OtherLayout as error:
                elsewhere = directory
                notes.append(f"The checkpoint of step {step:,} in {directory} was not taken: {error}.")
            except CorruptCheckpoint as error:
                notes.append(self._quarantine(step, directory, error))
        if text := lost_state_error(self.workdir, self.origin, before, notes, elsewhere):
            raise NoSoundCheckpoint(text)
        self._forget_local(after=-1)
        if self.durable:  # the first save's program, compiled while the step is
            self.digesting = self.pool.submit(compile_digests, flat(items))
        return None

    def _quarantine(self, step: int, directory: Path, error: CorruptCheckpoint) -> str:
        """Quarantine a corrupt checkpoint, and return a message on it."""
        target, local = None, self.local is not None and directory == self.local.directory
        if self.durable and (local or jax.process_index() == 0):
            target = quarantine(directory / str(step), (directory.parent if local else self.workdir) / QUARANTINE)
        common_steps([])  # all have seen it, and it is gone, before any looks again
        writer = self.local if local else self.durable
        if writer:
            writer.reload()
        where = f" It was moved to {target}." if target else ""
        return f"The checkpoint of step {step:,} in {directory} was not taken: {error}.{where}"

    def _forget_local(self, after: int) -> None:
        """Delete the local tier's checkpoints of steps that the run will repeat. Where only some processes have
        such a checkpoint they would skip the save of that step, which the others wait for, and one that is newer than
        all to come would be kept in their place.
        """
        for step in checkpoint_steps(self.local.directory) if self.local else ():
            if step > after:
                self.local.delete(step)

    def discard_from(self, step: int) -> None:
        """Delete the checkpoints of `step` and later ones in both tiers, after the save that is running.

        Where none is left, the run has gone back to before its first one.
        """
        self.wait()
        for writer in filter(None, (self.durable, self.local)):
            with disk_failures(writer.directory):
                for later in checkpoint_steps(writer.directory):
                    if later >= step and not (writer is self.durable and later == self.origin["step"]):
                        writer.delete(later)
        if not self.steps() and self.origin.pop("saved", None) is not None and jax.process_index() == 0:
            write_origin(self.workdir, **self.origin)


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        sizes = f"a checkpoint takes {human_bytes(needed)}, {human_bytes(free)} are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {sizes}", str(directory))


def _local_note(directory: Path, error: Exception) -> str:
    return (
        f"The local checkpoints in {directory} cannot be written ({' '.join(str(error).split())[:200]}). "
        "The run goes on with those in its work directory."
    )


def load_model(workdir: str | Path, step: int | None = None, mesh: Mesh | None = None) -> tuple[Decoder, RunConfig]:
    """The model of a run's checkpoint (the newest, or that of `step`), and the run's configuration.

    Args:
        mesh: where the weights go, by their logical axes; None puts them on the first device.
    Raises:
        ConfigError: where there is no run, no such checkpoint, or the checkpoint is not sound.
    """
    config, path = load_run_config(workdir), checkpoint_path(Path(workdir).resolve(), step, f"--workdir={workdir}")
    definition = model_definition(config.model.settled())
    axes = definition.axes()

    def placed(name: str, array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = SingleDeviceSharding(jax.devices()[0])
        if mesh is not None:
            sharding = NamedSharding(mesh, partition_spec(axes[name], array.shape, mesh))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    kinds = {"params": nnx.Param, "router_bias": RouterBias}
    abstract = {
        f"{group}.{name}": placed(name, array)
        for group, kind in kinds.items()
        for name, array in definition.shapes(kind).items()
    }
    try:
        arrays = model_groups(read_items(path, {MODEL: abstract})[MODEL])
    except CorruptCheckpoint as error:
        others = ", ".join(str(other) for other in checkpoint_steps(path.parent) if str(other) != path.name) or "none"
        raise ConfigError(
            f"--workdir={workdir}: the checkpoint of step {path.name} is not sound: {error}. "
            f"Give --step of another; there are: {others}."
        ) from error
    return definition.model(arrays["params"], arrays["router_bias"]), config


def remove_partial_saves(workdir: str | Path) -> None:
    """Delete incomplete writes of killed processes; Orbax never reads them, but they take space."""
    remove_partial(Path(workdir) / CHECKPOINTS)
