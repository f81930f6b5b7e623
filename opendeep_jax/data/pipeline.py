"""From a RunConfig to batches. A batch is a pure function of the configuration and the step.

data = open_data(config)            # prepares what is not there yet
data.batch(0)                       # the Batch of step 0
for batch in data.iterate(1000):    # the batches from step 1000 on, prepared ahead in the background
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from opendeep_jax.config.schedule import stage_at
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.data.describe import describe
from opendeep_jax.data.fim import NO_FIM
from opendeep_jax.data.prepared import Prepared, prepare
from opendeep_jax.data.provenance import open_recorded, recorded_mixture
from opendeep_jax.data.rows import empty_batch, write_rows
from opendeep_jax.text.tokenizer import Tokenizer

Rows = Sequence[int] | np.ndarray
# Batches that are prepared ahead.
PREFETCH = 8
# Held-out text that gzip and xz are given: half a minute of xz -9, whatever the corpus.
HELD_OUT_BYTES = 64 << 20
# Documents of it that are read together.
DOCUMENTS_AT_ONCE = 1024


class Data:
    """Everything prepared: the tokenizer, batches to train on, and held-out text.

    A process asks for the rows that its devices hold. Rows beyond a batch's own are padding: they have no target.
    """

    def __init__(self, tokenizer: Tokenizer, prepared: Prepared):
        self.tokenizer, self.prepared, self.config = tokenizer, prepared, prepared.config

    def batch(self, step: int, rows: Rows | None = None) -> Batch:
        """The Batch of `step` (from 0), or only `rows` of it (ascending): numpy arrays of int32 and bool, [rows, L]."""
        prepared, stage = self.prepared, stage_at(self.config, step)
        rows = np.arange(stage.batch_size) if rows is None else np.asarray(rows, np.int64)
        batch = empty_batch(len(rows), stage.length)
        for source, kind, in_batch, in_plan in prepared.order.rows_of_step(step, rows[rows < stage.batch_size]):
            plan, store = prepared.plans[source, kind], prepared.stores[source]
            mine = np.searchsorted(rows, in_batch)
            write_rows(batch, mine, plan, in_plan, store, prepared.fim, self.config.data.segment_mask)
        return batch

    def iterate(
        self, start_step: int = 0, rows_of: Callable[[int], Rows | None] = lambda batch_size: None
    ) -> Iterator[Batch]:
        """The batches of `start_step` and all later steps, without end, prepared ahead in a background thread.

        Args:
            rows_of: from the rows in a global batch to those that are wanted of it.
        """
        import grain  # Half a second, which only a run needs to spend.

        steps = grain.MapDataset.range(start_step, 2**62)
        batches = steps.map(lambda step: self.batch(int(step), rows_of(stage_at(self.config, step).batch_size)))
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)))

    def held_out(self, batch_size: int, max_batches: int = 0, rows: Rows | None = None) -> "HeldOut":
        """Held-out batches of data.sequence_length: documents in order, the last batch filled with padding.

        With `max_batches` above 0, at most that many, of rows spread evenly over the held-out text. With `rows`, only
        those of each batch.
        """
        return HeldOut(self.prepared, batch_size, max_batches, rows)

    def held_out_text(self, most_bytes: int = HELD_OUT_BYTES) -> bytes:
        """The held-out documents, one after the other, as the tokenizer gives them back: all, or where they come to
        more than `most_bytes`, about as much, of documents spread evenly over them."""
        plans = self.prepared.held_out
        total = sum(plan.manifest["text"]["bytes"] for plan in plans)
        step = max(-(-total // most_bytes), 1)
        texts = []
        for store, plan in zip(self.prepared.stores, plans, strict=True):
            chosen = np.unique(plan.documents)[::step].tolist()
            for first in range(0, len(chosen), DOCUMENTS_AT_ONCE):
                some = chosen[first : first + DOCUMENTS_AT_ONCE]
                spans = [(document, 0, int(store.lengths(document, document + 1)[0])) for document in some]
                texts += map(self.tokenizer.decode, store.read(spans))
        return "".join(texts).encode("utf-8")

    @property
    def content_hash(self) -> str:
        """SHA-256 over tokenizer, tokens and plans: equal when, and only when, the same batches can be made."""
        return self.prepared.content_hash

    def describe(self) -> dict:
        """Counts for summaries, reports and data.json. See `describe.describe`."""
        return describe(self.prepared, self.tokenizer)


class HeldOut(Sequence[Batch]):
    """Held-out batches, each made when it is asked for. See `Data.held_out`."""

    def __init__(self, prepared: Prepared, batch_size: int, max_batches: int, part: Rows | None):
        self.prepared, self.batch_size = prepared, batch_size
        self.part = np.arange(batch_size) if part is None else np.asarray(part, np.int64)
        self.ends = np.cumsum([plan.rows for plan in prepared.held_out])
        total = int(self.ends[-1])
        chosen = min(total, max_batches * batch_size) if max_batches else total
        self.rows = np.arange(chosen) * total // max(chosen, 1)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        prepared, mask = self.prepared, self.prepared.config.data.segment_mask
        begin = index % len(self) * self.batch_size
        there = self.rows[begin : begin + self.batch_size]
        rows = there[self.part[self.part < len(there)]]
        batch = empty_batch(len(self.part), prepared.config.data.sequence_length)
        sources = np.searchsorted(self.ends, rows, "right")
        for source in np.unique(sources).tolist():
            mine, plan = np.flatnonzero(sources == source), prepared.held_out[source]
            in_plan = rows[mine] - (self.ends[source] - plan.rows)
            write_rows(batch, mine, plan, in_plan, prepared.stores[source], NO_FIM, mask)
        return batch


def open_data(config: RunConfig, progress: bool = True, workdir: str | Path | None = None) -> Data:
    """Opens the data of a run; curates, tokenizes and packs first what is not in data.directory yet, with progress
    bars. What the run in `workdir` has recorded is opened as it is, without a look at the sources.

    Raises ConfigError for sources, tokenizers and directories that cannot serve.
    """
    recorded = open_recorded(config, workdir) if workdir else None
    return Data(*(recorded or prepare(config, progress, recorded_mixture(workdir) if workdir else True)))
