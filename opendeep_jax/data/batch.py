"""The contract between data and training: what one step trains on.

Shapes: B rows, L positions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Bool, Float, Int

Array = Any
"""numpy's on the host, jax's in a step, abstract where a step is compiled ahead."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of packed documents, for example (B=1, L=6; two documents `[1 7 8 2]` and `[1 9 5 ...` , 1 begins, 2 ends):

    tokens       [[1, 7, 8, 2, 1, 9]]
    targets      [[7, 8, 2, 1, 9, 5]]   the token after each, also where a document goes on in the next row
    loss_mask    [[T, T, T, F, T, T]]   False where the target belongs to another document, or is padding
    segment_ids  [[1, 1, 1, 1, 2, 2]]   from 1 in each row; 0 is padding
    positions    [[0, 1, 2, 3, 0, 1]]   restart with each segment

    An objective may ask for more: a weight for each target, and arrays by name (`{"advantage": [B, L]}`), which are cut
    into micro-batches and laid on devices like tokens.
    """

    tokens: Int[Array, "B L"]
    targets: Int[Array, "B L"]
    loss_mask: Bool[Array, "B L"]
    segment_ids: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    weights: Float[Array, "B L"] | None = None
    """Weight of each target in the loss; None weighs all alike."""
    extras: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    """Arrays [B, L, ...] by name: what the objective reads besides."""
