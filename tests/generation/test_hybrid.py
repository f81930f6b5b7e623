"""A hybrid's states: each request has its own, whatever runs beside it and whatever had its slot before."""

import dataclasses

import jax
import numpy as np
import pytest
from generators import SETTINGS, engine_of, greedy, logits_of, mixed_requests, model_of
from small_models import NEMOTRON_H

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ParallelConfig
from opendeep_jax.generation.cache import bytes_per_slot, bytes_per_token
from opendeep_jax.generation.engine import Engine, EngineConfig
from opendeep_jax.generation.requests import SamplingParams
from opendeep_jax.parallel.mesh import make_mesh

FAMILY = "nemotron-h"
GREEDY = SamplingParams(max_tokens=12, temperature=0)


def test_requests_that_share_steps_and_slots_get_what_each_gets_alone():
    engine = engine_of(FAMILY)
    prompts, params = mixed_requests(12, seed=1)
    alone = [engine.generate([prompt], one)[0].tokens for prompt, one in zip(prompts, params, strict=True)]
    waiting, requests = list(zip(prompts, params, strict=True)), []
    while waiting or engine.busy:
        if waiting:
            requests.append(engine.submit(*waiting.pop(0)))
        engine.step()
    assert [request.tokens for request in requests] == alone


def test_a_prompt_of_several_steps_keeps_its_state_while_others_decode():
    engine = Engine(model_of(FAMILY), EngineConfig(**SETTINGS | {"prefill_tokens": 16}))
    short, long = [3, 1, 4], list(range(1, 61)) + [5] * 20  # 80 tokens: five steps
    first = engine.submit(short, GREEDY)
    engine.step()
    second = engine.submit(long, GREEDY)
    while engine.busy:
        engine.step()
    assert first.tokens == greedy(FAMILY, short, 12) and second.tokens == greedy(FAMILY, long, 12)


def test_an_aborted_request_leaves_nothing_to_the_next_in_its_slot():
    engine = Engine(model_of(FAMILY), EngineConfig(**SETTINGS | {"slots": 1}))
    doomed = engine.submit([9] * 50, GREEDY)
    for _ in range(3):
        engine.step()
    engine.abort(doomed)
    assert engine.generate([[7]], GREEDY)[0].tokens == greedy(FAMILY, [7], 12)


def test_texts_are_scored_beside_running_requests_and_disturb_none():
    engine = engine_of(FAMILY)
    text = np.random.default_rng(0).integers(1, 64, 75).tolist()
    request = engine.submit([2, 7, 1], GREEDY)
    for _ in range(4):
        engine.step()
    scored = engine.score([text, text[:9]], [1, 4])
    while engine.busy:
        engine.step()
    assert request.tokens == greedy(FAMILY, [2, 7, 1], 12)
    for one, length, first in zip(scored, (75, 9), (1, 4), strict=True):
        logprobs = np.asarray(jax.nn.log_softmax(logits_of(FAMILY, text[:length])))
        want = [logprobs[place - 1, text[place]] for place in range(first, length)]
        np.testing.assert_allclose(one.logprobs, want, atol=2e-4)


def test_only_attention_takes_bytes_for_each_token():
    layers, heads, numbers = 1, 2, 2 * 4
    assert bytes_per_token(NEMOTRON_H) == layers * heads * numbers * 4
    assert bytes_per_slot(NEMOTRON_H) == 3 * 4 * (2 * (24 + 2 * 15) + 6 * 4 * 5)
    engine = engine_of(FAMILY)
    assert sum(x.nbytes for layer in engine.cache for name, x in layer.items() if name not in ("key", "value")) == (
        bytes_per_slot(NEMOTRON_H) * (engine.slots + 1)
    )


def test_rows_are_divided_over_a_mesh_and_heads_are_not():
    prompts, params = mixed_requests(5, seed=2, longest=16)
    params = [dataclasses.replace(one, max_tokens=min(one.max_tokens, 8)) for one in params]
    want = engine_of(FAMILY).generate(prompts, params)
    mesh = make_mesh(ParallelConfig(data=2, fsdp=2), jax.devices()[:4])
    engine = Engine(model_of(FAMILY), EngineConfig(**SETTINGS), mesh)
    assert [one.tokens for one in engine.generate(prompts, params)] == [one.tokens for one in want]


def test_a_mesh_that_divides_heads_is_refused():
    with pytest.raises(ConfigError, match="parallel.tensor = 2: a hybrid"):
        Engine(model_of(FAMILY), EngineConfig(**SETTINGS), make_mesh(ParallelConfig(tensor=2), jax.devices()[:2]))
