"""Fault injection: faults made on purpose, so that a team sees on its own cluster what a run does about each.

    --faults.drill nan_gradient@12 sigkill@20:1

A fault is `kind@step`, `kind@first-last`, and with `:process` behind it for one process of a job (else the last one).
Kinds of the step itself: nan_gradient, loss_spike (random targets), flipped_bit (in one device's copy of a weight).
Kinds of the process: sigkill, sigstop, sigterm, hang (the loop sleeps for ever), clock_jump (the wall clock loses an
hour); each of these strikes once in a work directory, however often its step is done again.
"""

import dataclasses
import functools
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opendeep_jax.checkpoint.digests import copies_of
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.operations import DRILLS
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.batch import Batch

STRUCK = "drills"
SIGNALS = {"sigkill": signal.SIGKILL, "sigstop": signal.SIGSTOP, "sigterm": signal.SIGTERM}


@dataclass(frozen=True)
class Drill:
    """One fault, at the steps first … last."""

    text: str
    kind: str
    first: int
    last: int
    process: int


def drills(texts: tuple[str, ...]) -> list[Drill]:
    """Return the injected faults that `faults.drill` lists; `config.rules` has checked their syntax."""
    found = []
    for text in texts:
        kind, first, last, process = re.fullmatch(DRILLS, text).groups()
        found.append(Drill(text, kind, int(first), int(last or first), int(process or -1) % jax.process_count()))
    return found


def gradient_faults(texts: tuple[str, ...]) -> Callable | None:
    """Return a function `(step, gradients) -> gradients`, traced with the step (from 0), that makes them NaN at the
    steps of nan_gradient; None where there are none.
    """
    found = [drill for drill in drills(texts) if drill.kind == "nan_gradient"]

    def faulty(step: jax.Array, gradients):
        for drill in found:
            struck = (step + 1 >= drill.first) & (step + 1 <= drill.last)
            gradients = jax.tree.map(lambda x, struck=struck: jnp.where(struck, jnp.nan, x), gradients)
        return gradients

    return faulty if found else None


def inject_faults(take_step: Callable, config: RunConfig, workdir: Path) -> Callable:
    """Return `take_step(batch_of, state, step)`, with the other faults of `faults.drill` made before it; itself where
    there are none.

    Args:
        take_step: takes this process's rows from `batch_of(step, state)`, steps from 0, and trains on them as the batch
            of `step`, from 1.
    """
    texts = config.faults.drill

    def faulty(batch_of: Callable[[int, Any], Batch], state: Any, step: int):
        def spoiled(at: int, state: Any) -> Batch:
            return corrupt_batch(texts, at + 1, batch_of(at, state), config.model.vocab_size)

        inject_process_faults(texts, workdir, step)
        return take_step(spoiled, corrupt_state(texts, workdir, step, state), step)

    return faulty if texts else take_step


def corrupt_batch(texts: tuple[str, ...], step: int, batch: Batch, vocab_size: int) -> Batch:
    """Return a process's rows, with random targets at the steps of loss_spike."""
    if any(drill.kind == "loss_spike" and drill.first <= step <= drill.last for drill in drills(texts)):
        random = np.random.default_rng(step).integers(0, vocab_size, batch.targets.shape, np.int32)
        return dataclasses.replace(batch, targets=random)
    return batch


def corrupt_state(texts: tuple[str, ...], workdir: Path, step: int, state):
    """Return the state before a step, with one bit of one device's copy of a weight flipped at the step of flipped_bit.

    Raises ConfigError where no weight has a copy.
    """
    for drill in drills(texts):
        if drill.kind == "flipped_bit" and drill.first == step and _inject_once(workdir, drill):
            copied = {name: weight for name, weight in state.params.items() if copies_of(weight) > 1}
            if not copied:
                raise ConfigError(
                    f"faults.drill = {drill.text}: no device has a copy of another one's weights here, so nobody could "
                    "see the difference. Give --parallel.data=2 or more, or leave this drill out."
                )
            name, weight = next(iter(copied.items()))
            state = state._replace(params=state.params | {name: _flipped(weight, drill)})
    return state


def inject_process_faults(texts: tuple[str, ...], workdir: Path, step: int) -> None:
    """Inject this process's faults of `step`, before it begins."""
    for drill in drills(texts):
        here = drill.first == step and drill.process == jax.process_index()
        if here and drill.kind in (*SIGNALS, "hang", "clock_jump") and _inject_once(workdir, drill):
            if drill.kind == "clock_jump":
                time.time = functools.partial(_hour_ago, time.time)
            elif drill.kind == "hang":
                while True:
                    time.sleep(3600)
            else:
                os.kill(os.getpid(), SIGNALS[drill.kind])


def _inject_once(workdir: Path, drill: Drill) -> bool:
    """Return whether the fault is still to be injected in this work directory, and record it as injected."""
    marker = workdir / STRUCK / f"{drill.text.replace(':', '_')}.process_{jax.process_index()}"
    if marker.exists():
        return False
    marker.parent.mkdir(exist_ok=True)
    marker.touch()
    return True


def _hour_ago(clock: Callable[[], float]) -> float:
    return clock() - 3600.0


def _flipped(weight: jax.Array, drill: Drill) -> jax.Array:
    parts = [shard.data for shard in weight.addressable_shards]
    if drill.process == jax.process_index():
        broken = np.array(parts[-1])
        broken.view(np.uint32).reshape(-1)[0] ^= np.uint32(1 << 20)
        parts[-1] = jax.device_put(broken, parts[-1].sharding)
    return jax.make_array_from_single_device_arrays(weight.shape, weight.sharding, parts)
