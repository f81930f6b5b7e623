"""Files of a checkpoint, and reading them with every array's digest compared.

    checkpoints/STEP/model       weights and router biases: params.NAME, router_bias.NAME
    checkpoints/STEP/optimizer   all else of the state, by path: .step, .opt_state[0].mu['NAME'], …
    checkpoints/STEP/digests     the record (JSON): step, time, measure, version, and each array's digest, shape, dtype

The arrays are written by Orbax. A step's directory appears under its name in one rename, when it is whole.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

import opendeep_jax
from opendeep_jax.checkpoint.digests import finish_digests, named_leaves, start_digests
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.record.files import CHECKPOINTS, checkpoint_steps
from opendeep_jax.record.record import now

RECORD = "digests"
MODEL, OPTIMIZER = "model", "optimizer"
STEP = ".step"
"""Name of the array with the number of steps done."""
GROUPS = ("params", "router_bias")
"""Fields of the training state that make up the model."""

READERS = 8
"""Arrays that are read at once."""
FORMAT = 1
"""Version of a checkpoint's layout and record. 0: before versions were written; `versions` reads it."""

Arrays = dict[str, Any]
Items = dict[str, Arrays]


class CorruptCheckpoint(Exception):
    """A checkpoint that cannot be read as it was written; the message says what is wrong with it."""


class OtherLayout(CorruptCheckpoint):
    """A checkpoint that is whole, as far as one sees, and made for other devices than there are."""


def to_items(state: Any) -> Items:
    """Return the arrays of a (possibly abstract) TrainState as they are stored: {"model": {…}, "optimizer": {…}}.

    Frozen weights are not: a checkpoint has their digests (`frozen_digests`).
    """
    model = {f"{group}.{name}": array for group in GROUPS for name, array in getattr(state, group).items()}
    rest = named_leaves(state._replace(frozen={}))
    return {MODEL: model, OPTIMIZER: {name: leaf for name, leaf in rest.items() if not is_of_model(name)}}


def flat(items: Items) -> Arrays:
    """Return the arrays of all items by name."""
    return {name: array for arrays in items.values() for name, array in arrays.items()}


def from_items(items: Items, like: Any) -> Any:
    """The state of `like`'s structure with the arrays of `to_items`, and `like`'s own frozen weights."""
    model = {f".{group}[{name!r}]": array for group, name, array in _grouped(items[MODEL])}
    leaves, trained = model | items[OPTIMIZER], like._replace(frozen={})
    state = jax.tree.unflatten(jax.tree.structure(trained), [leaves[name] for name in named_leaves(trained)])
    return state._replace(frozen=like.frozen)


def frozen_digests(state: Any) -> dict[str, str]:
    """Return the digests of a state's frozen weights, by group and name: `base.embedding.embedding`."""
    arrays = {f"{group}.{name}": array for group, arrays in state.frozen.items() for name, array in arrays.items()}
    return flat_digests(arrays) if arrays else {}


def check_frozen(path: Path, digests: Mapping[str, str]) -> None:
    """Raise ConfigError unless the checkpoint in `path` was saved beside frozen weights of these digests."""
    saved = read_record(path).get("frozen", {})
    if wrong := sorted(name for name in {*saved, *digests} if saved.get(name) != digests.get(name)):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(
            f"{path}: was saved beside other frozen weights: {', '.join(wrong[:3])}{more} differ from those given now. "
            "Give the model that the run began with."
        )


def model_groups(model: Arrays) -> dict[str, Arrays]:
    """{"params": {…}, "router_bias": {…}} of a `model` item."""
    groups = {group: {} for group in GROUPS}
    for group, name, array in _grouped(model):
        groups[group][name] = array
    return groups


def is_of_model(name: str) -> bool:
    """Return whether an array, by its name in a checkpoint or its path in the state, makes up the model."""
    return re.match(r"\.?(\w+)", name)[1] in GROUPS


def _grouped(model: Arrays) -> Iterator[tuple[str, str, Any]]:
    for full_name, array in model.items():
        group, _, name = full_name.partition(".")
        yield group, name, array


def make_record(step: int, measure: float | None, arrays: Arrays, names: Mapping[str, str], **more: Any) -> dict:
    """Return a checkpoint's record, for JSON. `names` is each array's digest."""
    described = {
        name: {"digest": names[name], "shape": list(array.shape), "dtype": str(array.dtype)}
        for name, array in arrays.items()
    }
    record = {
        "step": step,
        "time": now(),
        "measure": measure if measure is not None and math.isfinite(measure) else None,
        "version": opendeep_jax.__version__,
        "format": FORMAT,
        "arrays": described,
        **more,
    }
    return record | {"record": _own_digest(record)}


