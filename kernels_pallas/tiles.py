"""Tile sizes of the kernels, from a small table by chip and shape.

`benchmarks/tune_kernels.py` writes the table. A row says for which kernel, chip and shape it was found, by which
means, and what it holds:

    {"kernel": "grouped_matmul", "chip": "v5p", "shape": {"inner": 7168, "out": 2048}, "tiles": {"rows": 512, ...}}
"""

import functools
import json
import math
from pathlib import Path

TABLE = Path(__file__).with_name("tiles.json")


@functools.cache
def table() -> tuple[dict, ...]:
    """The rows of tiles.json."""
    return tuple(json.loads(TABLE.read_text())["rows"])


def tiles(kernel: str, chip: str, **shape: int) -> dict[str, int]:
    """The tile sizes found for the nearest shape of a kernel on a chip; without any, {}: the kernel's own defaults.

    Near is by ratio: the sum over the shape's names of |log(size / the row's size)|. Only rows that were found for
    exactly these names count, so one kernel can have several kinds of rows. The kernel fits what it gets to its own
    shape: a row for another size may have tiles that divide nothing here.

    Args:
        kernel: the name of a kernel's folder, or of one function of it.
        chip: as in `target.chip()`.
        shape: sizes by name, all positive.
    """
    rows = [row for row in table() if (row["kernel"], row["chip"]) == (kernel, chip)]
    rows = [row for row in rows if row["shape"].keys() == shape.keys()]
    if not rows:
        return {}
    return dict(min(rows, key=functools.partial(_distance, shape))["tiles"])


def _distance(shape, row):
    return sum(abs(math.log(size / row["shape"][name])) for name, size in shape.items())
