"""Checkpoints of a run: asynchronous, atomic, readable on any mesh (Orbax).

Each holds two items: `model` (params and router biases by name) and `optimizer` (step and moments by path), so that
what only wants the model reads only the model.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config
from opendeep_jax.config.schema import CheckpointConfig, RunConfig
from opendeep_jax.models.decoder import Decoder
from opendeep_jax.models.moe import RouterBias
from opendeep_jax.models.parameters import skeleton
from opendeep_jax.parallel.axes import partition_spec
from opendeep_jax.train.progress import human_bytes
from opendeep_jax.train.state import TrainState

DIRECTORY = "checkpoints"


class Checkpoints:
    """The checkpoints of a work directory. Use as a context manager: leaving it waits for the last save.

    Saving raises OSError where the disk does not take it (no space, no permission). What was half-written is removed
    on leaving, and older checkpoints stay.
    """

    def __init__(self, workdir: str | Path, config: CheckpointConfig | None = None):
        _quieten_orbax()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=(config.keep or None) if config else None, read_only=config is None, create=config is not None
        )
        self.writable = config is not None
        self.directory = Path(workdir).absolute() / DIRECTORY
        self.manager = ocp.CheckpointManager(self.directory, options=options, item_names=("model", "optimizer"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            with _disk_failures(self.directory), contextlib.closing(self.manager):
                self.manager.wait_until_finished()
        finally:
            if self.writable:
                remove_partial_saves(self.directory.parent)

    def wait(self) -> None:
        """Returns when the last save is whole. Raises OSError as `save` does."""
        with _disk_failures(self.directory):
            self.manager.wait_until_finished()

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, in order."""
        return sorted(self.manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Begins to write `state`; returns when the state may be donated to the next step.

        Raises:
            OSError: when the save before failed, or there is no space for this one, of which then nothing is written.
        """
        self.wait()
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        needed = sum(array.nbytes for array in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            sizes = f"a checkpoint takes {human_bytes(needed)}, {human_bytes(free)} are free"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {sizes}", str(self.directory))
        model, optimizer = _items(state)
        save = ocp.args.StandardSave
        with _disk_failures(self.directory):
            self.manager.save(step, args=ocp.args.Composite(model=save(model), optimizer=save(optimizer)))

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest state, with the shapes and shardings of `abstract`; None where there is no checkpoint."""
        step = self.manager.latest_step()
        if step is None:
            return None
        model, optimizer = _items(abstract)
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore(model), optimizer=ocp.args.StandardRestore(optimizer)
            ),
        )
        leaves = restored["optimizer"]["opt_state"]
        paths = [path for path, _ in _named_leaves(abstract.opt_state)]
        opt_state = jax.tree.unflatten(jax.tree.structure(abstract.opt_state), [leaves[path] for path in paths])
        return TrainState(restored["optimizer"]["step"], opt_state=opt_state, **restored["model"])

    def restore_model(self, abstract: dict, step: int) -> dict:
        """The `model` item of a step: {"params": …, "router_bias": …}."""
        args = ocp.args.Composite(model=ocp.args.StandardRestore(abstract))
        return self.manager.restore(step, args=args)["model"]


def _items(state: TrainState) -> tuple[dict, dict]:
    model = {"params": state.params, "router_bias": state.router_bias}
    return model, {"step": state.step, "opt_state": dict(_named_leaves(state.opt_state))}


def _named_leaves(tree) -> list[tuple[str, jax.Array]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def load_model(workdir: str | Path, step: int | None = None, mesh: Mesh | None = None) -> tuple[Decoder, RunConfig]:
    """The model of a run's checkpoint (the newest, or that of `step`), and the run's configuration.

    Args:
        mesh: where the weights go, by their logical axes; None puts them on the first device.
    Raises:
        ConfigError: where there is no run, or no such checkpoint.
    """
    config = load_run_config(workdir)
    if not (Path(workdir) / DIRECTORY).is_dir():
        raise ConfigError(f"--workdir={workdir}: has no checkpoint yet. Let `opendeep train` reach its first one.")
    bones = skeleton(config.model)
    axes = bones.axes()

    def placed(name: str, array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = SingleDeviceSharding(jax.devices()[0])
        if mesh is not None:
            sharding = NamedSharding(mesh, partition_spec(axes[name], array.shape, mesh))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    with Checkpoints(workdir) as checkpoints:
        steps = checkpoints.steps()
        if not steps or step not in (None, *steps):
            there = ", ".join(map(str, steps)) or "none"
            raise ConfigError(f"--workdir={workdir}: has no checkpoint of step {step}; there are: {there}.")
        kinds = {"params": nnx.Param, "router_bias": RouterBias}
        abstract = {
            item: {name: placed(name, array) for name, array in bones.shapes(kind).items()}
            for item, kind in kinds.items()
        }
        arrays = checkpoints.restore_model(abstract, steps[-1] if step is None else step)
    return bones.model(arrays["params"], arrays["router_bias"]), config


@contextlib.contextmanager
def _disk_failures(directory: Path) -> Iterator[None]:
    """Raises every refusal of the disk as an OSError that names `directory`.

    tensorstore raises ValueError, with the number in its text: `… No space left on device [os_error_code='28']`.
    """
    try:
        yield
    except Exception as error:
        found = re.search(r"os_error_code='(\d+)'", str(error))
        number = error.errno if isinstance(error, OSError) else found and int(found[1])
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(directory)) from error


def _quieten_orbax() -> None:
    """Keeps Orbax from printing the frames of failures that it raises anyway, unless the log level is info or more."""
    if not logging.getLogger("absl").isEnabledFor(logging.INFO):
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").addFilter(_is_no_disk_failure)


def _is_no_disk_failure(record: logging.LogRecord) -> bool:
    return "os_error_code" not in record.getMessage()


def remove_partial_saves(workdir: str | Path) -> None:
    """Deletes what a killed process left half-written; Orbax never reads it, but it takes space."""
    for path in (Path(workdir) / DIRECTORY).glob("*orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)
