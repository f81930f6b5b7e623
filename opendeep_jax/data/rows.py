"""Rows of packing plans as parts of a Batch. Shapes: B rows, L positions."""

import numpy as np

from opendeep_jax.data.batch import Batch
from opendeep_jax.data.fim import FimRule, read_pieces
from opendeep_jax.data.plan import Plan
from opendeep_jax.data.store import Store


def empty_batch(rows: int, length: int) -> Batch:
    """A Batch of `rows` rows that are padding throughout."""
    tokens, targets, segment_ids, positions = (np.zeros((rows, length), np.int32) for _ in range(4))
    return Batch(
        tokens=tokens,
        targets=targets,
        loss_mask=np.zeros((rows, length), np.bool_),
        segment_ids=segment_ids,
        positions=positions,
    )


def write_rows(
    batch: Batch,
    in_batch: np.ndarray,
    plan: Plan,
    in_plan: np.ndarray,
    store: Store,
    fim: FimRule,
    segment_mask: bool = True,
) -> None:
    """Writes the rows `in_plan` of a plan into the rows `in_batch` of a batch; what a row doesn't fill is padding.

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
