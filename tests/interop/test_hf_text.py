"""What comes along with exported weights: tokenizer, chat template, license, ids, model card."""

import json

import pytest
import tokenizers
from hf_directories import arrays_of, assert_same_bits, family

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.interop import config_from_hf, load_hf, save_hf
from opendeep_jax.interop.hf_card import Provenance, model_card
from opendeep_jax.interop.hf_text import text_files
from opendeep_jax.models.accounting import count_parameters

TOKENIZER = tokenizers.Tokenizer(tokenizers.models.BPE())
TOKENIZER.add_special_tokens(["<pad>", "<s>", "</s>"])


@pytest.fixture
def tokenizer(tmp_path):
    """A directory with all that can come along, and something that must not."""
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    TOKENIZER.save(str(directory / "tokenizer.json"))
    for name, text in {
        "tokenizer_config.json": '{"chat_template": "{{ messages }}"}',
        "special_tokens_map.json": '{"eos_token": "</s>"}',
        "chat_template.jinja": "{{ messages }}\n",
        "generation_config.json": '{"eos_token_id": [2, 7], "temperature": 0.6}',
        "config.json": '{"bos_token_id": 1, "eos_token_id": 2, "model_type": "anything"}',
        "LICENSE": "Do as you like. \u00e9\n",
        "modeling_evil.py": "import os",
        "pytorch_model.bin": "pickle",
    }.items():
        (directory / name).write_text(text)
    return directory


def test_tokenizer_template_generation_config_and_license_come_along(tokenizer, tmp_path):
    saved = tmp_path / "saved"
    save_hf(load_hf(family("llama3")), saved, tokenizer=tokenizer)
    carried = [
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in saved.iterdir()) == sorted(
        [*carried, "README.md", "config.json", "model.safetensors"]
    )
    for name in carried:
        assert (saved / name).read_bytes() == (tokenizer / name).read_bytes(), name
    raw = json.loads((saved / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (1, [2, 7], None)


def test_a_tokenizer_json_alone_gets_a_config_with_its_special_tokens(tokenizer, tmp_path):
    saved = tmp_path / "saved"
    save_hf(load_hf(family("llama3")), saved, tokenizer=tokenizer / "tokenizer.json")
    settings = json.loads((saved / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"], settings["pad_token"]) == ("<s>", "</s>", "<pad>")
    raw = json.loads((saved / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (1, 2, 0)


def test_without_a_tokenizer_no_special_token_is_claimed(tmp_path):
    save_hf(load_hf(family("llama3")), tmp_path / "saved")
    raw = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} == {None}


@pytest.mark.parametrize("content", [None, "", "[" * 10_000, "[]"])
def test_what_is_no_tokenizer_is_refused_before_anything_is_written(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="tokenizer.json"):
        save_hf(load_hf(family("llama3")), tmp_path / "saved", tokenizer=path)
    assert not (tmp_path / "saved").exists()


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer.json"):
        text_files(tmp_path)


def test_a_saved_directory_is_its_own_tokenizer_for_the_next(tokenizer, tmp_path):
    model = load_hf(family("qwen3_moe"))
    save_hf(model, tmp_path / "first", tokenizer=tokenizer)
    save_hf(load_hf(tmp_path / "first"), tmp_path / "second", tokenizer=tmp_path / "first")
    assert_same_bits(arrays_of(load_hf(tmp_path / "second")), arrays_of(model))
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_the_card_says_what_the_model_is_and_how_it_was_trained(tmp_path):
    config = config_from_hf(family("gpt_oss"))
    training = Provenance(training={"steps": 10, "data | mix": "a\nb"})
    card = model_card(config, "GptOssForCausalLM", count_parameters(config), training)
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"| parameters | {count_parameters(config).total:,} |" in card
    assert "| experts | 5 in each of 4 layers, 2 for a token, 0 shared |" in card
    assert "| sliding window | 6 tokens in 2 layers |" in card
    assert "| steps | 10 |\n| data \\| mix | a b |" in card
    assert "## Training" not in model_card(config, "GptOssForCausalLM", count_parameters(config))


def test_the_card_is_written_with_the_training_that_is_given(tmp_path):
    save_hf(load_hf(family("llama3")), tmp_path / "saved", provenance=Provenance(training={"learning rate": 3e-4}))
    assert "| learning rate | 0.0003 |" in (tmp_path / "saved" / "README.md").read_text()
