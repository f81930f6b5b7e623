"""What is compiled beforehand is all that requests need."""

import jax
import pytest
from generators import SETTINGS, mixed_requests, model_of

from opendeep_jax.config.schema import ParallelConfig
from opendeep_jax.generation.engine import Engine, EngineConfig
from opendeep_jax.generation.requests import SamplingParams
from opendeep_jax.generation.warm_up import prompt_shapes, warm_up
from opendeep_jax.parallel.mesh import make_mesh

LONGEST = 36


def compiled(engine: Engine) -> list[int]:
    """How many programs of each kind there are."""
    functions = [f for f in jax.tree.leaves(engine.programs._asdict(), is_leaf=callable) if callable(f)]
    return [function._cache_size() for function in functions]


@pytest.mark.parametrize(
    "family, settings, sizes",
    [("dense", {}, {}), ("gqa with mtp", {"speculate": 1}, {}), ("dense", {"slots": 4}, {"tensor": 2})],
)
def test_requests_up_to_the_given_length_compile_nothing_more(family, settings, sizes):
    mesh = make_mesh(ParallelConfig(**{"fsdp": 1} | sizes), jax.devices()[:2]) if sizes else None
    engine = Engine(model_of(family), EngineConfig(**SETTINGS | settings), mesh)
    reports = list(warm_up(engine, LONGEST))
    total = len(reports) - 1
    assert reports == [(done, total) for done in range(total + 1)] and total > 3
    before = compiled(engine)
    assert sum(before) > total  # choosing is a program too
    for length in range(1, LONGEST - 1, 3):
        prompts = [[1 + length] * length]
        engine.generate(prompts, SamplingParams(max_tokens=LONGEST - length, temperature=0.5, logprobs=length % 3 - 1))
    assert compiled(engine) == before
    assert engine.stats.free_pages == engine.stats.total_pages and not engine.busy


def test_warming_up_changes_no_output():
    engine = Engine(model_of("dense"), EngineConfig(**SETTINGS))
    prompts, params = mixed_requests(6, seed=4)
    want = engine.generate(prompts, params)
    list(warm_up(engine, 20))
    assert engine.generate(prompts, params) == want


def test_a_long_prompt_has_the_chunks_that_the_engine_takes():
    engine = Engine(model_of("dense"), EngineConfig(**SETTINGS))
    seen, take = set(), engine.programs.next_logits

    def noting(first):
        def next_logits(weights, cache, rows):
            if len(rows.tokens) == engine.shards:
                seen.add((first, rows.tokens.shape[1], rows.pages.shape[1]))
            return take[first](weights, cache, rows)

        return next_logits

    engine.programs = engine.programs._replace(next_logits={first: noting(first) for first in (False, True)})
    for length in range(1, engine.max_length):
        engine.generate([[1] * length], SamplingParams(max_tokens=1, temperature=0))
    assert seen == set(prompt_shapes(engine, engine.max_length))
