"""Text codecs: from directories, from our tokenizers, from GGUF fields; and what hostile ones are told."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.text.files import (
    byte_tokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_from_hf,
    train_bpe,
)
from opendeep_jax.text.gguf_names import PROBE, SPLITS
from opendeep_jax.text.gguf_tokenizer import gguf_fields_of, tokenizer_from_gguf_fields
from opendeep_jax.text.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello world, it's 12345 o'clock!",
    "  indented\n\n\tcode = f(x)[1:] \r\n",
    PROBE,
    "naïve 🙂 我想 <|end|> नमस्ते",
]
TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}{{ eos_token }}"


def byte_level(splitter=None, special=("<|start|>", "<|end|>"), normalizer=None) -> tokenizers.Tokenizer:
    """A small byte-level BPE trained on TEXTS."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    if normalizer:
        library.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    library.train_from_iterator(TEXTS * 3, trainer)
    return library


def sentencepiece() -> tokenizers.Tokenizer:
    """A small SentencePiece-like BPE with bytes to fall back on."""
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    library.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 3, "Hello world"] * 3, trainer)
    description = json.loads(library.to_str())
    description["added_tokens"] = description["added_tokens"][:3]
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def write_directory(path, library, **files):
    path.mkdir(exist_ok=True)
    library.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        name = name.replace("__", ".")
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    library = byte_level()
    end = library.token_to_id("<|end|>")
    return Tokenizer(library, 0, False, (end,), TEMPLATE, {"eos_token": "<|end|>"})


def test_text_comes_back_from_its_ids(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text == tokenizer.library.decode(ids)


def test_special_tokens_are_read_from_text_only_where_that_is_asked(tokenizer):
    start, end = tokenizer.library.token_to_id("<|start|>"), tokenizer.library.token_to_id("<|end|>")
    assert tokenizer.encode("<|start|>x<|end|>", special=True) == [start, *tokenizer.encode("x"), end]
    plain = tokenizer.encode("<|start|>")
    assert start not in plain and tokenizer.decode(plain) == "<|start|>"
    assert tokenizer.decode([start, *tokenizer.encode("x"), end]) == "x"
    assert tokenizer.decode([start, *tokenizer.encode("x"), end], special=True) == "<|start|>x<|end|>"


def test_ids_outside_of_the_vocabulary_are_no_text(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size, -1, 10**12, *tokenizer.encode("a")]) == "a"


def test_a_chat_is_written_by_the_template_and_encoded_with_its_special_tokens(tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat(messages) == "<|start|>user: Hi<|end|><|end|>"
    assert tokenizer.encode_chat(messages).count(tokenizer.end_ids[0]) == 2


def test_half_a_surrogate_pair_is_refused_in_a_sentence(tokenizer):
    with pytest.raises(ConfigError, match="surrogate"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ConfigError, match="surrogate"):
        tokenizer.apply_chat([{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}])


def test_chat_without_a_template_names_the_cure():
    with pytest.raises(ConfigError, match="chat_template.jinja"):
        Tokenizer(byte_level()).apply_chat([{"role": "user", "content": "Hi"}])


def test_a_directory_says_what_begins_and_ends_a_text(tmp_path):
    directory = write_directory(
        tmp_path,
        byte_level(),
        tokenizer_config__json={
            "bos_token": {"content": "<|start|>", "special": True},
            "eos_token": "<|end|>",
            "add_bos_token": True,
            "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}],
        },
        generation_config__json={"eos_token_id": [1, 7]},
    )
    tokenizer = tokenizer_from_hf(directory)
    assert (tokenizer.begin_id, tokenizer.add_begin, tokenizer.end_ids) == (0, True, (1, 7))
    assert tokenizer.encode_prompt("a") == [0, *tokenizer.encode("a")]
    assert tokenizer.with_prefix([5]) == tokenizer.with_prefix([0, 5]) == [0, 5]  # never added twice
    assert tokenizer.apply_chat([]) == "y" and tokenizer.special == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    (directory / "chat_template.jinja").write_text("z")
    assert tokenizer_from_hf(directory).apply_chat([]) == "z"


def test_a_post_processor_that_adds_a_beginning_is_understood(tmp_path):
    library = byte_level()
    library.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 0)])
    write_directory(tmp_path, library, tokenizer_config__json={"bos_token": "<|start|>", "eos_token": "<|end|>"})
    tokenizer = tokenizer_from_hf(tmp_path)
    assert tokenizer.add_begin and 0 not in tokenizer.encode("a")


@pytest.mark.parametrize(
    "files, complaint",
    [
        ({"tokenizer__json": '{"model": '}, "not a whole tokenizer.json"),
        ({"tokenizer_config__json": "[[["}, "cannot be read as JSON"),
        ({"generation_config__json": "[" * 100_000}, "cannot be read as JSON"),
    ],
)
def test_a_damaged_directory_is_refused(tmp_path, files, complaint):
    write_directory(tmp_path, byte_level(), **files)
    with pytest.raises(ConfigError, match=complaint):
        tokenizer_from_hf(tmp_path)


def test_a_directory_without_tokenizer_json_is_told_how_to_get_one(tmp_path):
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ConfigError, match="convert that to a tokenizer.json"):
        tokenizer_from_hf(tmp_path)