def _own_digest(record: dict) -> str:
    """SHA-256 of a record but for its own digest."""
    text = json.dumps({name: value for name, value in record.items() if name != "record"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(path: Path) -> dict:
    """Return the record of the checkpoint in `path`.

    Raises:
        CorruptCheckpoint: where it is missing or damaged.
        ConfigError: where a newer version of OpenDeep wrote the checkpoint.
    """
    try:
        record = json.loads((path / RECORD / "metadata").read_text(encoding="utf-8"))
        if record["record"] != _own_digest(record):
            raise ValueError("it is not what was saved")
        if record["step"] != int(path.name):
            raise ValueError(f"it is that of step {record['step']}")
        found = record.get("format", 0)
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptCheckpoint("its list of digests is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"its list of digests is damaged ({short(error)})") from error
    if found > FORMAT:
        raise ConfigError(
            f"{path}: is a checkpoint of format {found}, and this version of OpenDeep reads those up to {FORMAT}. Use "
            f"OpenDeep {record['version']}, which wrote it, or a later one."
        )
    return record


def read_measure(path: Path) -> float | None:
    """Return the number by which the best checkpoints are kept; None where it was not measured or cannot be read."""
    try:
        return read_record(path)["measure"]
    except CorruptCheckpoint:
        return None


def checkpoint_path(workdir: str | Path, step: int | None = None, given: str = "") -> Path:
    """Return the directory of a run's checkpoint, the newest by default. Raises ConfigError where it is not there.

    Args:
        given: the setting that named the run, for the error; empty says --workdir.
    """
    directory, given = Path(workdir) / CHECKPOINTS, given or f"--workdir={workdir}"
    steps = checkpoint_steps(directory)
    if not steps:
        raise ConfigError(
            f"{given}: {workdir} has no checkpoint yet. Let `opendeep train` reach its first one, or give another run."
        )
    if step not in (None, *steps):
        there = ", ".join(map(str, steps))
        raise ConfigError(f"{given}: {workdir} has no checkpoint of step {step}; there are: {there}.")
    return directory / str(steps[-1] if step is None else step)


def read_items(
    path: Path, items: Items, read: Callable[[Path, Items], Items] | None = None, whole: bool = True
) -> Items:
    """Arrays of the checkpoint in `path`, on the shardings of the abstract arrays in `items`, digests compared.

    In a job of several processes all call it at the same time.

    Args:
        read: how a checkpoint that is kept in another form is read; it looks at nothing but this process's part.
        whole: refuse a checkpoint with arrays of the optimizer that `items` has not.
    Raises:
        CorruptCheckpoint: where something is missing, cannot be decoded, or is not what was saved.
        ConfigError: where the checkpoint is whole, and of arrays with other names, shapes or dtypes.
    """
    found, failure = {}, None
    try:
        record = read_record(path)
        _check_shapes(path, record, items, whole)
        found = read(path, items) if read else {item: read_arrays(path / item, items[item]) for item in items}
    except CorruptCheckpoint as error:
        failure = error
    raise_everywhere(failure)
    _compare(record, flat(found))
    return found


def read_arrays(path: Path, arrays: Arrays) -> Arrays:
    """Return arrays of an item's directory on the shardings of `arrays`. No digests, no other process.

    Raises CorruptCheckpoint.
    """
    context = tensorstore.Context()

    def read(name: str) -> jax.Array:
        wanted = arrays[name]
        with reading(path / name):
            store = open_array(path, name, context)
            if (store.shape, store.dtype.numpy_dtype) != (tuple(wanted.shape), wanted.dtype):
                raise CorruptCheckpoint(f"its {name} is {store.dtype.name}{list(store.shape)} by its own header")
            places = wanted.sharding.addressable_devices_indices_map(store.shape)
            parts = {str(index): store[index].read() for index in places.values()}
            shards = [jax.device_put(parts[str(index)].result(), device) for device, index in places.items()]
        return jax.make_array_from_single_device_arrays(store.shape, wanted.sharding, shards)

    if not path.is_dir():
        raise CorruptCheckpoint(f"its {path.name} is missing")
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(arrays, pool.map(read, arrays), strict=True))


def open_array(path: Path, name: str, context: tensorstore.Context) -> tensorstore.TensorStore:
    """An array in an item's directory, as Orbax wrote it, to be read in slices."""
    spec = {"driver": "zarr", "kvstore": {**key_value_store(path), "path": f"{name}/"}}
    return tensorstore.open(spec, read=True, open=True, context=context).result()


def key_value_store(path: Path) -> dict:
    """An item's directory as tensorstore names it, which takes no path with `..` in it."""
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path.resolve()}/"}}


def raise_everywhere(failure: CorruptCheckpoint | None) -> None:
    """Raise CorruptCheckpoint in all processes where it failed in one; all call it."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = multihost_utils.process_allgather(np.array(failure is not None))
        if failed.any() and failure is None:
            raise CorruptCheckpoint(f"process {int(np.argmax(failed))} could not read its part")
    if failure is not None:
        raise failure


def _check_shapes(path: Path, record: dict, items: Items, whole: bool) -> None:
    saved = record["arrays"]
    wanted = flat(items)
    complete = whole and set(items) == {MODEL, OPTIMIZER}
    for name in sorted(set(wanted) - set(saved)) + sorted(set(saved) - set(wanted) if complete else ()):
        here, there = ("no array", "one") if name in saved else ("an array", "none")
        raise _other(path, f"the configuration has {here} {name}, and the checkpoint has {there}")
    for name, array in wanted.items():
        shape, dtype = tuple(saved[name]["shape"]), saved[name]["dtype"]
        if (shape, dtype) != (tuple(array.shape), str(array.dtype)):
            here = f"{array.dtype}{list(array.shape)}"
            raise _other(path, f"{name} is {here} by the configuration and {dtype}{list(shape)} in the checkpoint")


def _other(path: Path, text: str) -> ConfigError:
    fix = "Give the configuration that the run was started with, or another --workdir."
    return ConfigError(f"{path}: is a checkpoint of another configuration: {text}. {fix}")


def _compare(record: dict, arrays: Arrays) -> None:
    found = flat_digests(arrays)
    wrong = [name for name in arrays if found[name] != record["arrays"][name]["digest"]]
    if wrong:
        raise CorruptCheckpoint(mismatches(wrong))


def flat_digests(arrays: Arrays, lanes: jax.Array | None = None) -> dict[str, str]:
    """The digests of a flat dictionary of arrays, by its own names.

    Args:
        lanes: what `start_digests` gave for them, if that was begun before.
    """
    return dict(zip(sorted(arrays), finish_digests(start_digests(arrays) if lanes is None else lanes), strict=True))


def mismatches(names: list[str]) -> str:
    """A clause that names arrays whose digests differ."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'} not what was saved (digests differ)"


REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENOMEM)
"""System errors that say nothing about the files and so never mark a checkpoint as corrupt."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert Orbax's and tensorstore's errors for damaged or missing files into CorruptCheckpoint."""
    try:
        yield
    except (CorruptCheckpoint, ConfigError, MemoryError):
        raise
    except Exception as error:
        number = disk_error(error)
        if number in REFUSED:
            raise OSError(number, os.strerror(number), str(path)) from error
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise CorruptCheckpoint(f"its {path.name} cannot be read ({short(error)})") from error


