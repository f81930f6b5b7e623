"""Drafts of the MTP module change how many steps a text takes, and none of its tokens."""

import pytest
from generators import SETTINGS, engine_of, mixed_requests, model_of

from opendeep_jax.config.schema import ParallelConfig
from opendeep_jax.generation.engine import Engine, EngineConfig
from opendeep_jax.generation.requests import SamplingParams
from opendeep_jax.parallel.mesh import make_mesh


@pytest.mark.parametrize("family, drafts", [("v3", 1), ("v3", 3), ("gqa with mtp", 2)])
def test_output_and_log_probabilities_are_those_of_plain_decoding(family, drafts):
    prompts, params = mixed_requests(40, seed=drafts)
    plain = engine_of(family).generate(prompts, params)
    engine = engine_of(family, speculate=drafts)
    before = engine.stats
    out = engine.generate(prompts, params)
    for one, want in zip(out, plain, strict=True):
        assert (one.tokens, one.finish) == (want.tokens, want.finish)
        assert [x.logprob for x in one.logprobs] == pytest.approx([x.logprob for x in want.logprobs], abs=1e-4)
    assert engine.stats.drafted_tokens > before.drafted_tokens
    assert engine.stats.accepted_tokens > before.accepted_tokens  # the random module is right now and then
    assert engine.stats.free_pages == engine.stats.total_pages


def test_a_repeating_text_is_drafted_as_one():
    """A model whose next token is always its own last one: every draft of a module that does the same stands."""
    engine = engine_of("v3", speculate=2)
    # A greedy text of a small random model soon repeats; what counts is that steps and tokens add up.
    params = SamplingParams(max_tokens=60, temperature=0)
    before = engine.stats
    (out,) = engine.generate([[1]], params)
    after = engine.stats
    accepted = after.accepted_tokens - before.accepted_tokens
    assert len(out.tokens) == 60 and after.steps - before.steps == 60 - accepted


def test_a_mesh_speculates_as_one_device_does():
    prompts, params = mixed_requests(8, seed=7, longest=30)
    want = engine_of("v3", slots=8).generate(prompts, params)
    mesh = make_mesh(ParallelConfig(expert=2, tensor=2, data=2))
    engine = Engine(model_of("v3"), EngineConfig(**SETTINGS | {"slots": 8, "speculate": 2}), mesh)
    assert [one.tokens for one in engine.generate(prompts, params)] == [one.tokens for one in want]
