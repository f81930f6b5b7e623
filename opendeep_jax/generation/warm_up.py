"""The programs that requests will need, compiled before the first request comes."""

from collections.abc import Iterator

import jax
import numpy as np

from opendeep_jax.generation import sampling
from opendeep_jax.generation.engine import Engine
from opendeep_jax.generation.forward import Rows
from opendeep_jax.generation.requests import SMALLEST_CHUNK, bucket, chunk_size


def warm_up(engine: Engine, longest: int = 0) -> Iterator[tuple[int, int]]:
    """Compile by running each program once without a request; yield how many are done, and of how many.

    What is left out is compiled when it is first needed: scores, groups of samples, log-probabilities of what is drawn
    from, and prompts that are prefilled by several groups of devices at once and are at different places.

    Args:
        engine: idle.
        longest: prompt and output together for which nothing shall be left to compile; 0 takes the engine's length.
    """
    longest = min(longest or engine.max_length, engine.max_length)
    chunks, tables = prompt_shapes(engine, longest), table_sizes(engine, longest)
    total = len(chunks) + len(tables)
    for done, (first, new, pages) in enumerate(chunks):
        yield done, total
        with jax.set_mesh(engine.mesh):
            _prefill(engine, first, idle_rows(engine, engine.shards, new, pages))
    for done, pages in enumerate(tables, len(chunks)):
        yield done, total
        with jax.set_mesh(engine.mesh):
            _decode(engine, idle_rows(engine, engine.slots, 1 + engine.config.speculate, pages))
    jax.block_until_ready(engine.cache)
    yield total, total


def prompt_shapes(engine: Engine, longest: int) -> list[tuple[bool, int, int]]:
    """Return (whether it is a prompt's first, new tokens, pages) of all chunks of prompts, small first."""
    most, shapes = engine.config.prefill_tokens, set()
    for begin in range(0, longest, most):  # a prompt has whole chunks, and then at most one more's tokens
        for left in range(1, min(most, longest - 1 - begin - engine.left_to_decode) + 1):
            start = begin
            while left:
                count = chunk_size(left, most)
                shapes.add((start == 0, bucket(count, SMALLEST_CHUNK), engine.pages_seen(start + count)))
                start, left = start + count, left - count
    return sorted(shapes, key=lambda shape: (shape[2], shape[1]))


def table_sizes(engine: Engine, longest: int) -> list[int]:
    """Pages in the tables of all decoding steps, small first."""
    furthest = longest + engine.config.speculate
    return sorted({engine.pages_seen(min(at, furthest)) for at in range(1, furthest + engine.page_size)})


def idle_rows(engine: Engine, rows: int, new: int, pages: int) -> Rows:
    """A step's rows without a request among them."""
    zeros = np.zeros(rows, np.int32)
    table, slots = np.zeros((rows, pages), np.int32), np.full(rows, engine.slots_per_shard, np.int32)
    return Rows(np.zeros((rows, new), np.int32), zeros, zeros, table, slots)


def _prefill(engine: Engine, first: bool, rows: Rows) -> None:
    programs = engine.programs
    if engine.config.speculate:
        _, engine.cache = programs.prefill_drafting[first](engine.weights, engine.cache, rows, rows.tokens)
    else:
        (logits, _), engine.cache = programs.next_logits[first](engine.weights, engine.cache, rows)
        _sample(engine, logits)


def _decode(engine: Engine, rows: Rows) -> None:
    programs, zeros, settings = engine.programs, rows.start, sampling.idle(len(rows.start))
    if engine.config.speculate:
        out, engine.cache = programs.verify(engine.weights, engine.cache, rows, zeros, settings, zeros)
        for wanted in _output_sets(engine):
            if any(wanted):
                programs.describe(wanted, out.tokens, out.logits, settings)
    else:
        (logits, _), engine.cache = programs.next_logits[False](engine.weights, engine.cache, rows)
        _sample(engine, logits)


def _sample(engine: Engine, logits: jax.Array) -> None:
    for wanted in _output_sets(engine):
        engine.programs.sample(wanted, logits, sampling.idle(len(logits)), np.zeros(len(logits), np.int32), None)


def _output_sets(engine: Engine) -> list[sampling.Outputs]:
    """Return the combinations of outputs that servers and evaluation request."""
    return [sampling.Outputs(top, False, engine.config.kept_tokens) for top in (False, True)]
