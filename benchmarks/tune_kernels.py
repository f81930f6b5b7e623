"""Finds tile sizes of the TPU kernels and writes them to kernels_pallas/tiles.json.

    python benchmarks/tune_kernels.py --static [--chips=v5p,v7x] [--models=v3] [--kernels=grouped_swiglu]
    python benchmarks/tune_kernels.py --measure [--models=v3]

`--static` needs no TPU: libtpu (`pip install 'opendeep-jax[tpu-compiler]'`) compiles each candidate, and the time of a
balanced load whose groups begin anywhere follows from the final schedule's loops and from the bytes moved, whichever
is more. It is a bound, not a measurement. `--measure` times the candidates on the TPU at hand. Either prints a line for
each candidate and keeps the fastest of each shape; rows of other chips and shapes in the table stay.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import static_schedule  # noqa: E402

MODELS = {
    "v3": {"hidden": 7168, "expert": 2048, "groups": 32, "rows": 131072},
    "v2_lite": {"hidden": 2048, "expert": 1408, "groups": 64, "rows": 49152},
}
"""Widths of the experts' matmuls, and the experts and rows that one chip has."""

DIRECTIONS = {
    "grouped_matmul": ("expert", "hidden"),
    "grouped_matmul_transposed": ("hidden", "expert"),
    "grouped_swiglu": ("hidden", "expert"),
    "grouped_matmul_transposed_sum": ("expert", "hidden"),
    "grouped_matmul_weights": ("hidden", "expert"),
}
"""Each kernel as training calls it: from which width to which. The last one also the other way."""

ROWS_CANDIDATES = [
    {"granule": granule, "edge": edge, "sub_columns": sub, "chunk": chunk}
    for granule, edge in ((128, 64), (256, 128))
    for sub in (512, 1024)
    for chunk in (1024, 2048)
]
GROUPS_CANDIDATES = [
    {"granule": granule, "inner": inner, "sub_inner": sub}
    for granule in (128, 256)
    for inner, sub in ((1024, 256), (1024, 512), (1792, 896))
]
"""What is tried; what is not named is the kernel's default."""


def problems(models: list[str], kernels: list[str]):
    """(kernel, inner, out, groups, rows) of every shape to tune."""
    for model, kernel in itertools.product(models, kernels):
        sizes = MODELS[model]
        begin, end = (sizes[name] for name in DIRECTIONS[kernel])
        yield kernel, begin, end, sizes["groups"], sizes["rows"]
        if kernel == "grouped_matmul_weights":
            yield kernel, end, begin, sizes["groups"], sizes["rows"]


def candidates(problem: tuple, chip: str) -> list:
    """The different valid tiles of a problem on a chip."""
    from kernels_pallas.grouped_matmul import tpu, tpu_groups, tpu_rows

    kernel, inner, out, _, rows = problem
    table = GROUPS_CANDIDATES if kernel == "grouped_matmul_weights" else ROWS_CANDIDATES
    found = []
    for wanted in table:
        if kernel == "grouped_matmul_weights":
            module, shape = tpu_groups, tpu_groups.GroupsShape(rows, inner, out)
        else:
            module, shape = tpu_rows, tpu_rows.RowsShape(rows, inner, out, *OPERANDS[kernel])
        tiles = module.fit(tpu.defaults(chip) | wanted, shape, static_schedule.CORES[chip].cores, tpu.memory(chip))
        if tiles not in found:
            found.append(tiles)
    return found


OPERANDS = {
    "grouped_matmul": (1, 1, 1),
    "grouped_matmul_transposed": (1, 1, 1),
    "grouped_swiglu": (1, 2, 3),
    "grouped_matmul_transposed_sum": (2, 2, 1),
}
"""Left sides, right sides and results of a kernel."""


def call(problem: tuple, tiles, chip: str, name: str):
    """The kernel as a function, and the shapes and dtypes of its operands."""
    import jax.numpy as jnp

    from kernels_pallas.grouped_matmul import tpu, tpu_groups, tpu_rows

    kernel, inner, out, groups, rows = problem
    options = {"tiles": tiles, "name": name, "vmem_limit": tpu.limit(chip)}
    left, sizes = ((rows, inner), jnp.bfloat16), ((groups,), jnp.int32)
    if kernel == "grouped_matmul_weights":
        function = lambda x, y, s: tpu_groups.groups_from_rows(x, y, s, dtype=x.dtype, **options)  # noqa: E731
        return function, [left, ((rows, out), jnp.bfloat16), sizes]
    transposed = "transposed" in kernel
    num_lhs, num_rhs, outputs = OPERANDS[kernel]
    right = ((groups, out, inner) if transposed else (groups, inner, out)), jnp.bfloat16
    if kernel == "grouped_swiglu":
        options |= {"epilogue": tpu_rows.silu_product, "outputs": outputs}

    def function(sizes, *operands):
        lhs, rhs, rest = operands[:num_lhs], operands[num_lhs : num_lhs + num_rhs], operands[num_lhs + num_rhs :]
        return tpu_rows.rows_by_groups(list(lhs), list(rhs), sizes, *rest, transposed=transposed, **options)

    weights = [((rows,), jnp.float32)] if kernel == "grouped_swiglu" else []
    return function, [sizes, *[left] * num_lhs, *[right] * num_rhs, *weights]


