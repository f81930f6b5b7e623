"""The generator's compiled programs: one function each, compiled for each number of new tokens and pages that occurs.

They are kept by what they are made of, not by the engine that runs them: a second engine of one model, mesh and choice
of options compiles nothing.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opendeep_jax.config.rules import ROW_AXES
from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.generation import sampling, speculation
from opendeep_jax.generation.cache import cache_specs, copy_pages, layers_of_parts
from opendeep_jax.generation.forward import next_logits, score
from opendeep_jax.generation.requests import MOST_LOGPROBS
from opendeep_jax.generation.weights import EngineLayout, layout_of


class EnginePrograms(NamedTuple):
    """Compiled programs of an engine."""

    layout: EngineLayout
    next_logits: dict[bool, Callable]
    """`forward.next_logits`, by whether every row begins."""
    prefill_drafting: dict[bool, Callable]
    """`speculation.prefill`, likewise."""
    verify: Callable
    """`speculation.verify`."""
    sample: Callable
    """`sampling.sample`, its first argument what is wanted beside tokens."""
    describe: Callable
    """`sampling.describe_drafted`, likewise."""
    score: dict[bool, Callable]
    """`forward.score`, by whether the most likely tokens are wanted."""
    repeat: Callable
    """One row of logits so many times."""
    copy_pages: Callable
    """`cache.copy_pages`, of a cache, pages (from, to) and slots (from, to)."""


@functools.lru_cache(maxsize=32)
def programs_of(config: ModelConfig, mesh: Mesh, vocab_size: int, speculate: int, experts: bool) -> EnginePrograms:
    """Return the programs of these options; the same ones whenever they are asked for.

    Args:
        vocab_size: tokens that may be sampled.
        speculate: tokens that are drafted for each step.
        experts: give the routers' choices with each pass.
    """
    layout, both = layout_of(config, mesh), (False, True)
    compiled = partial(on_mesh, layout, mtp=speculate > 0)
    specs, rows = cache_specs(layout, speculate > 0), PartitionSpec(ROW_AXES)
    copied = jax.shard_map(
        partial(copy_pages, layers_of_parts(layout, speculate > 0)),
        mesh=mesh,
        in_specs=(specs, (rows,) * 2, (rows,) * 2),
        out_specs=specs,
        check_vma=False,
    )
    return EnginePrograms(
        layout,
        next_logits={first: compiled(partial(next_logits, layout, first, experts), extra=1) for first in both},
        prefill_drafting={
            first: compiled(partial(speculation.prefill, layout, first, experts), extra=2) for first in both
        },
        verify=compiled(partial(speculation.verify, layout, vocab_size, speculate, experts), extra=4),
        sample=jax.jit(partial(sampling.sample, vocab_size), static_argnums=0),
        describe=jax.jit(sampling.describe_drafted, static_argnums=0),
        score={top: compiled(partial(score, layout, MOST_LOGPROBS * top), extra=2) for top in both},
        repeat=jax.jit(
            lambda logits, row, count: jnp.broadcast_to(logits[row], (count, logits.shape[1])),
            static_argnums=2,
            out_shardings=NamedSharding(mesh, rows),
        ),
        copy_pages=jax.jit(copied, donate_argnums=0, out_shardings=_shardings(specs, mesh)),
    )


def on_mesh(layout: EngineLayout, function: Callable, extra: int, mtp: bool) -> Callable:
    """Return a function (weights, cache, *rows) -> (rows, cache) compiled as each device's program; the cache is
    donated.

    Args:
        extra: how many arguments of rows there are.
        mtp: whether the cache is for the MTP modules' layers too.
    """
    rows, cache = PartitionSpec(ROW_AXES), cache_specs(layout, mtp)
    mapped = jax.shard_map(
        function,
        mesh=layout.mesh,
        in_specs=(layout.specs(), cache, *[rows] * extra),
        out_specs=(rows, cache),
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=1, out_shardings=(None, _shardings(cache, layout.mesh)))


def _shardings(cache: tuple, mesh: Mesh) -> tuple:
    """Return the cache's shardings: said, lest XLA write them in other words, and each program be compiled for both."""
    return tuple({name: NamedSharding(mesh, spec) for name, spec in layer.items()} for layer in cache)
