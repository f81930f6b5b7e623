"""What begins and ends a text, and what surrounds the weights, stays the same on the ways between files."""

import json

import pytest
from test_spelling import byte_level, gemma
from tokenizers import AddedToken

from opendeep_jax.text.files import save_tokenizer, tokenizer_from_hf
from opendeep_jax.text.gguf_names import ENDS, SAME, SPLITS
from opendeep_jax.text.gguf_tokenizer import gguf_fields_of, tokenizer_from_gguf_fields
from opendeep_jax.text.stream import TextStream
from opendeep_jax.text.tokenizer import Tokenizer

KEY = "tokenizer.ggml."


def directory(path, **files):
    path.mkdir(exist_ok=True)
    byte_level().save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "files, ends",
    [
        ({}, ()),
        ({"tokenizer_config": {"eos_token": "</s>"}}, ("</s>",)),
        ({"config": {"eos_token_id": 3}}, (3,)),
        ({"config": {"eos_token_id": [3, 5]}, "tokenizer_config": {"eos_token": {"content": "</s>"}}}, ("</s>", 3, 5)),
        ({"generation_config": {"eos_token_id": 7}, "config": {"eos_token_id": [7, 9]}}, (7, 9)),
        ({"generation_config": {"eos_token_id": [7, 8]}, "config": {"text_config": {"eos_token_id": 4}}}, (7, 8, 4)),
        ({"special_tokens_map": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": None}}, ("</s>",)),
        ({"generation_config": {"eos_token_id": [True, -1, "x", 2]}}, (2,)),
    ],
)
def test_what_ends_a_text_is_the_union_of_the_models_files_and_stays_so(files, ends, tmp_path):
    tokenizer = tokenizer_from_hf(directory(tmp_path / "model", **files))
    wanted = tuple(tokenizer.library.token_to_id(end) if isinstance(end, str) else end for end in ends)
    assert tokenizer.end_ids == wanted
    run = tokenizer_from_hf(save_tokenizer(tokenizer, tmp_path / "run").parent)
    back = tokenizer_from_gguf_fields(gguf_fields_of(run, run.vocab_size, "gpt-2"))
    again = tokenizer_from_hf(save_tokenizer(back, tmp_path / "again").parent)
    assert [set(copy.end_ids) for copy in (run, back, again)] == [set(wanted)] * 3


def gguf(tokens, **fields):
    names = ["a", "b", "c", *tokens]
    types = [1] * 3 + [3] * len(tokens)
    made = {"model": "gpt2", "pre": "gpt-2", "tokens": names, "token_type": types, "merges": []}
    return tokenizer_from_gguf_fields({KEY + key: value for key, value in (made | fields).items()})


@pytest.mark.parametrize("name", ENDS)
def test_a_gguf_ends_texts_at_the_names_that_llama_cpp_knows(name):
    assert gguf(["<|start|>", name]).end_ids == (4,)


@pytest.mark.parametrize(
    "tokens, fields, ends",
    [
        (["<|end|>", "<|return|>", "<|call|>"], {}, {4, 5}),
        (["<|end|>", "<|return|>"], {}, {3, 4}),
        (["<|end|>", "<|flush|>", "<|calls|>"], {}, {4, 5}),
        (["</s>", "<|tool_response>"], {}, {4}),
        (["<a>", "<b>", "<c>", "<|im_end|>"], {"eos_token_id": 3, "eot_token_id": 4, "eom_token_id": 5}, {3, 4, 5, 6}),
        (["<a>"], {"eos_token_id": 99}, set()),
    ],
)
def test_a_gguf_ends_texts_as_llama_cpp_does(tokens, fields, ends):
    assert set(gguf(tokens, **fields).end_ids) == ends


@pytest.mark.parametrize(
    "fields, begun",
    [
        ({"pre": "gpt-2"}, False),
        ({"pre": "llama-bpe"}, True),
        ({"pre": "tekken"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "qwen2", "add_bos_token": True}, True),
        ({"pre": "smaug-bpe"}, False),
    ],
)
def test_a_gguf_begins_texts_as_llama_cpp_does(fields, begun):
    tokenizer = gguf(["<s>"], bos_token_id=3, **fields)
    assert tokenizer.encode_prompt("") == ([3] if begun else [])


@pytest.mark.parametrize("name", [*SPLITS, *SAME])
def test_every_name_of_a_way_to_split_is_read(name):
    assert gguf(["<s>"], pre=name).library.pre_tokenizer.pre_tokenize_str("I'll go 1234 我想 x")


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("kimi-k2", "我想buy 12345 АБв's x/\n", ["我想", "buy", "Ġ", "123", "45", "ĠАБв's", "Ġx", "/Ċ"]),
        ("kimi-k2", "HTMLPage！", ["HTMLPage", "！"]),
        ("tekken", "camelCase's 12", ["camel", "Case", "'s", "Ġ", "1", "2"]),
        ("default", "a1234, b", ["a", "123", "4", ",", "Ġb"]),
        ("deepseek-coder", "x12 y", ["x", "1", "2", "Ġy"]),
    ],
)
def test_words_are_those_of_the_tokenizer_that_a_way_is_named_for(name, text, words):
    found = [word for word, _ in gguf(["<s>"], pre=name).library.pre_tokenizer.pre_tokenize_str(text)]
    shown = [word.replace("Ġ", " ").replace("Ċ", "\n") for word in words]
    level = byte_level().pre_tokenizer
    encoded = ["".join(word for word, _ in level.pre_tokenize_str(word)) for word in shown]
    assert found == encoded


