"""Perplexity is what the model's own logits say, whatever the windows."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.evaluation.perplexity import perplexity, read_documents
from opendeep_jax.evaluation.windows import windows

TEXT = "Größe: the quick brown fox jumps over the lazy dog, and over it again. " * 3


def nats_of(model, tokens: list[int], first: int) -> float:
    """What the whole model says of tokens from `first` on."""
    logprobs = np.asarray(jax.nn.log_softmax(model(jnp.asarray([tokens])), -1))[0]
    return -sum(float(logprobs[place - 1, tokens[place]]) for place in range(first, len(tokens)))


def test_it_is_the_models_own_over_all_windows(tiny, engine):
    model, tokenizer = tiny
    found = perplexity(engine, tokenizer, [TEXT], stride=20)
    tokens = tokenizer.encode_prompt(TEXT)
    assert tokens[0] == tokenizer.begin_id  # so that the first byte is foretold too
    nats = sum(nats_of(model, *window) for window in windows(tokens, 64, 20))
    assert found["nats"] == pytest.approx(nats, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=1e-4)
    size = len(TEXT.encode())
    assert (found["tokens"], found["bytes"], found["window"], found["stride"]) == (size, size, 64, 20)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert found["perplexity_interval"][0] < found["perplexity"] < found["perplexity_interval"][1]
    assert found["drawn"] == "windows"


def test_many_documents_are_drawn_as_wholes_and_none_sees_another(tiny, engine):
    documents = [f"Document {n} of some." for n in range(12)] + [""]
    found = perplexity(engine, tiny[1], documents)
    apart = [perplexity(engine, tiny[1], [document])["nats"] for document in documents[:12]]
    assert found["nats"] == pytest.approx(sum(apart), rel=1e-5)
    assert (found["drawn"], found["documents"], found["windows"]) == ("documents", 13, 12)
    low, high = found["bits_per_byte_interval"]
    assert low < found["bits_per_byte"] < high


def test_one_window_has_no_interval(tiny, engine):
    assert perplexity(engine, tiny[1], ["short"])["perplexity_interval"] is None


@pytest.mark.parametrize("stride", [-1, 64])
def test_a_stride_that_leaves_tokens_out_is_refused(tiny, engine, stride):
    with pytest.raises(ConfigError, match="stride"):
        perplexity(engine, tiny[1], [TEXT], stride=stride)


def test_nothing_to_foretell_is_refused(tiny, engine):
    with pytest.raises(ConfigError, match="Give a longer one"):
        perplexity(engine, tiny[1], [""])


def test_documents_are_read_from_text_and_from_records(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two"))
    (tmp_path / "b.jsonl").write_text(lines, "utf-8")
    assert read_documents(tmp_path / "a.txt") == [TEXT]
    assert read_documents(tmp_path / "b.jsonl") == ["one", "two"]


@pytest.mark.parametrize(
    "name, content", [("nowhere.txt", None), ("a.bin", b"x"), ("bad.txt", b"\xff\xfe"), ("empty.txt", b"")]
)
def test_a_file_without_text_is_refused(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        read_documents(tmp_path / name)
