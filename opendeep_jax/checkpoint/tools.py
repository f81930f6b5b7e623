"""Work on finished checkpoints, array by array from their files: no device, no model, little memory."""

import contextlib
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore

from opendeep_jax.checkpoint.digests import digest_blocks, digest_numpy
from opendeep_jax.checkpoint.files import (
    MODEL,
    OPTIMIZER,
    CorruptCheckpoint,
    checkpoint_path,
    is_of_model,
    make_record,
    mismatches,
    open_array,
    read_measure,
    read_record,
    reading,
)
from opendeep_jax.checkpoint.policy import why_kept
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config
from opendeep_jax.config.operations import CheckpointConfig
from opendeep_jax.record.files import CHECKPOINTS, SUMMARY, checkpoint_steps, quarantined
from opendeep_jax.record.origin import read_origin

Seen = Callable[[int], Any]
"""Called with the bytes that were read since the last call."""


class Listed(NamedTuple):
    """A row of `opendeep checkpoints list`."""

    step: int
    time: str
    bytes: int
    """Bytes on disk."""
    measure: float | None
    """Held-out bits per byte, where it was measured."""
    tier: str
    """durable, local or quarantined."""
    why: str
    """Reason why the keep policy keeps it; empty for a quarantined one."""


class Difference(NamedTuple):
    """An array that two checkpoints have differently."""

    name: str
    elements: int
    """Number of elements that differ in any bit."""
    absolute: float
    """Greatest difference; NaN where one has no number."""
    relative: float
    """Greatest difference over the greater of the two sizes."""
    note: str = ""
    """Reason why they cannot be compared, as in `only in the first`."""


def list_checkpoints(workdir: str | Path) -> list[Listed]:
    """All checkpoints of a run that this machine sees, the newest last, quarantined ones first.

    Raises ConfigError where there is no run.
    """
    from opendeep_jax.checkpoint.local import local_roots

    config = load_run_config(workdir).checkpoint
    workdir = Path(workdir)
    rows = [Listed(step, "", _size(path), None, "quarantined", "") for step, path in quarantined(workdir)]
    why = why_kept(measures(workdir), config, read_origin(workdir)["step"])
    for tier, directory in [("durable", workdir / CHECKPOINTS)] + [
        ("local", root / CHECKPOINTS) for root in local_roots(config.local_directory, workdir)
    ]:
        for step in checkpoint_steps(directory):
            path = directory / str(step)
            try:
                record = read_record(path)
            except CorruptCheckpoint as error:
                rows.append(Listed(step, "", _size(path), None, tier, str(error)))
                continue
            reason = why.get(step, "") if tier == "durable" else "newest"
            rows.append(Listed(step, record["time"], _size(path), record["measure"], tier, reason))
    return sorted(rows, key=lambda row: (row.tier != "quarantined", row.step, row.tier))


def measures(workdir: str | Path) -> dict[int, float | None]:
    """Return the measure of every checkpoint in a work directory; None where it was not measured."""
    directory = Path(workdir) / CHECKPOINTS
    return {step: read_measure(directory / str(step)) for step in checkpoint_steps(directory)}


def _size(path: Path) -> int:
    """Bytes of all files under a directory, as far as they are still there: a run may be deleting it."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(folder, name)).st_size
    return total


def open_arrays(path: Path) -> dict[str, tensorstore.TensorStore]:
    """Return the arrays of a checkpoint by name, opened and not yet read. Raises CorruptCheckpoint."""
    opened, context = {}, tensorstore.Context()
    for name in read_record(path)["arrays"]:
        item = MODEL if is_of_model(name) else OPTIMIZER
        with reading(path / item / name):
            opened[name] = open_array(path / item, name, context)
    return opened


def array_bytes(path: Path) -> int:
    """Bytes of all arrays of a checkpoint, by its record; 0 where that cannot be read."""
    try:
        entries = read_record(path)["arrays"].values()
    except CorruptCheckpoint:
        return 0
    return sum(math.prod(entry["shape"]) * np.dtype(_dtype(entry["dtype"])).itemsize for entry in entries)


def _dtype(name: str) -> Any:
    import ml_dtypes

    return getattr(ml_dtypes, name, name)


def _parts(array: tensorstore.TensorStore) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """The pieces in which an array was written: (index of the first element, slices)."""
    chunk = array.chunk_layout.read_chunk.shape or ()  # None for a single number
    counts = [math.ceil(size / max(step, 1)) for size, step in zip(array.shape, chunk, strict=True)]
    for index in np.ndindex(*counts):
        start = tuple(i * step for i, step in zip(index, chunk, strict=True))
        ends = (min(first + step, size) for first, step, size in zip(start, chunk, array.shape, strict=True))
        yield start, tuple(slice(first, end) for first, end in zip(start, ends, strict=True))


def verify(path: Path, seen: Seen = lambda _: None) -> None:
    """Read a checkpoint and compare every array's digest. Raises CorruptCheckpoint, which names damaged arrays."""
    record, arrays, wrong = read_record(path), open_arrays(path), []

    def parts(array: tensorstore.TensorStore) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for start, slices in _parts(array):
            part = array[slices].read().result()
            seen(part.nbytes)
            yield start, part

    for name, array in arrays.items():
        entry = record["arrays"][name]
        try:
            with reading(path):
                same = [list(array.shape), str(array.dtype.numpy_dtype)] == [entry["shape"], entry["dtype"]]
                if not same or digest_blocks(parts(array)) != entry["digest"]:
                    wrong.append(name)
        except CorruptCheckpoint:
            wrong.append(name)
    if wrong:
        raise CorruptCheckpoint(mismatches(wrong))