def test_an_unknown_decoder_and_an_absurd_id_are_refused():
    library = tokenizers.Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    library.decoder = decoders.CTC()
    with pytest.raises(ConfigError, match="decoder.*CTC"):
        Tokenizer(library).decode([0])
    library = tokenizers.Tokenizer(models.BPE({"a": 4_000_000_000}, []))
    library.decoder = decoders.ByteLevel()
    with pytest.raises(ConfigError, match="no vocabulary is that large"):
        Tokenizer(library).vocab_size  # noqa: B018


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_our_own_tokenizers_give_the_ids_they_gave_in_training(kind, tmp_path):
    tokenizer = byte_tokenizer()
    if kind == "bpe":
        (tmp_path / "tokenizer.json").write_text(train_bpe(TEXTS, 300), "utf-8")
        tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.encode(text) == ids.tolist()
        assert tokenizer.decode(tokenizer.encode(text)) == text == tokenizer.decode(ids)
    assert tokenizer.with_prefix([]) == [tokenizer.bos_id] and tokenizer.end_ids == (tokenizer.eos_id,)


def test_a_saved_tokenizer_is_read_again_and_trains(tmp_path, tokenizer):
    save_tokenizer(tokenizer, tmp_path)
    again = tokenizer_from_hf(tmp_path)
    assert (again.begin_id, again.end_ids, again.chat_template) == (0, tokenizer.end_ids, TEMPLATE)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == tokenizer.end_ids[0]


@pytest.mark.parametrize("name", SPLITS)
def test_every_way_to_split_goes_to_a_gguf_and_back(name):
    splits = [pre_tokenizers.Split(tokenizers.Regex(cut), "isolated") for cut in SPLITS[name]]
    splitter = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    normalizer = normalizers.NFC() if name == "qwen2" else None
    tokenizer = Tokenizer(
        byte_level(splitter, normalizer=normalizer), 0, True, (1,), TEMPLATE, {"eos_token": "<|end|>"}
    )
    fields = gguf_fields_of(tokenizer, tokenizer.vocab_size + 3)
    assert fields["tokenizer.ggml.pre"] == name
    assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{tokenizer.vocab_size + 2}]"
    assert fields["tokenizer.ggml.token_type"][:3] == [3, 3, 1] and fields["tokenizer.ggml.token_type"][-1] == 5
    again = tokenizer_from_gguf_fields(fields)
    assert (again.begin_id, again.add_begin, again.end_ids, again.chat_template) == (0, True, (1,), TEMPLATE)
    for text in TEXTS:
        if name != "llama-bpe":  # which takes whole words that its vocabulary has before it merges
            assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == text


def test_gpt2s_and_smollms_own_splitters_are_recognized():
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for splitter, name in ((pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"), (digits, "smollm")):
        fields = gguf_fields_of(Tokenizer(byte_level(splitter)), 1000)
        assert fields["tokenizer.ggml.pre"] == name


def test_a_sentencepiece_goes_to_a_gguf_and_back(tmp_path):
    tokenizer = Tokenizer(sentencepiece(), 1, True, (2,), None, {"unk_token": "<unk>"})
    texts = ["the quick fox", "Hello  world", "über 🙂", " leading"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    fields = gguf_fields_of(tokenizer, tokenizer.vocab_size)
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 6]
    again = tokenizer_from_gguf_fields(fields)
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    assert [again.decode(again.encode(text)) for text in texts] == texts


def test_a_way_to_split_that_llama_cpp_has_not_is_refused_with_the_closest_one(tmp_path):
    (tmp_path / "tokenizer.json").write_text(train_bpe(TEXTS, 300), "utf-8")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="--pre=") as refusal:
        gguf_fields_of(tokenizer, 300)
    closest = str(refusal.value).rpartition("--pre=")[2].rstrip(".")
    assert closest in SPLITS
    assert gguf_fields_of(tokenizer, 300, closest)["tokenizer.ggml.pre"] == closest
    assert gguf_fields_of(byte_tokenizer(), 262)["tokenizer.ggml.pre"] == "gpt-2"


WHOLE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.token_type": [1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
}


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.model": "bert"},
        {"tokenizer.ggml.model": None},
        {"tokenizer.ggml.tokens": []},
        {"tokenizer.ggml.tokens": 7},
        {"tokenizer.ggml.token_type": [1]},
        {"tokenizer.ggml.pre": "klingon"},
        {"tokenizer.ggml.merges": ["x y"]},
        {"tokenizer.ggml.merges": [1, 2]},
        {"opendeep.tokenizer": "[]"},
        {"opendeep.tokenizer": "{"},
        {"opendeep.tokenizer": 7},
        {"opendeep.tokenizer": '{"end_ids": ["x"]}'},
        {"opendeep.tokenizer": '{"special": {"bos_token": 3}}'},
        {"opendeep.tokenizer": '{"decoder": {"type": "None"}}'},
        {"tokenizer.ggml.model": "llama"},
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": [0.0, 0.0, 0.0],
            "tokenizer.ggml.unknown_token_id": 9,
        },
    ],
)
def test_hostile_fields_are_refused(changes):
    assert tokenizer_from_gguf_fields(WHOLE).encode("ab") == [2]
    with pytest.raises(ConfigError):
        tokenizer_from_gguf_fields(WHOLE | changes)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="no larger than"):
        gguf_fields_of(tokenizer, tokenizer.vocab_size - 1)
