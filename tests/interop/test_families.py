"""Every family computes what transformers computes: tests/golden/families, made by make_families.py there."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_directories import (
    FAMILIES,
    arrays_of,
    assert_same_bits,
    changed_copy,
    expected,
    family,
    name_of,
    raw_config,
    tensors_of,
    write_tensors,
)

from opendeep_jax.interop import config_from_hf, load_hf, save_hf

PROMPT = 17


def logits_of(model, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(model.__call__)(jnp.asarray(tokens)))


@functools.cache
def golden_logits(case) -> np.ndarray:
    """Of one compiled call: the rows that have golden logits, and the prompt with its golden continuation."""
    golden = expected(case)
    tokens = np.zeros((3, PROMPT + len(golden["continuation"])), np.int32)
    tokens[:2, : golden["tokens"].shape[1]] = golden["tokens"]
    tokens[2] = np.concatenate([golden["tokens"][0, :PROMPT], golden["continuation"]])
    return logits_of(load_hf(case), tokens)


@pytest.mark.parametrize("case", FAMILIES, ids=name_of)
def test_logits_equal_those_of_transformers(case):
    golden = expected(case)
    rows, length = golden["tokens"].shape
    np.testing.assert_allclose(golden_logits(case)[:rows, :length], golden["logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", FAMILIES, ids=name_of)
def test_the_likeliest_tokens_continue_a_prompt_as_in_transformers(case):
    # Where each token of the continuation is the likeliest after those before it, writing it token by token gives it.
    continuation = expected(case)["continuation"]
    assert len(continuation) == 64
    chosen = golden_logits(case)[2, PROMPT - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(chosen, continuation)


def test_every_mechanism_has_a_case():
    configs = [config_from_hf(case) for case in FAMILIES]
    attentions = [config.attention for config in configs]
    assert {config.norm for config in configs} == {"rms", "rms_zero_centered", "layer_zero_centered"}
    assert {config.norm_placement for config in configs} == {"pre", "post", "both"}
    assert {config.activation for config in configs} == {"silu", "gelu_tanh", "relu2", "clamped_swiglu"}
    assert {config.tie_embeddings for config in configs} == {True, False}
    assert {config.logit_softcap for config in configs} == {0, 3}
    assert {attention.qk_norm for attention in attentions} == {"none", "head", "all_heads"}
    assert {(a.qkv_bias, a.out_bias) for a in attentions} == {(False, False), (True, False), (True, True)}
    assert {a.rope.yarn_truncate for a in attentions if a.rope.yarn_factor > 1} == {True, False}
    assert any(a.rope.llama3_factor > 1 for a in attentions) and any(a.rope.linear_factor > 1 for a in attentions)
    assert any(a.sliding_rope_theta and a.sliding_layers for a in attentions)
    assert any(a.sliding_layers and not a.sliding_rope_theta for a in attentions)
    assert any(0 < a.rotary_dim < a.head_dim for a in attentions)
    assert any(config.norm_epsilon > 100 * config.attention.latent_norm_epsilon for config in configs)
    windows = [a.window for a in attentions if a.sliding_layers]
    assert max(windows) < min(expected(case)["tokens"].shape[1] for case in FAMILIES)


def seeing(case, directory, prefix: str, head: str):
    """The case as the text part of a model that sees images, under the names of such files."""
    inner = raw_config(case)
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": inner}
    outer |= {"torch_dtype": inner.pop("torch_dtype"), "vision_config": {"hidden_size": 8}, "mm_tokens_per_image": 256}
    changed_copy(case, directory)
    (directory / "config.json").write_text(json.dumps(outer))
    tensors = {prefix + name.removeprefix("model."): array for name, array in tensors_of(case).items()}
    tensors |= {
        "vision_tower.vision_model.post_layernorm.weight": np.zeros(8, np.float32),
        "multi_modal_projector.mm_soft_emb_norm.weight": np.zeros(8, np.float32),
        head: tensors_of(case)["model.embed_tokens.weight"],
    }
    write_tensors(directory, tensors)
    return directory


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
    ],
)
def test_the_text_part_of_a_gemma_that_sees_images_is_read(prefix, head, tmp_path):
    directory = seeing(family("gemma3"), tmp_path / "model", prefix, head)
    assert config_from_hf(directory) == config_from_hf(family("gemma3"))
    assert_same_bits(arrays_of(load_hf(directory)), arrays_of(load_hf(family("gemma3"))))


@pytest.mark.parametrize("case", ["llama_tied", "qwen3"])
def test_the_head_of_a_tied_model_may_be_in_the_files_or_not(case, tmp_path):
    embedding = tensors_of(family(case))["model.embed_tokens.weight"]
    model = load_hf(changed_copy(family(case), tmp_path / "model", **{"lm_head.weight": embedding}))
    assert_same_bits(arrays_of(model), arrays_of(load_hf(family(case))))


def test_a_head_with_its_own_values_is_used_whatever_tie_word_embeddings_says(tmp_path):
    # As transformers does, with a warning.
    case = family("llama_tied")
    head = {"lm_head.weight": tensors_of(case)["model.embed_tokens.weight"][::-1]}
    said_to_be_tied = load_hf(changed_copy(case, tmp_path / "tied", **head))
    untied = load_hf(changed_copy(case, tmp_path / "untied", {"tie_word_embeddings": False}, **head))
    assert not said_to_be_tied.config.tie_embeddings
    assert_same_bits(arrays_of(said_to_be_tied), arrays_of(untied))


@pytest.mark.parametrize("case", ["gpt_oss_mxfp4", "qwen3_moe", "gemma3", "moonlight"])
def test_a_saved_model_gives_the_same_logits_when_it_is_read_again(case, tmp_path):
    tokens = expected(family(case))["tokens"]
    model = load_hf(family(case))
    save_hf(model, tmp_path / "saved")
    np.testing.assert_array_equal(logits_of(load_hf(tmp_path / "saved"), tokens), logits_of(model, tokens))
