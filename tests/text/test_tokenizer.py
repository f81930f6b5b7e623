import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.rules import BYTE_VOCABULARY
from opendeep_jax.data.tokenizers import open_tokenizer
from opendeep_jax.text import tokenizer as tokenizer_module
from opendeep_jax.text.files import byte_tokenizer, load_tokenizer, train_bpe
from opendeep_jax.text.pieces import cache_words
from opendeep_jax.text.tokenizer import SPECIAL_TOKENS

TEXTS = ["def main(argv):\n    return [x for x in argv]\n\n", "The naïve émigré read 2024 数据 books. " * 3] * 5


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(train_bpe(TEXTS, 320), encoding="utf-8")
    return load_tokenizer(path)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return byte_tokenizer() if request.param == "bytes" else bpe


any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([*SPECIAL_TOKENS, *TEXTS, " ", "\n", "\t\t", "é", "😀"])
).map("".join)


@given(text=any_text)
def test_decoding_gives_back_the_text_and_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode("utf-8"))
    assert not np.isin(ids, list(tokenizer.special_tokens.values())).any()


def test_each_token_stands_for_the_bytes_it_decodes_to(tokenizer):
    for i in range(tokenizer.vocab_size):
        if i in tokenizer.special_tokens.values():
            assert tokenizer.token_bytes[i] == 0 and tokenizer.decode([i]) == ""
        elif "\ufffd" not in (text := tokenizer.decode([i])):
            assert tokenizer.token_bytes[i] == len(text.encode("utf-8"))
        else:
            assert tokenizer.token_bytes[i] >= 1


def test_the_configurations_rules_know_the_smallest_vocabulary():
    assert byte_tokenizer().vocab_size == BYTE_VOCABULARY


def test_ids_are_int32_below_the_vocabulary_in_batches_as_alone(tokenizer):
    batch = tokenizer.encode_batch(TEXTS)
    for text, ids in zip(TEXTS, batch, strict=True):
        assert ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode("") == [] and tokenizer.encode_batch([""])[0].shape == (0,)


@given(
    st.lists(
        st.text(st.characters(max_codepoint=127)) | st.sampled_from([*TEXTS, "  x", " \n", "é", "1234"]), max_size=5
    )
)
def test_remembered_words_give_the_ids_that_the_library_gives(bpe, parts):
    library = tokenizers.Tokenizer.from_file(bpe.path)
    plain = [library.encode(text).ids for text in ("".join(parts), *parts)]
    encode_batch = cache_words(lambda texts: [np.array(library.encode(text).ids, np.int32) for text in texts])
    assert [ids.tolist() for ids in encode_batch(["".join(parts), *parts])] == plain
    assert [ids.tolist() for ids in bpe.encode_batch(["".join(parts), *parts])] == plain


def test_bpe_is_the_same_each_time_and_shorter_than_bytes(bpe):
    assert train_bpe(TEXTS, 320) == train_bpe(TEXTS, 320)
    assert bpe.vocab_size == 320 and (bpe.bos_id, bpe.eos_id) == (1, 2)
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 1.5


def test_bpe_that_cannot_hold_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="bpe:100.*at least 262"):
        train_bpe(TEXTS, 100)


