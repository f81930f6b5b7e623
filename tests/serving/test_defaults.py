"""What a model says of itself where nobody says anything: its context, its sampling."""

import dataclasses
import json

import pytest
from small_models import DENSE

from opendeep_jax.generation.cache import bytes_per_token
from opendeep_jax.generation.requests import EngineConfig
from opendeep_jax.serving.engines import fitting_length
from opendeep_jax.serving.sources import sampling_defaults

ONE = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


@pytest.mark.parametrize(
    "tokens, config, want",
    [(10**6, {}, 100_000), (8 * 20_480, {}, 20_480), (0, {}, 4096), (0, {"cache_tokens": 9000}, 9000)],
)
def test_the_default_context_is_the_models_as_far_as_memory_holds_it(tokens, config, want):
    model = dataclasses.replace(DENSE, context_length=100_000)
    free = tokens * bytes_per_token(model)
    assert fitting_length(EngineConfig(slots=8, **config), model, ONE, free) == want


def test_a_models_own_sampling_is_read_and_what_makes_no_sense_left_out(tmp_path):
    said = {"temperature": 0.6, "top_k": 20, "top_p": 7, "min_p": None, "do_sample": True, "eos_token_id": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(said), "utf-8")
    assert sampling_defaults(tmp_path) == {"temperature": 0.6, "top_k": 20}
    assert sampling_defaults(tmp_path / "nowhere") == {}
