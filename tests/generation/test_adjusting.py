"""Penalties, biases and ends that come too soon, against plain arithmetic on the model's own logits."""

import collections
import dataclasses

import numpy as np
import pytest
from generators import SETTINGS, engine_of, logits_of, model_of

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.engine import Engine, EngineConfig
from opendeep_jax.generation.requests import Request, SamplingParams
from opendeep_jax.generation.sampling import FEW_CHANGES, adjustments

GREEDY = SamplingParams(max_tokens=12, temperature=0)
PROMPT = [5, 6, 7, 5]
CHANGES = {
    "frequency": {"frequency_penalty": 2.0},
    "presence": {"presence_penalty": 1.5},
    "repetition": {"repetition_penalty": 1.8},
    "bias": {"logit_bias": ((21, 100.0), (8, -100.0))},
    "all": {"frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.3, "logit_bias": ((9, 2.0),)},
}


def expected(prompt: list[int], params: SamplingParams) -> list[int]:
    """Greedy tokens by the whole model and numpy."""
    tokens: list[int] = []
    for _ in range(params.max_tokens):
        logits = np.array(logits_of("dense", prompt + tokens)[-1], np.float64)
        said = collections.Counter(tokens)
        for token in {*prompt, *tokens}:
            logits[token] *= 1 / params.repetition_penalty if logits[token] > 0 else params.repetition_penalty
        for token, count in said.items():
            logits[token] -= params.frequency_penalty * count + params.presence_penalty
        for token, value in params.logit_bias:
            logits[token] += value
        tokens.append(int(logits.argmax()))
    return tokens


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_tokens_are_chosen_by_the_changed_logits_and_others_rows_are_as_without(change):
    params, engine = dataclasses.replace(GREEDY, **change), engine_of("dense")
    alone = engine.generate([PROMPT], GREEDY)[0].tokens
    changed, plain = engine.generate([PROMPT, PROMPT], [params, GREEDY])
    assert changed.tokens == expected(PROMPT, params) != alone
    assert plain.tokens == alone


def test_log_probabilities_stay_the_models_own():
    params = dataclasses.replace(GREEDY, max_tokens=1, logprobs=3, logit_bias=((21, 100.0),))
    (found,) = engine_of("dense").generate([PROMPT], params)
    (plain,) = engine_of("dense").generate([PROMPT], dataclasses.replace(params, logit_bias=()))
    assert found.tokens == [21] and found.logprobs[0].top == plain.logprobs[0].top
    assert found.logprobs[0].logprob < plain.logprobs[0].logprob


def test_no_end_is_chosen_before_the_least_length():
    engine = engine_of("dense")
    first = engine.generate([PROMPT], GREEDY)[0].tokens[0]
    ends = dataclasses.replace(GREEDY, end_ids=(first,))
    assert engine.generate([PROMPT], ends)[0].tokens == []
    (found,) = engine.generate([PROMPT], dataclasses.replace(ends, min_tokens=5))
    assert len(found.tokens) >= 5 and first not in found.tokens


def test_no_program_is_compiled_for_a_request_of_its_own():
    engine = Engine(model_of("dense"), EngineConfig(**SETTINGS))
    engine.generate([PROMPT], dataclasses.replace(GREEDY, frequency_penalty=1.0))
    compiled = engine.programs.sample._cache_size()
    for number in range(3):
        engine.generate([[*PROMPT, number]], dataclasses.replace(GREEDY, logit_bias=((number, 1.0 + number),)))
    assert engine.programs.sample._cache_size() == compiled


def test_many_changes_take_longer_lists_and_none_takes_nothing():
    many = SamplingParams(logit_bias=tuple((token, 1.0) for token in range(FEW_CHANGES + 1)))
    found = adjustments([Request([1], many), None, Request([1], SamplingParams())])
    assert found.tokens.shape == (3, 8 * FEW_CHANGES) and (found.added[1:] == 0).all()
    assert adjustments([Request([1], SamplingParams()), None]) is None


def test_an_engine_that_guesses_ahead_refuses_them():
    with pytest.raises(ConfigError, match="speculate = 0"):
        engine_of("gqa with mtp", speculate=1).submit(PROMPT, dataclasses.replace(GREEDY, presence_penalty=1.0))
