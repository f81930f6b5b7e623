"""A run that begins with another's checkpoint, weights and moments, and goes on with settings of its own.

    opendeep train --from=runs/trunk@500 --workdir=runs/anneal --optimizer.learning_rate=1e-4

Everything of the branch is made in WORKDIR/branching first. origin.json, which names the parent, is written when all of
it is whole; then it moves to its places. Whatever kills a start on the way, the same command does the rest.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from opendeep_jax.checkpoint.files import MODEL, OPTIMIZER, CorruptCheckpoint, flat, flat_digests, make_record
from opendeep_jax.checkpoint.local import layout
from opendeep_jax.checkpoint.writer import Writer
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import write_atomically
from opendeep_jax.config.load import (
    CONFIG_FILE,
    DIFF_FILE,
    HARMLESS,
    ROUNDING,
    diff,
    format_diff,
    is_among,
    parent_of,
    save_run_config,
    to_json,
)
from opendeep_jax.config.schedule import total_steps
from opendeep_jax.config.schema import CheckpointConfig, RunConfig
from opendeep_jax.data.opening import check_data
from opendeep_jax.parallel.distributed import get_value, is_primary, primary_first, put_value
from opendeep_jax.parallel.mesh import make_mesh
from opendeep_jax.record.files import CHECKPOINTS, DATA, SKIPPED_BATCHES, checkpoint_steps
from opendeep_jax.record.origin import read_origin, write_origin
from opendeep_jax.record.skipped_batches import read_skipped_batches
from opendeep_jax.record.workdir import check_workdir, only_writer
from opendeep_jax.train.branch_parent import Parent, check_tokenizer, corrupt_parent, open_parent
from opendeep_jax.train.branch_state import make_state, plan_move
from opendeep_jax.train.compiling import print_once
from opendeep_jax.train.feed import TEXT_FILES, with_tokenizer
from opendeep_jax.train.optimizer import learning_rate_schedule
from opendeep_jax.train.setup import assemble

STAGED = "branching"
LENGTH = ("train.steps", "train.total_tokens")
OWN_ORDER = ("data.", "seed", "train.batch_size", "train.batch_ramp")
"""Fields that decide which batch a step has."""
SAME_ORDER = ("data.directory", "data.workers", "data.tokenizer")
SAME_LOSS = (*HARMLESS, *ROUNDING, *LENGTH, "optimizer.", "seed", "data.tokenizer")
"""Fields that leave a loss comparable with those before."""


def check_branch(config: RunConfig, workdir: str | Path, parent: str) -> None:
    """Raise ConfigError unless `config` can be run in `workdir` as a branch of `parent`, which is RUN or RUN@STEP.

    A directory that holds this very branch passes whether its parent is still there or not.
    """
    (run, step), workdir = parent_of(parent), Path(workdir)
    if run.resolve() == workdir.resolve():
        raise ConfigError(
            f"--from={parent} is --workdir={workdir} itself. Leave --from out to go on with that run, or give the "
            "branch a new --workdir."
        )
    finish_branch(workdir)
    origin = read_origin(workdir)
    if (workdir / CONFIG_FILE).exists() or checkpoint_steps(workdir / CHECKPOINTS):
        if not (origin["kind"] == "branch" and _is_parent(run, origin) and step in (None, origin["step"])):
            raise ConfigError(
                f"--from={parent}: --workdir={workdir} holds a run already, and it {_began(origin)}. Leave --from out "
                "to go on with that run, or give the branch a new --workdir."
            )
        return _check_begun(config, workdir)
    check_workdir(config, workdir, branches=True)
    check_tokenizer(config, open_parent(config, parent))


def _check_begun(config: RunConfig, workdir: Path) -> None:
    try:
        check_workdir(config, workdir)
    except ConfigError as error:
        if (workdir / DATA).exists():
            raise
        fix = f"Nothing has been trained there yet: delete {workdir} to begin with these settings."
        raise ConfigError(f"{error} {fix}") from error


def _is_parent(run: Path, origin: dict) -> bool:
    return str(run.resolve()) == origin.get("parent_absolute") or str(run) == origin.get("parent")


def _began(origin: dict) -> str:
    if origin["kind"] == "branch":
        return f"began as a branch of {origin.get('parent')}@{origin['step']}"
    return "began with imported weights" if origin["kind"] == "import" else "did not begin as a branch"


def begin_branch(
    config: RunConfig,
    recipe: RunConfig | None,
    workdir: str | Path,
    parent: str,
    say: Callable[[str], None] = print_once,
) -> None:
    """Make `workdir` a run whose first checkpoint is the parent's, moved to this run's mesh, moments and dtypes.

    Where the branch is there already, nothing is done. In a job of several processes all call it.

    Args:
        recipe: what the configuration was made from; None takes the parent's.
        say: prints a paragraph, in the first process.
    Raises:
        ConfigError: for a parent that is missing, damaged, or of other shapes.
        OSError: when the disk does not take it.
    """
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        primary_first("branch/lock", lambda: stack.enter_context(only_writer(workdir)) if is_primary() else None)

        def decide() -> str:
            """Return the step to branch from, decided by the first process; empty if the branch exists."""
            if is_primary():
                finish_branch(workdir)
                begun = read_origin(workdir)["kind"] == "branch"
                put_value("branch/step", "" if begun else str(open_parent(config, parent).step))
            return get_value("branch/step") or ""

        if step := primary_first("branch", decide):
            source = primary_first("branch/parent", lambda: open_parent(config, parent, int(step)))
            _branch(config, recipe, workdir, parent, source, say)


def _branch(config, recipe, workdir: Path, given: str, parent: Parent, say: Callable[[str], None]) -> None:
    mesh = make_mesh(config.parallel)
    changes, staged = diff(parent.config, config), workdir.resolve() / STAGED  # Orbax takes no relative path
    with jax.set_mesh(mesh):
        setup = assemble(config, mesh)
        template, optimizer = setup.template, setup.optimizer
        comparable = all(is_among(name, SAME_LOSS) for name, _, _ in changes)
        move = plan_move(parent.record, parent.config, config, template, keep_health=comparable)
        if move.refusal:
            lines = format_diff([change for change in changes if change[0].startswith("model.")]).splitlines()
            differences = "\n  ".join(lines or ["none differs in config.json"])
            raise ConfigError(
                f"--from={given}: the weights of {parent.workdir} do not fit this configuration: {move.refusal}. "
                "A branch may change what is done with the weights, and none of their shapes. Take these back (there "
                f"-> here):\n  {differences}"
            )
        primary_first("branch/text", lambda: check_data(with_tokenizer(config, parent.workdir)))
        notes = [*move.notes, *_notes(config, parent, changes)]
        if is_primary():
            say("\n".join([f"branch of {parent.workdir} at step {parent.step:,}", *(f"  {note}" for note in notes)]))
            shutil.rmtree(staged, ignore_errors=True)
        try:
            items = make_state(parent.path, move, template, optimizer)
        except CorruptCheckpoint as error:
            raise corrupt_parent(given, parent.workdir, parent.step, error) from error
        arrays = flat(items)
        measure = parent.record["measure"] if comparable else None
        last_update = int(items[OPTIMIZER][".health.last_update"])
        more = {"layout": layout(items), "processes": jax.process_count(), "last_update": last_update}
        record = make_record(parent.step, measure, arrays, flat_digests(arrays), **more)
        primary_first("branch/staged", lambda: staged.mkdir(exist_ok=True))
        with contextlib.closing(Writer(staged, CheckpointConfig(keep=0), (MODEL, OPTIMIZER))) as writer:
            writer.save(parent.step, items, record)
    primary_first("branch/whole", lambda: _settle(config, recipe, workdir, parent, notes) if is_primary() else None)


def _settle(config: RunConfig, recipe: RunConfig | None, workdir: Path, parent: Parent, notes: list[str]) -> None:
    """Add what belongs to the checkpoint, and then say that the branch is whole."""
    staged, changes = workdir / STAGED, [change for change in diff(parent.config, config) if change[0] != "name"]
    for name in TEXT_FILES:
        if (parent.workdir / name).is_file():
            shutil.copyfile(parent.workdir / name, staged / name)
    if windows := _inherited(config, parent, changes):
        write_atomically(staged / SKIPPED_BATCHES, json.dumps(windows, indent=2) + "\n")
    save_run_config(config, parent.config if recipe is None else recipe, staged)
    write_origin(
        workdir,
        "branch",
        parent.step,
        parent=str(parent.workdir),
        parent_absolute=str(parent.workdir.resolve()),
        parent_config=hashlib.sha256(to_json(parent.config).encode()).hexdigest(),
        parent_checkpoint=content_digest(parent.record),
        differences=json.loads(json.dumps(changes, default=dataclasses.asdict)),
        notes=notes,
    )
    finish_branch(workdir)


def content_digest(record: dict) -> str:
    """SHA-256 over the names and digests of a checkpoint's arrays: equal when its contents are."""
    pairs = sorted((name, array["digest"]) for name, array in record["arrays"].items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def finish_branch(workdir: str | Path) -> bool:
    """Move a branch's files into place if origin.json says that they are complete; return whether any remained."""
    workdir = Path(workdir)
    staged = workdir / STAGED
    if not staged.is_dir() or read_origin(workdir)["kind"] != "branch":
        return False
    (workdir / CHECKPOINTS).mkdir(exist_ok=True)
    others = [(staged / name, workdir / name) for name in (*TEXT_FILES, SKIPPED_BATCHES, DIFF_FILE, CONFIG_FILE)]
    for source, target in [
        (staged / str(step), workdir / CHECKPOINTS / str(step)) for step in checkpoint_steps(staged)
    ] + others:
        with contextlib.suppress(FileNotFoundError):
            os.replace(source, target)
    shutil.rmtree(staged, ignore_errors=True)
    return True


def remove_unfinished(workdir: str | Path) -> None:
    """Delete what is there of a branch that was killed before it was whole."""
    if read_origin(workdir)["kind"] != "branch":
        shutil.rmtree(Path(workdir) / STAGED, ignore_errors=True)


def _has_own_order(config: RunConfig, parent: Parent, changes: list[tuple[str, Any, Any]]) -> bool:
    """Return whether steps have other batches than the parent would have had."""
    deciding = [name for name, _, _ in changes if is_among(name, OWN_ORDER) and not is_among(name, SAME_ORDER)]
    deciding = [name for name in deciding if not name.endswith(".epochs")]  # which only says how many there may be
    return bool(deciding) or bool(config.data.phases and total_steps(config) != total_steps(parent.config))


def _inherited(config: RunConfig, parent: Parent, changes: list[tuple[str, Any, Any]]) -> list[dict]:
    """Return the steps that the parent skips; with other batches than the parent's, only those already done.

    None of them counts as a rollback of the branch.
    """
    end = parent.step if _has_own_order(config, parent, changes) else sys.maxsize
    return [
        {**window, "last": min(window["last"], end), "last_update": -1}
        for window in read_skipped_batches(parent.workdir)
        if window["first"] <= end
    ]


def _notes(config: RunConfig, parent: Parent, changes: list[tuple[str, Any, Any]]) -> list[str]:
    """Return the consequences of changed settings, a sentence each, and the settings."""
    notes = format_diff(changes).splitlines() or ["no setting differs from the parent's"]
    here, there = (
        float(one.optimizer.learning_rate * learning_rate_schedule(one)(parent.step)) for one in (config, parent.config)
    )
    if here != there:
        notes.append(f"learning rate of step {parent.step + 1:,}: {here:.4g}; by the parent's schedule {there:.4g}")
    if _has_own_order(config, parent, changes):
        text = f"batches from step {parent.step + 1:,} on are those that this configuration has at these steps"
        if any(window["last"] > parent.step for window in read_skipped_batches(parent.workdir)):
            text += "; what the parent skips is of its own order, and counts no more"
        notes.append(text)
    return notes
