"""Engines over small random models, and what they must give, for the tests of generation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from small_models import FAMILIES, random_model

from opendeep_jax.config.schema import MTPConfig
from opendeep_jax.generation.engine import Engine, EngineConfig
from opendeep_jax.generation.requests import SamplingParams

MODELS = FAMILIES | {
    "gqa with mtp": dataclasses.replace(FAMILIES["gqa"], mtp=MTPConfig(depth=1)),
    # Runs of layers that are scanned, one after another.
    "deep v3": dataclasses.replace(FAMILIES["v3"], num_layers=5, mtp=MTPConfig(depth=0)),
    "deep hybrid": dataclasses.replace(FAMILIES["nemotron-h"], num_layers=9, layer_pattern="MMMM****E"),
}
LENGTH = 128
SETTINGS = {"slots": 4, "max_length": LENGTH, "page_size": 8, "prefill_tokens": 32}


@functools.cache
def model_of(family: str):
    return random_model(dataclasses.replace(MODELS[family], context_length=2 * LENGTH))


@functools.cache
def engine_of(family: str, **settings) -> Engine:
    """An engine that tests share, as each compiles its programs; idle between them."""
    return Engine(model_of(family), EngineConfig(**SETTINGS | settings))


@functools.cache
def _forward(family: str):
    model = model_of(family)
    return jax.jit(lambda tokens: model(tokens))


def logits_of(family: str, tokens) -> np.ndarray:
    """The model's logits of a text, without a cache."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(family)(jnp.asarray(padded)))[0, : len(tokens)]


def greedy(family: str, prompt: list[int], count: int) -> list[int]:
    """The most likely continuation, the whole text again for each token."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(logits_of(family, text)[-1].argmax()))
    return text[len(prompt) :]


def mixed_requests(count: int, seed: int = 0, longest: int = 60) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of many lengths, settings of many kinds."""
    random = np.random.default_rng(seed)
    prompts = [random.integers(1, 64, int(length)).tolist() for length in random.integers(1, longest, count)]
    params = [
        SamplingParams(
            max_tokens=int(random.integers(1, 40)),
            temperature=[0.0, 0.7, 1.3][i % 3],
            top_k=[0, 5][i % 2],
            top_p=[1.0, 0.9, 1.0, 0.5][i % 4],
            min_p=[0.0, 0.0, 0.05][i % 3],
            seed=int(random.integers(0, 2**32)),
            end_ids=(int(random.integers(1, 64)),),
            logprobs=[-1, -1, 3][i % 3],
        )
        for i in range(count)
    ]
    return prompts, params