# ------------------------------------------------------------------------------------------------ from the schedule
def compile_all(chip: str, jobs: list) -> None:
    """In a process whose environment has the dump on: compiles each (problem, tiles) under a name of its own."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(platform="tpu", topology_name=static_schedule.CORES[chip].topology)
    mesh = topologies.make_mesh(topology, (len(topology.devices),), ("chip",))
    for index, (problem, tiles) in enumerate(jobs):
        function, operands = call(problem, tiles, chip, f"candidate{index}x")
        everywhere = NamedSharding(mesh, PartitionSpec())
        operands = [jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere) for shape, dtype in operands]
        specs = (PartitionSpec(),) * len(operands)
        program = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
        try:
            jax.jit(program).lower(*operands).compile()
        except Exception as error:  # too many registers or too much memory: no candidate
            print(f"{chip} {problem[0]} {tuple(tiles)}: {str(error)[:200]!r}", file=sys.stderr)


def static_seconds(problem: tuple, tiles, chip: str, schedule: static_schedule.Loop) -> dict[str, float]:
    """Bounds of one call by a kernel's loops: seconds of its schedule and of its bytes, and the matrix units' share.

    Groups are of one size and begin anywhere: each has one more edge, and one more tile of rows, than it would need.
    """
    core = static_schedule.CORES[chip]
    kernel, inner, out, groups, rows = problem
    each = rows // groups
    grid, *inside = (schedule.inner and max(schedule.inner, key=lambda loop: loop.all_matmuls())).chain()
    if kernel == "grouped_matmul_weights":
        blocks = -(-out // core.cores // tiles.columns) * -(-inner // tiles.inner)
        trips = [tiles.inner // tiles.sub_inner, tiles.columns // tiles.sub_columns]
        whole = nest(inside, trips, core)
        edges = sorted((loop for loop in grid.inner), key=lambda loop: -loop.all_matmuls())
        part = whole * tiles.granule / tiles.rows if len(edges) < 2 else nest(edges[1].chain()[1:], trips, core)
        full = each // tiles.rows - 1
        cycles = blocks * groups * (full * whole + (tiles.rows // tiles.granule + 1) * part)
        steps = blocks * groups * (full + 2)
        moved = rows * inner * -(-out // tiles.columns) + rows * out * -(-inner // tiles.inner) + groups * inner * out
    else:
        num_lhs, num_rhs, outputs = OPERANDS[kernel]
        columns = -(-out // core.cores // tiles.columns)
        trips = [1, tiles.columns // tiles.sub_columns, inner // tiles.chunk - 1]
        ordered = sorted(grid.inner, key=lambda loop: -loop.all_matmuls())
        whole = nest(ordered[0].chain(), trips, core)
        part = nest(ordered[1].chain(), trips, core) if tiles.edge < tiles.granule else whole
        edges = each // tiles.edge + 1
        per = tiles.granule // tiles.edge
        cycles = columns * groups * (edges // per * whole + edges % per * part)
        steps = columns * groups * (each // tiles.rows + 1)
        moved = num_lhs * rows * inner * -(-out // tiles.columns) + num_rhs * groups * inner * out
        moved += outputs * rows * out
    ideal = 2 * rows * inner * out * OPERANDS.get(kernel, (1, 1, 1))[1] / core.cores / core.flops_per_cycle
    seconds = (cycles + steps * grid.cycles(core)) / core.gigahertz / 1e9
    return {
        "seconds": seconds,
        "memory_seconds": 2 * moved / core.cores / core.memory_bandwidth,
        "matrix_unit_share": ideal / (cycles + steps * grid.cycles(core)),
    }


def nest(loops: list, trips: list[int], core: static_schedule.Core) -> float:
    """Cycles of nested loops that run so many times each, the outermost first; loops of one iteration may be gone."""
    trips = [trip for trip in trips if trip > 1] if len(loops) < len(trips) else trips
    trips = [1] * (len(loops) - len(trips)) + trips
    cycles = 0.0
    for loop, trip in zip(reversed(loops), reversed(trips), strict=True):
        cycles = trip * (loop.cycles(core) + cycles)
    return cycles


def tune_static(chip: str, models: list[str], kernels: list[str]) -> list[dict]:
    """Rows for the table: the fastest candidate by its schedule, of each shape."""
    jobs = [(problem, tiles) for problem in problems(models, kernels) for tiles in candidates(problem, chip)]
    best = {}
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, "--compile", chip, "--models", *models, "--kernels", *kernels]
        subprocess.run(command, env=static_schedule.environment(directory), check=True)
        for index, (problem, tiles) in enumerate(jobs):
            try:
                name = f"candidate{index}x"
                schedule = static_schedule.read_loops(static_schedule.find_schedule(directory, name), chip)
            except FileNotFoundError:
                continue
            bound = static_seconds(problem, tiles, chip, schedule)
            spilled = static_schedule.spills(directory, name)
            time_ = max(bound["seconds"], bound["memory_seconds"])
            report(chip, problem, tiles, time_, bound["matrix_unit_share"], f"{spilled[0]}/{spilled[1]} spills/fills")
            if time_ < best.get(problem, (math.inf,))[0]:
                best[problem] = time_, tiles
    return [row(chip, problem, tiles, "static schedule") for problem, (_, tiles) in best.items()]


# ------------------------------------------------------------------------------------------------------- on hardware
def tune_measured(models: list[str], kernels: list[str]) -> list[dict]:
    """Rows for the table: the fastest candidate on the TPU at hand, of each shape."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas import target

    if target.platform() != "tpu":
        raise SystemExit(f"--measure times on a TPU, and here is a {target.platform()}. --static needs none.")
    chip, best = target.chip(), {}
    for problem in problems(models, kernels):
        _, inner, out, groups, rows = problem
        for tiles in candidates(problem, chip):
            function, operands = call(problem, tiles, chip, "candidate")
            keys = jax.random.split(jax.random.key(0), len(operands))
            arrays = [
                jnp.full(shape, rows // groups, dtype) if dtype == jnp.int32 else jax.random.normal(key, shape, dtype)
                for key, (shape, dtype) in zip(keys, operands, strict=True)
            ]
            program = jax.jit(function)
            try:
                jax.block_until_ready(program(*arrays))
            except jax.errors.JaxRuntimeError as error:
                print(f"{chip} {problem[0]} {tuple(tiles)}: {str(error)[:200]!r}", file=sys.stderr)
                continue
            begun, times = time.perf_counter(), 10
            for _ in range(times):
                result = program(*arrays)
            jax.block_until_ready(result)
            seconds = (time.perf_counter() - begun) / times
            core = static_schedule.CORES[chip]
            peak = core.flops_per_cycle * core.cores * core.gigahertz * 1e9
            flops = 2 * rows * inner * out * OPERANDS.get(problem[0], (1, 1, 1))[1]
            report(chip, problem, tiles, seconds, flops / peak / seconds, "measured")
            if seconds < best.get(problem, (math.inf,))[0]:
                best[problem] = seconds, tiles
    return [row(chip, problem, tiles, "measured") for problem, (_, tiles) in best.items()]


# ------------------------------------------------------------------------------------------------------------- table
def report(chip: str, problem: tuple, tiles, seconds: float, share: float, note: str) -> None:
    """One line about a candidate."""
    kernel, inner, out, *_ = problem
    print(
        f"{chip} {kernel} {inner}x{out} {tiles}: {1e3 * seconds:.3f} ms, matrix units {share:.1%}, {note}", flush=True
    )


def row(chip: str, problem: tuple, tiles, found_by: str) -> dict:
    """A row of the table."""
    kernel, inner, out, *_ = problem
    shape = {"inner": inner, "out": out}
    return {"kernel": kernel, "chip": chip, "shape": shape, "tiles": tiles._asdict(), "found_by": found_by}


def save(rows: list[dict], path: Path) -> None:
    """Puts rows in the table, in place of those for the same kernel, chip and shape."""
    key = lambda row: (row["kernel"], row["chip"], sorted(row["shape"].items()))  # noqa: E731
    kept = [old for old in json.loads(path.read_text())["rows"] if key(old) not in [key(new) for new in rows]]
    lines = ",\n".join("    " + json.dumps(row) for row in sorted(kept + rows, key=key))
    path.write_text('{\n  "rows": [\n' + lines + "\n  ]\n}\n")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--static", action="store_true")
    how.add_argument("--measure", action="store_true")
    how.add_argument("--compile", metavar="CHIP", help=argparse.SUPPRESS)
    parser.add_argument("--chips", default=",".join(static_schedule.CORES))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--kernels", nargs="+", default=list(DIRECTIONS), choices=list(DIRECTIONS))
    chosen = parser.parse_args()
    table = ROOT / "kernels_pallas" / "tiles.json"
    if chosen.compile:
        found = [(p, tiles) for p in problems(chosen.models, chosen.kernels) for tiles in candidates(p, chosen.compile)]
        compile_all(chosen.compile, found)
    elif chosen.measure:
        save(tune_measured(chosen.models, chosen.kernels), table)
    else:
        for chip in chosen.chips.split(","):
            save(tune_static(chip, chosen.models, chosen.kernels), table)


if __name__ == "__main__":
    main()
