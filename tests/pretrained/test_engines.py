"""Engines over any source and any mesh: what goes together, and what is refused before weights are read."""

import dataclasses
import math

import pytest
from small_models import DENSE, random_model
from starlette.testclient import TestClient

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ParallelConfig, RopeConfig
from opendeep_jax.generation.requests import EngineConfig, SamplingParams
from opendeep_jax.interop import load_gguf, save_gguf, save_hf
from opendeep_jax.pretrained.engines import Choice, mesh_sizes, open_engine, read_model_config
from opendeep_jax.pretrained.sources import open_tokenizer
from opendeep_jax.serving.server import make_app
from opendeep_jax.serving.service import EngineService
from opendeep_jax.text.files import save_tokenizer

GREEDY = SamplingParams(max_tokens=8, temperature=0)
SETTINGS = EngineConfig(slots=2, max_length=64, page_size=8, prefill_tokens=32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small random Llama over bytes: as a Hugging Face directory and as a .gguf file."""
    from live_server import chat_tokenizer

    from opendeep_jax.text.gguf_tokenizer import gguf_fields_of

    directory = tmp_path_factory.mktemp("engines")
    attention = dataclasses.replace(DENSE.attention, rope=RopeConfig(interleaved=False))
    model = random_model(
        dataclasses.replace(DENSE, vocab_size=264, context_length=128, norm_epsilon=1e-5, attention=attention)
    )
    tokenizer = chat_tokenizer()
    save_hf(model, directory / "hf")
    save_tokenizer(tokenizer, directory / "hf")
    save_gguf(model, directory / "model.gguf", "f32", gguf_fields_of(tokenizer, 264, ""), "tiny")
    return {"hf": directory / "hf", "gguf": directory / "model.gguf"}


def opened(source, config=SETTINGS, **sizes):
    parallel = ParallelConfig(**{"fsdp": 1} | sizes)
    return open_engine(Choice(str(source), "float32", parallel=parallel), open_tokenizer(source)[0], config)


def test_a_file_and_a_directory_on_a_mesh_give_the_tokens_of_one_device(tiny):
    prompts = [[5, 6, 7], [9] * 20, [3]]
    want = [one.tokens for one in opened(tiny["hf"]).generate(prompts, GREEDY)]
    for source, sizes in ((tiny["hf"], {"tensor": 2, "fsdp": 2}), (tiny["gguf"], {"tensor": 2})):
        engine = opened(source, **sizes)
        assert engine.mesh.size == math.prod(sizes.values()) and engine.slots == max(2, engine.mesh.size)
        assert [one.tokens for one in engine.generate(prompts, GREEDY)] == want


@pytest.mark.parametrize(
    "settings, sizes, words",
    [
        ({}, {"tensor": 8}, "must divide over parallel.tensor = 8"),
        ({}, {"expert": 2}, "this model has no experts"),
        ({}, {"context": 2}, "parallel.context = 2: generation divides no row"),
        ({"max_length": 1000}, {}, "the model's positions go up to 128"),
        ({"speculate": 2}, {}, "no MTP module"),
    ],
)
def test_what_does_not_go_together_is_refused_before_weights_are_read(tiny, monkeypatch, settings, sizes, words):
    monkeypatch.setattr("opendeep_jax.pretrained.engines.open_weights", None)  # whoever calls it fails otherwise
    with pytest.raises(ConfigError, match=words):
        opened(tiny["hf"], dataclasses.replace(SETTINGS, **settings), **sizes)


def test_one_axis_may_take_the_devices_that_the_others_leave():
    assert mesh_sizes(ParallelConfig(fsdp=-1, tensor=2))["fsdp"] == 4
    assert set(mesh_sizes(ParallelConfig(fsdp=1)).values()) == {1}
    for sizes, words in (({"data": 3}, "3 does not divide the 8 devices"), ({"data": -1}, "one may be -1")):
        with pytest.raises(ConfigError, match=words):
            mesh_sizes(ParallelConfig(**sizes | ({"fsdp": 1} if sizes["data"] > 0 else {})))


def test_a_sources_configuration_is_that_of_its_model(tiny):
    assert read_model_config(tiny["gguf"]).hidden_size == load_gguf(tiny["gguf"]).config.hidden_size
    assert read_model_config(tiny["hf"]).vocab_size == 264


def test_while_an_engine_is_made_ready_says_what_is_done(tiny):
    service = EngineService(lambda: None)
    client = TestClient(make_app("tiny", service, open_tokenizer(tiny["hf"])[0]))  # nothing is started
    assert client.get("/ready").json() == {"status": "starting"}
    service.preparing = "compiling 3 of 7 programs, 12 s"
    answer = client.get("/ready")
    assert answer.json() == {"status": "starting", "progress": service.preparing} and answer.status_code == 503
