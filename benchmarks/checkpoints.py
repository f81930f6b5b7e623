"""What a checkpoint costs: the stall of a save, writing, reading, and a plain copy of the same bytes.

    python benchmarks/checkpoints.py --megabytes=130,1000

For every size, a state of that many megabytes trains with a step that touches all of it. Printed are the medians of:
the stall that a save reports; the stall that Orbax's own asynchronous save reports, and the time that the step after
it takes beyond others, which is the rest of its stall (it hands out views of the arrays, so the next step, to whom
they were donated, has to copy or wait); the time until the files are whole; the time to restore with all digests;
and a copy of the same files. Standard output ends with the same as JSON.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from opendeep_jax.checkpoint.checkpoints import Checkpoints
from opendeep_jax.checkpoint.files import quieten_orbax, to_items
from opendeep_jax.cli.large_pages import restart_with_large_pages
from opendeep_jax.config.schema import CheckpointConfig
from opendeep_jax.faults.health import new_health
from opendeep_jax.train.state import TrainState


def make_state(megabytes: int) -> TrainState:
    """Weights and two moments, each in 20 matrices, of so many megabytes together."""
    rows = max(1, megabytes * 10**6 // (3 * 20 * 4 * 1024))
    random = np.random.default_rng(0)

    def arrays() -> dict:
        return {f"w{i}": jnp.asarray(random.normal(size=(rows, 1024)), jnp.float32) for i in range(20)}

    return TrainState(jnp.int32(0), arrays(), (arrays(), arrays()), {}, new_health())


def train_step(state: TrainState) -> TrainState:
    """Changes every array."""
    return jax.tree.map(lambda x: x * 1 + 1, state)


def timed(function: Callable, *arguments: object) -> tuple[float, object]:
    """Seconds until the result is ready, and the result."""
    begun = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begun, result


def measure(megabytes: int, directory: Path, repeats: int) -> dict:
    """All medians for one size, in seconds."""
    step, state = jax.jit(train_step, donate_argnums=0), make_state(megabytes)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    seen = {name: [] for name in ("step", "stall", "after", "write", "orbax", "orbax_after", "restore", "copy")}
    with Checkpoints(directory / "run", CheckpointConfig(keep=1)) as checkpoints:
        for _ in range(repeats + 1):  # the first is not counted: it compiles
            for _ in range(3):
                seconds, state = timed(step, state)
            seen["step"].append(seconds)
            report = checkpoints.save(state)
            begun = time.perf_counter()
            seconds, state = timed(step, state)
            seen["after"].append(seconds)
            checkpoints.wait()
            seen["stall"].append(report.stall_seconds)
            seen["write"].append(time.perf_counter() - begun)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        for _ in range(repeats + 1):
            seconds, found = timed(lambda: checkpoints.restore(abstract)[0])
            del found
            seen["restore"].append(seconds)
    files = directory / "run" / "checkpoints"
    for repeat in range(repeats + 1):
        seen["copy"].append(timed(lambda r=repeat: shutil.copytree(files, directory / f"copy{r}") and None)[0])
        shutil.rmtree(directory / f"copy{repeat}")
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(directory / "orbax", options=options, item_names=("model", "optimizer")) as manager:
        for repeat in range(repeats + 1):
            parts = {item: ocp.args.StandardSave(arrays) for item, arrays in to_items(state).items()}
            seen["orbax"].append(timed(lambda p=parts, r=repeat: manager.save(r, args=ocp.args.Composite(**p)))[0])
            del parts
            seconds, state = timed(step, state)
            seen["orbax_after"].append(seconds)
            manager.wait_until_finished()
            _, state = timed(step, state)
    medians = {name: statistics.median(times[1:]) for name, times in seen.items()}
    return {
        "bytes": size,
        "step_seconds": medians["step"],
        "stall_seconds": medians["stall"],
        "step_after_seconds": medians["after"],
        "write_seconds": medians["write"],
        "restore_seconds": medians["restore"],
        "copy_seconds": medians["copy"],
        "orbax_stall_seconds": medians["orbax"],
        "orbax_step_after_seconds": medians["orbax_after"],
    }


def table(rows: list[dict]) -> str:
    """The results, a line each, aligned."""
    heads = ("MB", "step", "stall", "step after", "Orbax's stall", "step after", "write", "restore", "copy", "")
    lines = [heads]
    for row in rows:
        names = ("step", "stall", "step_after", "orbax_stall", "orbax_step_after", "write", "restore", "copy")
        seconds = [f"{row[f'{name}_seconds'] * 1000:,.0f} ms" for name in names]
        rates = "/".join(f"{row['bytes'] / row[f'{name}_seconds'] / 1e9:.2f}" for name in ("write", "restore", "copy"))
        lines.append((f"{row['bytes'] / 1e6:,.0f}", *seconds, f"{rates} GB/s"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", default="130", help="sizes of the state, with commas between")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", default=None, help="where to write; a temporary directory by default")
    arguments = parser.parse_args()
    quieten_orbax()
    rows = []
    for megabytes in map(int, arguments.megabytes.split(",")):
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            rows.append(measure(megabytes, Path(directory), arguments.repeats))
    print(table(rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    restart_with_large_pages()  # as `opendeep train` does
    main()
