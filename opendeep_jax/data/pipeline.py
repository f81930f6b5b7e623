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
from opendeep_jax.data.fim import NO_FIM, FimRule
from opendeep_jax.data.held_out import compression, held_out_text
from opendeep_jax.data.order import Order, PlanKey
from opendeep_jax.data.plan import PackingPlan
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
    """Stores in the order of data.sources."""
    plans: dict[PlanKey, PackingPlan]
    """The training split's."""
    held_out_plans: list[PackingPlan]
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
        """Return the batches of `start_step` and all later steps, without end, prepared ahead in a background thread.

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


class HeldOut(Sequence["Batch"]):
    """Held-out batches, each made when it is asked for. See `Data.held_out`."""

    def __init__(self, data: Data, batch_size: int, max_batches: int, part: Sequence[int] | np.ndarray | None):
        self.data, self.batch_size = data, batch_size
        self.part = np.arange(batch_size) if part is None else np.asarray(part, np.int64)
        self.ends = np.cumsum([plan.rows for plan in data.held_out_plans])
        total = int(self.ends[-1])
        chosen = min(total, max_batches * batch_size) if max_batches else total
        self.rows = np.arange(chosen) * total // max(chosen, 1)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, index: int) -> "Batch":
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        data, config = self.data, self.data.config.data
        begin = index % len(self) * self.batch_size
        there = self.rows[begin : begin + self.batch_size]
        rows = there[self.part[self.part < len(there)]]
        batch = empty_batch(len(self.part), config.sequence_length)
        sources = np.searchsorted(self.ends, rows, "right")
        for source in np.unique(sources).tolist():
            mine, plan = np.flatnonzero(sources == source), data.held_out_plans[source]
            in_plan = rows[mine] - (self.ends[source] - plan.rows)
            write_rows(batch, mine, plan, in_plan, data.stores[source], NO_FIM, config.segment_mask)
        return batch


# Rows of packing plans as parts of a Batch. Shapes: B rows, L positions.


def empty_batch(rows: int, length: int) -> "Batch":
    """Return a Batch of `rows` rows that are padding throughout."""
    from opendeep_jax.data.batch import Batch  # with JAX, which looking into data does without

    tokens, targets, segment_ids, positions = (np.zeros((rows, length), np.int32) for _ in range(4))
    return Batch(
        tokens=tokens,
        targets=targets,
        loss_mask=np.zeros((rows, length), np.bool_),
        segment_ids=segment_ids,
        positions=positions,
    )


def write_rows(
    batch: "Batch",
    in_batch: np.ndarray,
    plan: PackingPlan,
    in_plan: np.ndarray,
    store: Store,
    fim: FimRule,
    segment_mask: bool = True,
) -> None:
    """Write the rows `in_plan` of a plan into the rows `in_batch` of a batch; what a row doesn't fill is padding.

    segment_mask: whether rows say where documents begin, or pass for one piece of text as in the V3 report.
    """
    first = np.asarray(plan.row_offsets[in_plan])
    counts = np.asarray(plan.row_offsets[in_plan + 1]) - first
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its row
    chosen = np.repeat(first, counts) + number
    begins, ends = plan.begins[chosen].astype(np.int64), plan.ends[chosen].astype(np.int64)
    sizes = ends - begins
    row_sizes = np.bincount(np.repeat(np.arange(len(counts)), counts), sizes, len(counts)).astype(np.int64)

    # A row's tokens and, one to the right, their targets: rows of L + 1, of which each fills the beginning.
    filled = np.arange(plan.length + 1) < row_sizes[:, None]
    stream, segments, positions = (np.zeros(filled.shape, np.int32) for _ in range(3))
    stream[filled] = read_pieces(store, fim, plan.documents[chosen].astype(np.int64), begins, ends)
    valid = filled[:, 1:]
    batch.tokens[in_batch] = stream[:, :-1] * valid
    batch.targets[in_batch] = stream[:, 1:]
    if not segment_mask:
        batch.loss_mask[in_batch] = batch.segment_ids[in_batch] = valid
        batch.positions[in_batch] = np.arange(plan.length) * valid
        return
    segments[filled] = np.repeat(number + 1, sizes)
    positions[filled] = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    batch.loss_mask[in_batch] = valid & (segments[:, :-1] == segments[:, 1:])
    batch.segment_ids[in_batch] = segments[:, :-1] * valid
    batch.positions[in_batch] = positions[:, :-1] * valid


def read_pieces(store: Store, fim: FimRule, documents: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The tokens [begin, end) of each of `documents`, rearranged if the rule says so, one piece after the other."""
    spans = np.stack([documents, begins, ends], axis=1).tolist()
    if not fim.rate:
        return np.concatenate(store.read(spans))
    id_hashes = store.id_hashes_of(documents)
    plain: list[tuple[int, int, int]] = []
    parts: list[int | None] = []  # a special token, or None for the next span of `plain`
    for span, id_hash, chosen in zip(spans, id_hashes, fim.chosen(id_hashes).tolist(), strict=True):
        if not chosen:
            plain.append(span)
            parts.append(None)
            continue
        document, begin, end = span
        tokens = int(store.lengths(document, document + 1)[0])
        for part in fim.parts(id_hash, tokens, begin, end):
            parts.append(part if isinstance(part, int) else None)
            if not isinstance(part, int):
                plain.append((document, *part))
    read = iter(store.read(plain))
    return np.concatenate([next(read) if part is None else [part] for part in parts])
