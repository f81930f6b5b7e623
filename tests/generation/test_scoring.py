"""Scores of a text are the model's log-probabilities of its tokens."""

import numpy as np
import pytest
from generators import LENGTH, SETTINGS, engine_of, logits_of, model_of

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_recipe
from opendeep_jax.config.schema import ParallelConfig
from opendeep_jax.generation.cache import bytes_per_token, page_shapes
from opendeep_jax.generation.engine import Engine, EngineConfig
from opendeep_jax.generation.requests import SamplingParams
from opendeep_jax.generation.scoring import score
from opendeep_jax.parallel.mesh import make_mesh

TEXTS = [np.random.default_rng(length).integers(1, 64, length).tolist() for length in (2, 33, 90, 32, LENGTH)]
FIRST = [1, 5, 40, 31, 1]


def check(family, scored):
    for text, first, one in zip(TEXTS, FIRST, scored, strict=True):
        logits = logits_of(family, text).astype(np.float64)[first - 1 : -1]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want = np.take_along_axis(logprobs, np.array(text[first:])[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(one.logprobs, want, atol=1e-4)
        assert one.greedy == (logits.argmax(-1) == text[first:]).tolist()


@pytest.mark.parametrize("family", ["v3", "gpt-oss"])
def test_scores_are_the_models_log_probabilities(family):
    engine = engine_of(family)
    check(family, score(engine, TEXTS, FIRST))
    assert engine.stats.free_pages == engine.stats.total_pages


def test_the_most_likely_tokens_come_with_scores_by_the_same_arithmetic():
    engine, text = engine_of("v3"), TEXTS[2]
    (plain,), (found,) = score(engine, [text], [40]), score(engine, [text], [40], 3)
    assert found.logprobs == pytest.approx(plain.logprobs, abs=1e-5) and (found.greedy, plain.top) == (plain.greedy, [])
    logits = logits_of("v3", text)[39:-1]
    assert [[token for token, _ in top] for top in found.top] == np.argsort(-logits, axis=-1)[:, :3].tolist()
    for token, value, greedy, top in zip(text[40:], found.logprobs, found.greedy, found.top, strict=True):
        assert greedy == (value == top[0][1]) and value == dict(top).get(token, value)


def test_a_mesh_scores_several_texts_at_a_time():
    engine = Engine(
        model_of("v3"), EngineConfig(**SETTINGS | {"slots": 8}), make_mesh(ParallelConfig(data=2, expert=2, tensor=2))
    )
    check("v3", score(engine, TEXTS, FIRST))


def test_texts_that_cannot_be_scored_are_refused():
    engine = engine_of("dense")
    for texts, first, message in (
        ([[1] * (LENGTH + 1)], [1], f"A text of {LENGTH + 1} tokens"),
        ([[1, 2]], [0], "from place 0 on"),
        ([[1, 2]], [3], "from place 3 on"),
    ):
        with pytest.raises(ConfigError, match=message):
            score(engine, texts, first)


def test_texts_are_scored_beside_running_requests_as_far_as_pages_last():
    engine = Engine(model_of("dense"), EngineConfig(**SETTINGS | {"cache_tokens": 64}))
    want = score(engine, [TEXTS[1]], [1])
    params = SamplingParams(max_tokens=12, temperature=0)
    request = engine.submit([3] * 10, params)
    engine.step()
    assert score(engine, [TEXTS[1]], [1]) == want
    with pytest.raises(ConfigError, match="takes 8 pages of the cache, and running requests leave 5"):
        score(engine, [[1] * 60], [1])
    while engine.busy:
        engine.step()
    assert request.tokens == engine_of("dense").generate([[3] * 10], params)[0].tokens


def test_the_cache_of_deepseek_v3_takes_what_its_report_says():
    v3 = load_recipe("deepseek_v3").model
    assert bytes_per_token(v3) == 2 * (512 + 64) * 61
    assert bytes_per_token(v3, mtp=True) == 2 * (512 + 64) * 62
    assert page_shapes(v3, 64, "tpu") == {"latent": (64, 640)}
