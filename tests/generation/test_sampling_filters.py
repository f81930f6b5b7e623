"""Tokens are drawn from the distribution that the settings describe, by the row's own seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.requests import SamplingParams
from opendeep_jax.generation.sampling import RowSampling, draw, filtered, idle

VOCAB = 29
filter_jitted, draw_jitted = jax.jit(filtered), jax.jit(draw)


def rows(count, **values) -> RowSampling:
    given = idle(count)._replace(temperature=np.ones(count, np.float32))
    return given._replace(**{name: np.asarray(value, getattr(given, name).dtype) for name, value in values.items()})


def kept_by_definition(logits, temperature, top_k, top_p, min_p):
    """Which tokens the filters leave, by sorting."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    kept = np.zeros(len(logits), bool)
    kept[order[: top_k or len(logits)]] = True
    kept |= scaled >= scaled[kept].min()  # equals of the last one stay
    probabilities = np.where(kept, np.exp(scaled - scaled.max()), 0)
    probabilities /= probabilities.sum()
    by_size = np.sort(probabilities)[::-1]
    least = by_size[np.searchsorted(np.cumsum(by_size), top_p - 1e-6)] if top_p < 1 else 0
    return kept & (probabilities >= least * (1 - 1e-6)) & (probabilities >= min_p * probabilities.max() * (1 - 1e-6))


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.floats(0.02, 1),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1)),
)
def test_filters_keep_the_tokens_that_sorting_keeps(seed, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(scale=3, size=(2, VOCAB)).astype(np.float32)
    out = filter_jitted(
        logits, rows(2, temperature=[temperature] * 2, top_k=[top_k] * 2, top_p=[top_p] * 2, min_p=[min_p] * 2)
    )
    for row, got in zip(logits, np.isfinite(out), strict=True):
        want = kept_by_definition(row, temperature, top_k, top_p, min_p)
        # A token at the very edge of a sum may fall on either side of it by rounding.
        assert np.sum(got != want) <= 1 and got[np.argmax(row)]


def test_equal_logits_are_all_kept_and_the_most_likely_token_always():
    assert np.isfinite(filter_jitted(np.zeros((1, VOCAB), np.float32), rows(1, top_k=[3]))).all()
    peaked = np.where(np.arange(VOCAB) == 7, 50, 0).astype(np.float32)[None]
    for setting in ({"top_p": [1e-6]}, {"top_k": [1]}, {"min_p": [1.0]}):
        assert np.flatnonzero(np.isfinite(filter_jitted(peaked, rows(1, **setting))[0])).tolist() == [7]


def test_tokens_that_the_tokenizer_lacks_stay_out_under_every_filter():
    logits = np.where(np.arange(VOCAB) < 20, 0, -np.inf).astype(np.float32)[None]
    for setting in ({}, {"top_p": [0.9]}, {"top_k": [25]}, {"min_p": [0.1]}):
        assert not np.isfinite(filter_jitted(logits, rows(1, **setting))[0, 20:]).any()


def test_draws_follow_the_softmax_of_the_scaled_logits():
    count, temperature = 20_000, 0.7
    logits = np.random.default_rng(0).normal(size=5).astype(np.float32)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    many = jnp.broadcast_to(logits, (count, 5))
    drawn = draw_jitted(many, rows(count, temperature=[temperature] * count), np.arange(count, dtype=np.int32))
    shares = np.bincount(drawn, minlength=5) / count
    assert np.abs(shares - expected).max() < 5 * np.sqrt(0.25 / count)


def test_a_rows_draw_depends_on_its_seed_and_place_alone():
    logits = np.random.default_rng(1).normal(size=(4, VOCAB)).astype(np.float32)
    index = np.array([5, 5, 6, 5], np.int32)
    alone = draw_jitted(logits[:1], rows(1, seed=[3]), index[:1])
    together = draw_jitted(logits[[0] * 4], rows(4, seed=[3, 4, 3, 3], top_k=[0, 3, 0, 0]), index)
    assert together[0] == together[3] == alone[0]
    spread = draw_jitted(np.zeros((64, VOCAB), np.float32), rows(64, seed=np.arange(64)), np.zeros(64, np.int32))
    assert len(set(spread.tolist())) > VOCAB // 2
    along = draw_jitted(np.zeros((64, VOCAB), np.float32), rows(64), np.arange(64, dtype=np.int32))
    assert len(set(along.tolist())) > VOCAB // 2


def test_rows_of_temperature_zero_take_the_most_likely_token_beside_rows_that_draw():
    logits = np.random.default_rng(2).normal(size=(3, VOCAB)).astype(np.float32)
    out = draw_jitted(logits, rows(3, temperature=[0, 5, 0], top_k=[2, 0, 0]), np.zeros(3, np.int32))
    assert out[0] == logits[0].argmax() and out[2] == logits[2].argmax()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_tokens": 0}, "max_tokens = 0: must be at least 1"),
        ({"temperature": -0.1}, "temperature = -0.1: must be from 0 to 100"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_p": 0.0}, "top_p = 0.0: must be above 0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"min_p": 2}, "min_p = 2"),
        ({"top_k": 1.5}, "top_k = 1.5: must be a whole number"),
        ({"seed": 2**32}, "seed = 4294967296: must be from 0"),
        ({"seed": True}, "seed = True: must be a whole number"),
        ({"logprobs": 21}, "logprobs = 21: must be from -1 to 20"),
        ({"max_tokens": "many"}, "max_tokens = 'many': must be a whole number"),
    ],
)
def test_absurd_settings_are_refused_with_the_rule(change, message):
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        SamplingParams(**change)
