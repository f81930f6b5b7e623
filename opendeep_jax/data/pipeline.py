"""Everything a run trains on, open, and its batches. A batch is a pure function of the configuration and the step.

data = open_data(config)            # opening.py; prepares what is not there yet
data.batch(0)                       # the Batch of step 0
for batch in data.iterate(1000):    # the batches from step 1000 on, prepared ahead in the background
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from opendeep_jax.config.schedule import stage_at
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.describe import describe
from opendeep_jax.data.fim import FimRule
from opendeep_jax.data.held_out import HeldOut, compression, held_out_text
from opendeep_jax.data.order import Order, PlanKey
from opendeep_jax.data.plan import Plan
from opendeep_jax.data.rows import empty_batch, write_rows
from opendeep_jax.data.store import Store
from opendeep_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from opendeep_jax.data.batch import Batch

Rows = Sequence[int] | np.ndarray
# Batches that are prepared ahead.
PREFETCH = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """All that decides a run's batches, open: tokenizer, batches to train on, and held-out text.

    A process asks for the rows that its devices hold. Rows beyond a batch's own are padding: they have no target.
    """

    config: RunConfig
    tokenizer: Tokenizer
    stores: list[Store]
    """In the order of data.sources."""
    plans: dict[PlanKey, Plan]
    """The training split's."""
    held_out_plans: list[Plan]
    """The held-out split's, in the order of data.sources."""
    order: Order
    fim: FimRule
    left_out_files: list[dict[str, int]] = dataclasses.field(default_factory=list)
    """Files of each source that hold no document, by reason, in the order of data.sources."""

    def batch(self, step: int, rows: Rows | None = None) -> "Batch":
        """The Batch of `step` (from 0), or only `rows` of it (ascending): numpy arrays of int32 and bool, [rows, L]."""
        stage = stage_at(self.config, step)
        rows = np.arange(stage.batch_size) if rows is None else np.asarray(rows, np.int64)
        batch = empty_batch(len(rows), stage.length)
        for source, kind, in_batch, in_plan in self.order.rows_of_step(step, rows[rows < stage.batch_size]):
            plan, store = self.plans[source, kind], self.stores[source]
            mine = np.searchsorted(rows, in_batch)
            write_rows(batch, mine, plan, in_plan, store, self.fim, self.config.data.segment_mask)
        return batch

    def iterate(
        self, start_step: int = 0, rows_of: Callable[[int], Rows | None] = lambda batch_size: None
    ) -> "Iterator[Batch]":
        """The batches of `start_step` and all later steps, without end, prepared ahead in a background thread.

        Args:
            rows_of: from the rows in a global batch to those that are wanted of it.
        """
        import grain  # Half a second, which only a run needs to spend.

        steps = grain.MapDataset.range(start_step, 2**62)
        batches = steps.map(lambda step: self.batch(int(step), rows_of(stage_at(self.config, step).batch_size)))
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)))

    def held_out(self, batch_size: int, max_batches: int = 0, rows: Rows | None = None) -> HeldOut:
        """Held-out batches of data.sequence_length: documents in order, the last batch filled with padding.

        With `max_batches` above 0, at most that many, of rows spread evenly over the held-out text. With `rows`, only
        those of each batch.
        """
        return HeldOut(self, batch_size, max_batches, rows)

    held_out_text = held_out_text
    compression = compression
    describe = describe

    @property
    def content_hash(self) -> str:
        """SHA-256 over tokenizer, tokens and plans: equal when, and only when, the same batches can be made."""
        parts = [self.tokenizer.content_hash, *(store.content_hash for store in self.stores)]
        parts += [plan.content_hash for plan in (*self.plans.values(), *self.held_out_plans)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