def differences(first: Path, second: Path, seen: Seen = lambda _: None) -> list[Difference]:
    """Return the arrays that two checkpoints have differently; none where both are bitwise equal.

    Raises CorruptCheckpoint.
    """
    one, other, found = open_arrays(first), open_arrays(second), []
    for name in [*one, *(name for name in other if name not in one)]:
        if name not in one or name not in other:
            note = "only in the first" if name in one else "only in the second"
            found.append(Difference(name, 0, math.nan, math.nan, note))
        elif (one[name].shape, one[name].dtype) != (other[name].shape, other[name].dtype):
            shapes = " and ".join(f"{x.dtype.name}{list(x.shape)}" for x in (one[name], other[name]))
            found.append(Difference(name, 0, math.nan, math.nan, shapes))
        else:
            with reading(first):
                elements, absolute, relative = _compare(one[name], other[name], seen)
            if elements:
                found.append(Difference(name, elements, absolute, relative))
    return found


def _compare(one: Any, other: Any, seen: Seen) -> tuple[int, float, float]:
    elements, absolute, relative = 0, 0.0, 0.0
    for _, slices in _parts(one):
        a, b = (np.atleast_1d(array[slices].read().result()) for array in (one, other))
        seen(a.nbytes)
        word = f"uint{8 * a.itemsize}"
        differ = np.ascontiguousarray(a).view(word) != np.ascontiguousarray(b).view(word)
        if not differ.any():
            continue
        a, b = a[differ].astype(np.float64), b[differ].astype(np.float64)
        with np.errstate(invalid="ignore"):
            gap = np.abs(a - b)
            size = np.maximum(np.abs(a), np.abs(b))
            share = np.divide(gap, size, out=np.zeros_like(gap), where=size != 0)
        elements += len(gap)
        absolute, relative = (float(np.maximum(old, new.max())) for old, new in ((absolute, gap), (relative, share)))
    return elements, absolute, relative


def prunable(workdir: str | Path, config: CheckpointConfig) -> list[int]:
    """The steps of the checkpoints that `config` doesn't keep; never the newest, nor what the run began from."""
    kept = why_kept(measures(workdir), config, read_origin(workdir)["step"])
    return [step for step in checkpoint_steps(Path(workdir) / CHECKPOINTS)[:-1] if step not in kept]


def prune(workdir: str | Path, config: CheckpointConfig, seen: Seen = lambda _: None) -> list[int]:
    """Delete the checkpoints that `prunable` names, and return them.

    Raises ConfigError, and deletes nothing, where the newest checkpoint is not sound: an older one may be all there is.
    """
    going, directory = prunable(workdir, config), Path(workdir) / CHECKPOINTS
    if going:
        newest = checkpoint_path(workdir)
        try:
            verify(newest, seen)
        except CorruptCheckpoint as error:
            raise ConfigError(
                f"{newest}: is the newest checkpoint, and not sound: {error}. Nothing was deleted. Move it away, then "
                "prune the others."
            ) from error
    for step in going:
        # Renamed first: a deletion that is cut short leaves nothing that looks like a checkpoint.
        gone = directory / f"{step}.orbax-checkpoint-tmp-{uuid.uuid4().hex[:8]}"
        (directory / str(step)).rename(gone)
        shutil.rmtree(gone)
    return going


def average(workdir: str | Path, steps: Sequence[int], out: str | Path, seen: Seen = lambda _: None) -> Path:
    """Write the work directory `out`, whose one checkpoint averages the weights at `steps`; return `steps`.

    Sums are float32; the mean has each array's own dtype. There is no optimizer state in it: it is for measuring and
    generating, not for training on.

    Raises:
        ConfigError: where a step is missing or named twice, a checkpoint is damaged, or `out` is there already.
    """
    from opendeep_jax.checkpoint.writer import Writer

    out = Path(out)
    if len(set(steps)) != len(steps) or not steps:
        raise ConfigError(f"--steps={','.join(map(str, steps))}: must name different steps, at least one.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out={out}: is there already. Give a directory that is new or empty.")
    paths = [checkpoint_path(workdir, step) for step in steps]
    for path in paths:
        try:
            verify(path, seen)
        except CorruptCheckpoint as error:
            raise ConfigError(f"{path}: is not sound: {error}. Average others.") from error
    names = [name for name in read_record(paths[-1])["arrays"] if is_of_model(name)]
    opened = [open_arrays(path) for path in paths]
    means = {}
    for name in names:
        total = sum(array[name].read().result().astype(np.float32) for array in opened)
        means[name] = np.asarray(total / np.float32(len(paths))).astype(opened[-1][name].dtype.numpy_dtype)
    record = make_record(
        steps[-1], None, means, {name: digest_numpy(array) for name, array in means.items()}, average_of=list(steps)
    )
    out = out.resolve()
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")  # gets its name when it is whole
    try:
        with contextlib.closing(Writer(partial / CHECKPOINTS, CheckpointConfig(), (MODEL,))) as writer:
            writer.save(steps[-1], {MODEL: means}, record)
        for file in Path(workdir).glob("*.json"):
            if file.name != SUMMARY:
                shutil.copy(file, partial / file.name)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out / CHECKPOINTS / str(steps[-1])
