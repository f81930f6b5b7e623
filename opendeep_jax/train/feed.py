"""Sources of a run's batches, as the training loop sees them.

A feed samples, reads or makes the batch of a step; the loop puts it on the devices and trains on it. After a kill or a
rollback the loop asks for the same step again and must get the same batch: a feed whose batches depend on the state
keeps what it drew on disk (docs/architecture.md has a feed of reinforcement learning on one page).
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opendeep_jax.config.schedule import stage_at
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.data.opening import check_data, open_data
from opendeep_jax.data.pipeline import Data
from opendeep_jax.data.provenance import where
from opendeep_jax.data.recorded import check_same_data
from opendeep_jax.generation.sampler import continue_prompts, make_next_tokens
from opendeep_jax.parallel.distributed import is_primary, primary_first
from opendeep_jax.parallel.mesh import global_rows, rows_here
from opendeep_jax.record.files import DATA, TOKENIZER
from opendeep_jax.record.origin import read_origin
from opendeep_jax.record.record import Record
from opendeep_jax.train.evaluate import held_out_batches, make_evaluator
from opendeep_jax.train.setup import Setup
from opendeep_jax.train.state import TrainState
from opendeep_jax.train.summary import data_rows

TEXT_FILES = (TOKENIZER, "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
"""Tokenizer files that a run keeps. The second and third accompany a file that names its boundaries."""


class Feed:
    """Source of a run's batches. A feed of one's own has at least `batch`; steps count from 0 here.

    In a job of several processes all call the same methods in the same order; each gets its own rows of a batch.
    """

    measure = "held_out_bits_per_byte"
    """The number of `evaluate` by which the best checkpoints are kept; less is better."""

    def __init__(self, config: RunConfig, workdir: str | Path):
        self.config, self.workdir = config, Path(workdir)

    @property
    def is_ready(self) -> bool:
        """Return whether no long preparation, with progress on the terminal, is left."""
        return True

    def check(self) -> None:
        """Raise ConfigError for sources that cannot be opened, before anything is compiled."""

    def open(self, setup: Setup) -> None:
        """Prepare for `batch`, in a thread of its own while the step is compiled."""
        self.setup = setup

    def shape(self, step: int) -> tuple[int, int]:
        """Return rows and length of the global batch of `step`."""
        stage = stage_at(self.config, step)
        return stage.batch_size, stage.length

    def batch(self, step: int, state: TrainState) -> Batch:
        """Return this process's rows of the batch of `step` (`rows_here`): numpy arrays [rows, length].

        Args:
            state: before the step; it must not be kept, as the step takes its memory.
        """
        raise NotImplementedError

    def rows_here(self, size: int) -> np.ndarray:
        """Return which rows of a batch of `size` this process gives; those from `size` on are padding."""
        return rows_here(self.setup.mesh, global_rows(self.config, size, self.setup.mesh))

    def documents(self, step: int) -> list[dict[str, Any]]:
        """Return the documents of the batch of `step`, each once: objects with `source`, `id` and the first `row`."""
        return []

    def describe(self) -> dict[str, Any]:
        """Return the content of data.json."""
        return {}

    def startup_rows(self) -> list[tuple[str, str]]:
        """Return rows on the data for `display.tables.key_value_table`."""
        return []

    def save(self, record: Record) -> None:
        """Write the data's files of the run directory."""
        record.write(DATA, self.describe())

    def evaluate(self, step: int, state: TrainState, max_batches: int) -> dict[str, float]:
        """Evaluate the state after `step` steps, on all data for 0 batches; empty without an evaluation."""
        return {}

    def sample(self, step: int, state: TrainState) -> list[tuple[str, str]]:
        """Return (prompt, continuation) of the sample prompts."""
        return []

    def summary(self, evaluations: list[dict[str, Any]]) -> dict[str, float | None]:
        """Return the feed's entries of summary.json, given the lines of evaluation.jsonl."""
        return {}


class Pretraining(Feed):
    """Feed of packed text: a batch is a function of configuration and step, prepared ahead in the background."""

    data: Data
    _batches: Iterator[Batch] | None = None
    _next: int = -1
    """Step of the next batch in `_batches`."""

    @property
    def is_ready(self) -> bool:
        return (self.workdir / DATA).exists()

    @functools.cached_property
    def _settings(self) -> RunConfig:
        return with_own_tokenizer(self.config, self.workdir)

    def check(self) -> None:
        if not self.is_ready:  # else the text is there
            primary_first("text", lambda: check_data(self._settings))

    def open(self, setup: Setup) -> None:
        super().open(setup)
        opening = functools.partial(open_data, self._settings, is_primary(), self.workdir)
        self.data = primary_first("data", opening)
        self.evaluator = make_evaluator(self.config, setup.definition, self.data.tokenizer, setup.mesh)
        self.next_tokens = make_next_tokens(setup.definition, self.data.tokenizer.vocab_size, temperature=0.8, top_k=50)

    def batch(self, step: int, state: TrainState) -> Batch:
        if self._batches is None or self._next != step:
            self._batches = self.data.iterate(step, self.rows_here)
        self._next = step + 1
        return next(self._batches)

    def documents(self, step: int) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for piece in where(self.data, step):
            found.setdefault(piece["id"], {"source": piece["source"], "id": piece["id"], "row": piece["row"]})
        return list(found.values())

    def describe(self) -> dict[str, Any]:
        return self.data.describe()

    def startup_rows(self) -> list[tuple[str, str]]:
        return data_rows(self.config, self.describe())

    def save(self, record: Record) -> None:
        check_same_data(self.describe(), record.workdir)
        super().save(record)
        if self.data.tokenizer.path:
            original = Path(self.data.tokenizer.path)
            for name in TEXT_FILES:
                source = original if name == TOKENIZER else original.with_name(name)
                if name == TOKENIZER or source.exists():
                    record.write_text(name, source.read_text(encoding="utf-8"))

    def evaluate(self, step: int, state: TrainState, max_batches: int) -> dict[str, float]:
        batches = held_out_batches(self.config, self.data, self.setup.mesh, max_batches)
        return self.evaluator(state.params, state.router_bias, batches) if len(batches) else {}

    def sample(self, step: int, state: TrainState) -> list[tuple[str, str]]:
        settings, tokenizer = self.config.train, self.data.tokenizer
        prompts = [[tokenizer.bos_id, *map(int, tokenizer.encode(prompt))] for prompt in settings.sample_prompts]
        *_, texts = continue_prompts(
            self.next_tokens,
            state.params,
            state.router_bias,
            prompts,
            tokenizer.eos_id,
            self.config.data.sequence_length,
            settings.sample_tokens,
            self.config.seed + step,
        )
        return [(prompt, tokenizer.decode(text)) for prompt, text in zip(settings.sample_prompts, texts, strict=True)]

    def summary(self, evaluations: list[dict[str, Any]]) -> dict[str, float | None]:
        packed = self.data.compression()
        found = packed | evaluations[-1] if packed else {}
        return {name: found.get(name) for name in (self.measure, "gzip_bits_per_byte", "xz_bits_per_byte")}


def with_own_tokenizer(config: RunConfig, workdir: str | Path) -> RunConfig:
    """Return `config` as a branch reads its text: with its parent's tokenizer, whatever the sources."""
    return with_tokenizer(config, workdir) if read_origin(workdir)["kind"] == "branch" else config


def with_tokenizer(config: RunConfig, workdir: str | Path) -> RunConfig:
    """Return `config` with the tokenizer that a run directory keeps, if it keeps one."""
    path = Path(workdir, TOKENIZER).absolute()
    if not path.exists():
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(path)))