def test_bpe_is_trained_once_for_each_corpus_and_size(tmp_path):
    opened = open_tokenizer("bpe:300", "corpus", lambda: TEXTS, tmp_path)
    again = open_tokenizer("bpe:300", "corpus", lambda: pytest.fail("trained again"), tmp_path)
    assert again.content_hash == opened.content_hash and again.name == "bpe:300"
    assert open_tokenizer("bpe:301", "corpus", lambda: TEXTS, tmp_path).vocab_size == 301
    open_tokenizer("bpe:300", "other corpus", lambda: TEXTS, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_damaged_kept_bpe_is_trained_again_with_a_message(tmp_path, caplog):
    opened = open_tokenizer("bpe:300", "corpus", lambda: TEXTS, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text("utf-8")[:1000], "utf-8")
    assert open_tokenizer("bpe:300", "corpus", lambda: TEXTS, tmp_path).content_hash == opened.content_hash
    assert "again" in caplog.text


def test_missing_truncated_and_foreign_tokenizer_files_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ConfigError, match="Cannot read the tokenizer .*tokenizer.json: No such file"):
        load_tokenizer(path)
    whole = train_bpe(TEXTS, 300)
    for damaged in (whole[: len(whole) // 2], "", "{}", '{"model": 3}', "[]"):
        path.write_text(damaged, "utf-8")
        with pytest.raises(ConfigError, match="not a whole tokenizer.json"):
            load_tokenizer(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="Cannot read the tokenizer"):
        load_tokenizer(path)


@pytest.mark.parametrize("specification", ["bpe:", "bpe:many", "bpe:-5"])
def test_bpe_without_a_size_is_refused(tmp_path, specification):
    with pytest.raises(ConfigError, match="bpe:8192"):
        open_tokenizer(specification, "corpus", lambda: TEXTS, tmp_path)


def word_level(path, specials, words=("a", "b")):
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.add_special_tokens(list(specials))
    library.save(str(path))


@pytest.mark.parametrize(
    ("specials", "expected"),
    [
        (["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], (2, 3)),
        (["<unk>", "<s>", "</s>"], (3, 4)),
        (["<|endoftext|>"], (2, 2)),
        (["<|begin_of_text|>", "<|end_of_text|>"], (2, 3)),
    ],
)
def test_boundaries_are_found_by_their_usual_names(tmp_path, specials, expected):
    word_level(tmp_path / "tokenizer.json", specials)
    found = load_tokenizer(tmp_path / "tokenizer.json")
    assert (found.bos_id, found.eos_id) == expected


def test_boundaries_named_beside_the_tokenizer_come_first(tmp_path):
    word_level(tmp_path / "tokenizer.json", ["<s>", "</s>", "<go>", "<stop>"])
    settings = {"bos_token": {"content": "<go>"}, "eos_token": "<stop>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = load_tokenizer(tmp_path / "tokenizer.json")
    assert (found.bos_id, found.eos_id) == (4, 5)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "<stop>"}')
    found = load_tokenizer(tmp_path / "tokenizer.json")
    assert (found.bos_id, found.eos_id) == (5, 5)


def test_tokenizer_without_boundaries_is_refused_with_the_cure(tmp_path):
    word_level(tmp_path / "tokenizer.json", ["<unk>"])
    with pytest.raises(ConfigError, match="tokenizer_config.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_sentencepiece_names_count_their_bytes(tmp_path):
    path = tmp_path / "tokenizer.json"
    word_level(path, ["<s>", "</s>"], words=("<0x0A>", "▁the", "é"))
    library = tokenizers.Tokenizer.from_file(str(path))
    decoders = tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    library.save(str(path))
    found = load_tokenizer(path)
    assert found.token_bytes.tolist() == [1, 4, 2, 0, 0]
    assert found.first_bytes.tolist() == [1, 3, 2, 0, 0]


def test_settings_for_cutting_and_padding_are_ignored(tmp_path):
    path = tmp_path / "tokenizer.json"
    library = tokenizers.Tokenizer.from_str(train_bpe(TEXTS, 300))
    library.enable_truncation(4)
    library.enable_padding(length=4)
    library.save(str(path))
    found = load_tokenizer(path)
    assert found.decode(found.encode(TEXTS[1])) == TEXTS[1] and len(found.encode("a")) == 1


def test_ours_have_marks_for_filling_in_the_middle(tokenizer):
    names = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
    assert tokenizer.fim_ids == tuple(tokenizer.special_tokens[name] for name in names)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜fim▁hole｜>"], (4, 6, 5)),
        (["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"], (4, 6, 5)),
        (["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"], (4, 6, 5)),
        (["▁<PRE>", "▁<MID>", "▁<SUF>"], (4, 6, 5)),
        (["<fim_prefix>", "<fim_middle>"], None),
        ([], None),
    ],
)
def test_fill_in_the_middle_is_found_by_its_usual_names(tmp_path, names, expected):
    word_level(tmp_path / "tokenizer.json", ["<s>", "</s>", *names])
    assert load_tokenizer(tmp_path / "tokenizer.json").fim_ids == expected


def test_a_tokenizer_travels_to_another_process(tokenizer):
    sent = pickle.dumps(tokenizer)
    assert len(sent) < 1000
    arrived = pickle.loads(sent)
    assert arrived.content_hash == tokenizer.content_hash and arrived.name == tokenizer.name
    assert arrived.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert arrived.encode_batch(TEXTS)[1].tolist() == tokenizer.encode(TEXTS[1])


def test_a_tokenizer_that_changes_on_its_way_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(train_bpe(TEXTS, 300), "utf-8")
    sent = pickle.dumps(load_tokenizer(path))
    path.write_text(train_bpe(TEXTS, 301), "utf-8")
    with pytest.raises(ConfigError, match="tokenizer.json has changed"):
        pickle.loads(sent)


def test_one_thread_remembers_words_however_many_cores(bpe, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert load_tokenizer(Path(bpe.path)).encode_batch(TEXTS)[1].tolist() == bpe.encode(TEXTS[1])
    remembering = []
    monkeypatch.setattr(tokenizer_module, "cache_words", lambda encode: remembering.append(1) or encode)
    load_tokenizer(Path(bpe.path))
    assert not remembering
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    load_tokenizer(Path(bpe.path))
    assert remembering