def test_a_file_without_a_way_to_split_has_llama_cpps_default():
    without = gguf(["<s>"], pre=None).library.pre_tokenizer
    assert without.pre_tokenize_str("a1234, b") == gguf(["<s>"], pre="default").library.pre_tokenizer.pre_tokenize_str(
        "a1234, b"
    )


def test_runs_of_spaces_are_written_to_a_gguf_as_llama_cpp_prints_them():
    tokenizer = Tokenizer(gemma())
    fields = gguf_fields_of(tokenizer, tokenizer.vocab_size)
    run = tokenizer.library.token_to_id("▁▁▁▁")
    assert (fields[KEY + "tokens"][run], fields[KEY + "token_type"][run]) == ("    ", 4)
    theirs = {key: value for key, value in fields.items() if not key.startswith("opendeep.")}
    back = tokenizer_from_gguf_fields(theirs)
    text = "the    the  \n        x"
    assert back.encode(text) == tokenizer.encode(text) and back.decode(back.encode(text)) == text


def test_pad_sampling_and_flags_of_tokens_survive_every_way(tmp_path):
    sampling = {"eos_token_id": [3, 9], "temperature": 0.6, "top_k": 20, "do_sample": True}
    library = byte_level()
    library.add_special_tokens([AddedToken("<pad>", lstrip=True, normalized=True), AddedToken("<m>", rstrip=True)])
    (tmp_path / "model").mkdir()
    library.save(str(tmp_path / "model" / "tokenizer.json"))
    settings = {"pad_token": "<pad>", "mask_token": "<m>", "eos_token": "</s>", "chat_template": "{{ pad_token }}"}
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "model/generation_config.json").write_text(json.dumps(sampling))
    tokenizer = tokenizer_from_hf(tmp_path / "model")
    for way in range(2):
        tokenizer = tokenizer_from_hf(save_tokenizer(tokenizer, tmp_path / f"run{way}").parent)
        tokenizer = tokenizer_from_gguf_fields(gguf_fields_of(tokenizer, tokenizer.vocab_size, "gpt-2"))
        assert tokenizer.special == {"pad_token": "<pad>", "mask_token": "<m>", "eos_token": "</s>"}
        assert tokenizer.generation == sampling and tokenizer.chat_template == "{{ pad_token }}"
        text = "the  <pad> the<m>  the"
        assert tokenizer.encode(text, special=True) == library.encode(text).ids


def test_the_name_of_a_special_token_is_a_stop_string():
    tokenizer = Tokenizer(byte_level())
    end, think = (tokenizer.library.token_to_id(name) for name in ("</s>", "<think>"))
    assert tokenizer.stop_ids(["</s>", "<think>", "the", ""]) == {end: "</s>"}
    for special in (False, True):
        stream = TextStream(tokenizer, ["x</s>y", "</s>"], special=special)
        ids = [*tokenizer.encode("the"), think, end, *tokenizer.encode("the")]
        assert "".join(stream.push([i]) for i in ids) + stream.finish() == "the<think>"
        assert stream.matched == "</s>"
    stream = TextStream(tokenizer, ["</s>", "##"])
    assert stream.push([*tokenizer.encode("a#"), end]) == "a#" and stream.stopped


def test_half_a_character_before_a_special_stop_is_given_out():
    tokenizer = Tokenizer(byte_level())
    stream = TextStream(tokenizer, ["</s>"])
    half = next(i for i, piece in enumerate(tokenizer.pieces) if piece == b"\xc3")
    assert stream.push([half, tokenizer.library.token_to_id("</s>")]) == "\ufffd"