def disk_error(error: Exception) -> int | None:
    """The number of the failure of the file system behind an error; None where it has none.

    tensorstore raises ValueError, with the number in its text: `… No space left on device [os_error_code='28']`.
    """
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = error.errno if isinstance(error, OSError) else found and int(found[1])
    return number or None


@contextlib.contextmanager
def disk_failures(directory: Path) -> Iterator[None]:
    """Raise every file system error as an OSError that names `directory`."""
    try:
        yield
    except Exception as error:
        number = disk_error(error)
        if number is None:
            raise
        if isinstance(error, OSError) and error.filename == str(directory):
            raise
        raise OSError(number, os.strerror(number), str(directory)) from error


def short(error: Exception) -> str:
    """Return an error's message in one clause."""
    text = " ".join(str(error).split())
    found = re.search(r"os_error_code='(\d+)'", text)
    if found:
        return os.strerror(int(found[1]))
    text = re.sub(r"\s*\[[^\]]*\]", "", text).partition("; ")[0]
    return f"{type(error).__name__}: {text[:160]}".rstrip(": ")


def quarantine(path: Path, directory: Path) -> Path | None:
    """Move a corrupt checkpoint into `directory`; return where it is now, or None where it could not be moved."""
    target = directory / f"{path.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        while target.exists():
            target = target.with_name(f"{target.name}x")
        os.rename(path, target)
        return target
    except OSError:
        return None


def remove_partial(directory: Path) -> None:
    """Delete incomplete writes of killed processes and failed saves; Orbax never reads them, but they take space.

    Beside a write that failed, TensorStore's threads write on for a moment and make the directory anew, and nobody
    can wait for them: so a directory counts as deleted when it has stayed away for half a second.
    """
    partial = list(directory.glob("*orbax-checkpoint-tmp*"))
    deadline, absent_since = time.monotonic() + 10.0, time.monotonic()
    while partial and time.monotonic() < min(deadline, absent_since + 0.5):
        for path in partial:
            if path.exists():
                shutil.rmtree(path, ignore_errors=True)
                absent_since = time.monotonic()
        time.sleep(0.02)


def quieten_orbax() -> None:
    """Suppress Orbax's printed tracebacks of errors that it raises anyway, unless the log level is info or more."""
    if logging.getLogger("absl").isEnabledFor(logging.INFO):
        return
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_is_no_disk_failure)
    before = sys.unraisablehook
    if getattr(before, "__module__", "") != __name__:
        # After a write has failed, those beside it end too, and find nobody who waits for them: once for each array.
        def unless_late(unraisable: Any) -> None:
            if str(unraisable.exc_value) != "Event loop is closed":
                before(unraisable)

        sys.unraisablehook = unless_late


def _is_no_disk_failure(record: logging.LogRecord) -> bool:
    return "os_error_code" not in record.getMessage()
