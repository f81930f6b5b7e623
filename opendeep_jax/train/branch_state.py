"""A checkpoint's arrays as the first state of a run with other settings: what is kept, cast, or begins anew.

Weights and router biases are kept, cast where their dtype is another. So are the moments of an update rule (AdamW,
Muon) that had all of its weights before. Else the rule begins anew: its bias correction goes by one count for all
weights, by which moments that are still zero would count as old.
"""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from opendeep_jax.checkpoint.files import MODEL, OPTIMIZER, Items, is_of_model, read_items, to_items
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.faults.health import new_health
from opendeep_jax.train.state import TrainState

RULES = {"adamw": "AdamW", "muon": "Muon"}
"""Names of rules that differ from `optimizer.kind`."""
NAMED = 3
"""Arrays that a refusal names."""


class Move(NamedTuple):
    """Origins of a state's arrays."""

    step: int
    kept: dict[str, str]
    """Names of arrays, each with its name in the checkpoint."""
    read: Items
    """The checkpoint's arrays that are read, abstract, by their names there."""
    notes: list[str]
    refusal: str
    """Reason why the weights do not fit; empty if they do."""


def plan_move(record: dict, there: RunConfig, here: RunConfig, template: TrainState, keep_health: bool) -> Move:
    """Plan how the state of a run `here` is made from a checkpoint of the run `there`.

    Args:
        record: the checkpoint's.
        template: shapes, dtypes and shardings of the new state.
        keep_health: the new run's losses are judged by the last ones there.
    """
    saved, items = record["arrays"], to_items(template)
    weights = {name: name for name in items[MODEL]}
    mine = {name: _place(name, here.optimizer.kind) for name in items[OPTIMIZER]}
    moments = {place: name for name in saved if (place := _place(name, there.optimizer.kind))}
    kept, notes = {}, []
    for rule in sorted({place[0] for place in mine.values() if place}):
        names = [name for name, place in mine.items() if place and place[0] == rule]
        found, called = {name: moments.get(place, "") for name in names if (place := mine[name])}, RULES.get(rule, rule)
        if all(_fits(saved, found[name], items[OPTIMIZER][name]) for name in names):
            kept |= found
            notes.append(_kept(called, saved, found, items[OPTIMIZER]))
        else:
            notes.append(
                f"{called}'s moments begin anew, at zero, as the parent has none for all of its weights; the "
                "schedule has no warm-up for that, so a lower rate may be wise at first"
            )
    rest = [name for name, place in mine.items() if not place and (keep_health or not name.startswith(".health"))]
    kept |= {name: name for name in rest if _fits(saved, name, items[OPTIMIZER][name])}
    if not keep_health:
        notes.append("losses are judged anew: those of other data or another model say nothing of these")
    if cast := sorted({f"{saved[n]['dtype']} to {items[MODEL][n].dtype}" for n in weights if _casts(saved, n, items)}):
        notes.append(f"weights are cast from {', '.join(cast)}")
    read = {MODEL: {}, OPTIMIZER: {}}
    refusal = _refusal(saved, items[MODEL])
    if not refusal:
        for item, names in ((MODEL, weights), (OPTIMIZER, kept)):
            for name, source in names.items():
                like, dtype = items[item][name], jnp.dtype(saved[source]["dtype"])
                read[item][source] = jax.ShapeDtypeStruct(like.shape, dtype, sharding=like.sharding)
    read = {item: arrays for item, arrays in read.items() if arrays}  # an average of weights has no optimizer
    return Move(record["step"], kept, read, notes, refusal)


def _place(name: str, kind: str) -> tuple[str, str] | None:
    """(rule, place in its own state) of an array of an optimizer of a kind; None for what is not the optimizer's."""
    found = re.fullmatch(r"\.opt_state(?:\.inner_states\['(\w+)'\]\.inner_state)?(.*)", name)
    return found and (found[1] or kind, found[2])


def _fits(saved: dict, name: str, like: jax.ShapeDtypeStruct) -> bool:
    return name in saved and tuple(saved[name]["shape"]) == tuple(like.shape)


def _casts(saved: dict, name: str, items: Items) -> bool:
    return name in saved and saved[name]["dtype"] != str(items[MODEL][name].dtype)


def _kept(rule: str, saved: dict, found: dict[str, str], arrays: dict) -> str:
    pairs = {(saved[source]["dtype"], str(arrays[name].dtype)) for name, source in found.items()}
    casts = sorted(f"{there} to {here}" for there, here in pairs if there != here)
    return f"{rule}'s moments are kept" + (f", cast from {', '.join(casts)}" if casts else "")


def _refusal(saved: dict, weights: dict) -> str:
    there = {name for name in saved if is_of_model(name)}
    wrong = [
        f"{name} is {list(array.shape)} here and {saved[name]['shape']} there"
        for name, array in weights.items()
        if name in there and not _fits(saved, name, array)
    ]
    wrong += [f"{name} is not there" for name in weights if name not in there]
    wrong += [f"{name} is only there" for name in sorted(there - set(weights))]
    more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    return "; ".join(wrong[:NAMED]) + more


def make_state(path: Path, move: Move, template: TrainState, optimizer: optax.GradientTransformation) -> Items:
    """Read a checkpoint and make the new state's arrays of it, as they are kept.

    In a job of several processes all call it. Raises CorruptCheckpoint where the checkpoint is damaged.
    """
    found, wanted = read_items(path, move.read, whole=False), to_items(template)
    made = {name: _cast(array, wanted[MODEL][name]) for name, array in found[MODEL].items()}
    rest = {name: _cast(found[OPTIMIZER][source], wanted[OPTIMIZER][name]) for name, source in move.kept.items()}
    if set(rest) != set(wanted[OPTIMIZER]):
        fresh = to_items(_first_state(move.step, template, optimizer, made))[OPTIMIZER]
        rest |= {name: array for name, array in fresh.items() if name not in rest}
    return {MODEL: made, OPTIMIZER: {name: rest[name] for name in wanted[OPTIMIZER]}}


def _cast(array: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    if array.dtype == like.dtype:
        return array
    return jax.jit(lambda x: x.astype(like.dtype), out_shardings=like.sharding)(array)


def _first_state(step: int, template: TrainState, optimizer: optax.GradientTransformation, model: dict) -> TrainState:
    """Return a state at `step` with fresh optimizer and update check; weights keep their values."""
    params = {name: model[f"params.{name}"] for name in template.params}

    def first(params):
        return TrainState(jnp.asarray(np.int32(step)), {}, optimizer.init(params), {}, new_health(step))

    shardings = jax.tree.map(lambda x: x.sharding, template._replace(params={}, router_bias={}))
    return jax.jit(first, out_shardings=shardings)(params)
