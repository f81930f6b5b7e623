"""The checkpoint that `--from=RUN@STEP` names, or why no branch can begin with it."""

from pathlib import Path
from typing import NamedTuple

from opendeep_jax.checkpoint.files import CorruptCheckpoint, checkpoint_path, read_record
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config, parent_of
from opendeep_jax.config.schedule import tokens_before, total_steps
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.recorded import run_tokenizer
from opendeep_jax.record.files import CHECKPOINTS, checkpoint_steps
from opendeep_jax.text.files import byte_tokenizer, load_tokenizer


class Parent(NamedTuple):
    """The checkpoint that a branch begins with."""

    workdir: Path
    step: int
    config: RunConfig
    record: dict
    """Record of the checkpoint."""

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.workdir / CHECKPOINTS / str(self.step)


def open_parent(config: RunConfig, parent: str, step: int | None = None) -> Parent:
    """The checkpoint that `--from=RUN@STEP` (or RUN, for its newest one, or `step`) names.

    Raises ConfigError where it is not there or its record is damaged, and where `config` has no step to do after it.
    """
    run, named = parent_of(parent)
    parents_config = load_run_config(run, f"--from={parent}")
    path = checkpoint_path(run, named if step is None else step, f"--from={parent}")
    step = int(path.name)
    try:
        record = read_record(path)
    except CorruptCheckpoint as error:
        raise corrupt_parent(parent, run, step, error) from error
    if total_steps(config) <= step:
        raise ConfigError(f"--from={parent}: {_too_short(config, step)}")
    return Parent(run, step, parents_config, record)


def corrupt_parent(parent: str, run: Path, step: int, error: CorruptCheckpoint) -> ConfigError:
    """Return the error for a corrupt checkpoint; it names the others."""
    steps = checkpoint_steps(run / CHECKPOINTS)
    if step not in steps:  # a run that is going keeps its newest ones only
        there = ", ".join(map(str, steps)) or "none"
        return ConfigError(f"--from={parent}: the checkpoint of step {step} was deleted meanwhile; there are: {there}.")
    others = ", ".join(str(other) for other in steps if other != step) or "none"
    return ConfigError(
        f"--from={parent}: the checkpoint of step {step} is not sound: {error}. Branch from another one, as "
        f"--from={run}@STEP; there are: {others}."
    )


def _too_short(config: RunConfig, step: int) -> str:
    if config.train.steps:
        return (
            f"a branch counts its steps on from those of its parent, here from {step:,}, and train.steps = "
            f"{config.train.steps:,} leaves none to do. Set --train.steps above {step}, with the parent's steps in it."
        )
    return (
        f"a branch counts its tokens on from those of its parent, and train.total_tokens = "
        f"{config.train.total_tokens:,} leaves none to do after step {step:,}. Set --train.total_tokens above "
        f"{tokens_before(config, step)}."
    )


def check_tokenizer(config: RunConfig, parent: Parent) -> None:
    """Raise ConfigError for a tokenizer by whose ids the parent's weights would mean something else."""
    name = config.data.tokenizer
    if name == parent.config.data.tokenizer:
        return
    if name.startswith("bpe:"):
        same = False
    else:
        tokenizer = byte_tokenizer() if name == "bytes" else load_tokenizer(Path(name))
        same = tokenizer.content_hash == run_tokenizer(parent.workdir).content_hash
    if not same:
        raise ConfigError(
            f"data.tokenizer = {name!r}: its ids are not those that the weights of {parent.workdir} have learned, "
            f"whose data.tokenizer is {parent.config.data.tokenizer!r}. Set it as it is there: a branch reads its text "
            "with its parent's tokenizer, whatever the sources."
        )
