"""What a model says of itself where nobody says anything: its context, its sampling."""

import dataclasses
import json
import math

import numpy as np
import pytest
from small_models import DENSE

from opendeep_jax.generation.cache import bytes_per_token
from opendeep_jax.generation.requests import EngineConfig
from opendeep_jax.pretrained.engines import fitting_length
from opendeep_jax.pretrained.sources import sampling_defaults
from opendeep_jax.text.files import byte_tokenizer, save_tokenizer, tokenizer_from_hf
from opendeep_jax.text.gguf_tokenizer import OWN, gguf_fields_of, tokenizer_from_gguf_fields

ONE = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


@pytest.mark.parametrize(
    "tokens, config, want",
    [(10**6, {}, 100_000), (8 * 20_480, {}, 20_480), (0, {}, 4096), (0, {"cache_tokens": 9000}, 9000)],
)
def test_the_default_context_is_the_models_as_far_as_memory_holds_it(tokens, config, want):
    model = dataclasses.replace(DENSE, context_length=100_000)
    free = tokens * bytes_per_token(model)
    assert fitting_length(EngineConfig(slots=8, **config), model, ONE, free) == want


def tokenizer_that_samples(directory, **said):
    """A tokenizer of bytes with a generation_config.json."""
    save_tokenizer(byte_tokenizer(), directory)
    (directory / "generation_config.json").write_text(json.dumps(said), "utf-8")
    return tokenizer_from_hf(directory)


def test_a_models_own_sampling_is_read_and_what_makes_no_sense_left_out(tmp_path):
    said = {"temperature": 0.6, "top_k": 20, "top_p": 7, "min_p": None, "do_sample": True, "repetition_penalty": False}
    assert sampling_defaults(tokenizer_that_samples(tmp_path, **said)) == {"temperature": 0.6, "top_k": 20}
    assert sampling_defaults(byte_tokenizer()) == {}


@pytest.mark.parametrize("ours", [True, False], ids=["our file", "a file of llama.cpp's"])
def test_a_gguf_has_its_models_own_sampling(tmp_path, ours):
    said = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.05}
    tokenizer = tokenizer_that_samples(tmp_path, **said)
    fields = gguf_fields_of(tokenizer, tokenizer.vocab_size)
    fields = {name: float(np.float32(value)) if type(value) is float else value for name, value in fields.items()}
    found = tokenizer_from_gguf_fields({name: value for name, value in fields.items() if ours or name != OWN})
    assert sampling_defaults(found) == said


@pytest.mark.parametrize("said", [-1, 10**12, math.inf, math.nan, "20", True, None, [1]])
def test_sampling_that_a_gguf_has_no_number_for_is_not_written_under_its_keys(tmp_path, said):
    tokenizer = tokenizer_that_samples(tmp_path, top_k=said, temperature=said)
    fields = gguf_fields_of(tokenizer, tokenizer.vocab_size)
    assert not [name for name in fields if name.startswith("general.sampling")]
