import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from opendeep_jax.text import pieces as pieces_module
from opendeep_jax.text.files import load_tokenizer, train_bpe
from opendeep_jax.text.pieces import in_pieces, pieces, splits_words_at_cuts

TEXTS = [
    "def main(argv):\n    return [x for x in argv]\n\n",
    "The naïve émigré read 2024 数据 books.\nIt's so. " * 3,
] * 5
# Pre-tokenizers of the field, as their tokenizer.json files have them.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


BYTE_LEVEL = {
    "ours": None,
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama3": split(CL100K),
    "qwen": split(CL100K.replace("{1,3}", "")),
    "deepseek": split(*DEEPSEEK),
    "starcoder": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


def byte_level(name: str) -> tokenizers.Tokenizer:
    if name == "ours":
        return tokenizers.Tokenizer.from_str(train_bpe(TEXTS, 320))
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = BYTE_LEVEL[name]
    library.normalizer = normalizers.NFC() if name == "qwen" else None
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=sorted(alphabet), show_progress=False)
    )
    return library


@pytest.fixture(scope="module")
def libraries():
    return {name: byte_level(name) for name in BYTE_LEVEL}


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_tokenizers_can_be_cut(libraries, name):
    assert splits_words_at_cuts(libraries[name])


@pytest.mark.parametrize("kind", ["metaspace", "prefix space", "no words", "lines joined", "stripped", "prepended"])
def test_others_cannot(kind):
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = {
        "metaspace": pre_tokenizers.Metaspace(),
        "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "lines joined": split(r"[^.]+"),
        "no words": None,
    }.get(kind, pre_tokenizers.ByteLevel(add_prefix_space=False))
    if kind in ("stripped", "prepended"):
        library.normalizer = normalizers.Strip() if kind == "stripped" else normalizers.Prepend("▁")
    assert not splits_words_at_cuts(library)


fragments = st.sampled_from(
    [
        *TEXTS,
        "\n",
        "\r\n",
        " ",
        "  ",
        "\t",
        "a",
        "é",
        "Ж",
        "数",
        "ก",
        "7",
        "１",
        "²",
        "'s",
        "don't",
        "):",
        "_",
        "…",
        "\u00a0",
    ]
    + ["\u0301", "e\u0301", "\x1c", "\u2028", "가", "\u1100", "\u1161", "😀", "x = 1\n", "word word", "Ⅷ", "\x85"]
)


@pytest.mark.parametrize("name", BYTE_LEVEL)
@settings(deadline=None, max_examples=100)
@given(parts=st.lists(fragments, max_size=40))
def test_ids_of_pieces_are_those_of_the_whole(libraries, name, parts):
    text, library = "".join(parts), libraries[name]
    places = [0, *(found.start() for found in pieces_module.CUT.finditer(text)), len(text)]
    cut = [library.encode(text[a:b]).ids for a, b in zip(places, places[1:], strict=False)]
    assert sum(cut, []) == library.encode(text).ids


@settings(deadline=None)
@given(parts=st.lists(fragments, max_size=60), size=st.integers(1, 20))
def test_pieces_make_the_text_and_are_neither_short_nor_long(parts, size):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "PIECE", size)
        found = list(pieces(text))
    assert "".join(found) == text
    assert all(size <= len(piece) <= 2 * size for piece in found[:-1]) and len(found[-1]) <= 2 * size
    end = 0
    for piece in found[:-1]:
        end += len(piece)
        assert len(piece) == 2 * size or pieces_module.CUT.match(text, end)


def test_long_texts_are_handed_over_in_pieces_and_come_back_whole(monkeypatch):
    monkeypatch.setattr(pieces_module, "PIECE", 10)
    handed = []

    def encode_batch(texts):
        handed.extend(texts)
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    texts = ["short", "word " * 30, "", "x" * 95, "short again"]
    encoded = in_pieces(encode_batch)(texts)
    assert [bytes(ids.tolist()).decode() for ids in encoded] == texts
    assert max(map(len, handed)) <= 20 and "x" * 20 in handed


def test_our_tokenizer_is_cut_and_a_sentencepiece_one_is_not(tmp_path, monkeypatch):
    text = "Some words in a line.\nAnd others 123 " * 20
    ours = tmp_path / "ours.json"
    ours.write_text(train_bpe(TEXTS, 320), "utf-8")
    library = tokenizers.Tokenizer(models.WordLevel({"▁words": 0, "<unk>": 1, "<s>": 2, "</s>": 3}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.add_special_tokens(["<s>", "</s>"])
    library.save(str(tmp_path / "other.json"))
    whole = {
        name: load_tokenizer(tmp_path / name).encode_batch([text])[0].tolist() for name in ("ours.json", "other.json")
    }
    monkeypatch.setattr(pieces_module, "PIECE", 16)
    monkeypatch.setattr(pieces_module, "pieces", lambda text, real=pieces: used.append(text) or real(text))
    used: list[str] = []
    for name, ids in whole.items():
        assert load_tokenizer(tmp_path / name).encode_batch([text])[0].tolist() == ids, name
    assert (
        used.count(text) == 1
        and json.loads((tmp_path / "other.json").read_text("utf-8"))["model"]["type"] == "WordLevel"
    )
