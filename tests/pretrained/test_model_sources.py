"""What a model can be opened from, and what is refused before anything is loaded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import V3, random_model

from opendeep_jax.cli import chat, serve
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.requests import EngineConfig
from opendeep_jax.pretrained.engines import Choice, open_engine, read_model_config
from opendeep_jax.pretrained.sources import open_model, source_kind
from opendeep_jax.text.files import byte_tokenizer


def test_a_run_is_opened_in_the_wanted_precision(small_run):
    model, tokenizer, name = open_model(small_run, "bfloat16")
    assert name == "small" and tokenizer.decode(tokenizer.encode("größe")) == "größe"
    assert tokenizer.begin_id == byte_tokenizer().bos_id
    assert {array.dtype for array in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("bfloat16")}
    whole, _, _ = open_model(small_run, step=16)
    logits = whole(jnp.arange(1, 9)[None])
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all()


def test_an_engine_of_a_run_takes_its_context_for_its_window(small_run):
    model, tokenizer, _ = open_model(small_run, "bfloat16")
    assert model.config.context_length == read_model_config(small_run).context_length == 64
    engine = open_engine(Choice(small_run), tokenizer, EngineConfig(slots=1, page_size=8))
    assert engine.max_length == 64
    with pytest.raises(ConfigError, match="positions go up to 64.*model.context_length"):
        open_engine(Choice(small_run), tokenizer, EngineConfig(slots=1, max_length=128))


def test_a_step_that_is_not_there_is_refused(small_run):
    with pytest.raises(ConfigError, match="no checkpoint of step 7"):
        open_model(small_run, step=7)


def test_a_hugging_face_directory_is_opened(tmp_path):
    from opendeep_jax.interop import save_hf

    save_hf(random_model(V3), tmp_path / "tiny")
    byte_tokenizer().library.save(str(tmp_path / "tiny/tokenizer.json"))
    assert source_kind(tmp_path / "tiny") == "hf"
    model, tokenizer, name = open_model(tmp_path / "tiny")
    assert name == "tiny" and tokenizer.decode(tokenizer.encode("hi")) == "hi"
    assert model(jnp.arange(1, 5)[None]).shape == (1, 4, V3.vocab_size)
    with pytest.raises(ConfigError, match="only a run has steps"):
        open_model(tmp_path / "tiny", step=3)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path / "nowhere", "is not there"),
        (lambda path: path, "holds no model"),
        (lambda path: written(path / "a.bin"), "a file of another kind"),
        (lambda path: written(path / "b.gguf").parent, "Name one of them"),
        (lambda path: "", "--model is missing"),
        (lambda path: written(path / "config.json", "[1]").parent, "config.json"),
    ],
)
def test_what_is_no_model_is_refused_with_the_cure(tmp_path, make, words):
    with pytest.raises(ConfigError, match=words):
        source_kind(make(tmp_path))


def written(path, text="{}"):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "command, arguments, words",
    [
        (serve, ["--slots=0"], "--slots=0: must be at least 1"),
        (serve, ["--port=70000"], "at most 65535"),
        (serve, ["--drain_seconds=nan"], "drain_seconds=nan"),
        (serve, ["--dtype=int8"], "must be float32 or bfloat16"),
        (serve, ["--workdir=x"], "Leave one out"),
        (serve, ["--host=256.1.1.1", "--port=0"], "cannot listen there"),
        (chat, ["--workdir=x"], "Leave one out"),
        (chat, ["--max_tokens=-1"], "at least 0"),
        (chat, ["--sistem=x"], "did you mean|Did you mean|no such setting"),
        (chat, [], "no terminal to talk in|standard input is empty"),
        (chat, ["--prompt=hi", "--temperature=-1"], "temperature"),
        (chat, ["--prompt=hi", "--dtype=int8"], "must be float32 or bfloat16"),
    ],
)
def test_settings_that_cannot_be_are_refused(small_run, command, arguments, words):
    with pytest.raises(ConfigError, match=words):
        command.main([f"--model={small_run}", *arguments])


def test_a_model_without_a_chat_template_cannot_chat(small_run):
    pytest.importorskip("opendeep_jax.generation.engine")
    with pytest.raises(ConfigError, match="no chat template"):
        chat.main([f"--workdir={small_run}", "--prompt=hi"])
