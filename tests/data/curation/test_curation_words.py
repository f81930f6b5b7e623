"""Words, sentences, pieces and shingles."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opendeep_jax.data.curation.words import pieces, split_sentences, split_words

TEXT = st.text(st.sampled_from("ab é1.,'’!? \n\t-數中ก"), max_size=120)


@pytest.mark.parametrize(
    "text, words",
    [
        ("Don't stop, e.g. at 3.14!", ["Don't", "stop", ",", "e.g", ".", "at", "3.14", "!"]),
        (
            "3:16 and 1,000, on 12/5/24; AT&T a/b x:y",
            ["3:16", "and", "1,000", ",", "on", "12/5/24", ";", "AT&T", "a", "/", "b", "x", ":", "y"],
        ),
        ("wait ... ---- (so)", ["wait", "...", "----", "(", "so", ")"]),
        ("naïve émigré_x", ["naïve", "émigré_x"]),
        ("数据ok中", ["数", "据", "ok", "中"]),
        ("", []),
        (" \n\t\u3000", []),
    ],
)
def test_words_are_split_as_expected(text, words):
    assert split_words(text) == words


@given(TEXT)
def test_no_sign_of_a_text_is_lost_between_its_words(text):
    assert "".join(split_words(text)) == "".join(text.split())


@given(TEXT)
def test_sentences_lie_end_to_end(text):
    spans = split_sentences(text)
    assert "".join(text[begin:end] for begin, end in spans) == text.rstrip() + text[len(text.rstrip()) :]
    assert all(begin < end for begin, end in spans) or not text


def test_sentences_end_where_a_reader_would_say():
    text = 'He said: "No." She left... Version 3.14 is out! 你好。再见。 And no end'
    assert [text[begin:end].strip() for begin, end in split_sentences(text)] == [
        'He said: "No."', "She left...", "Version 3.14 is out!", "你好。", "再见。", "And no end"
    ]  # fmt: skip


@given(TEXT, st.integers(1, 40))
def test_pieces_without_overlap_lie_end_to_end(text, size):
    assert "".join(pieces(text, size)) == text
    assert all(len(piece) <= 2 * size for piece in pieces(text, size))


@given(st.lists(st.text("abc", min_size=1, max_size=6), max_size=60), st.integers(20, 60))
def test_each_run_of_three_words_is_whole_in_one_piece(words, size):
    seen = [piece.split() for piece in pieces(" ".join(words), size, overlap=20)]
    runs = {tuple(piece[i : i + 3]) for piece in seen for i in range(len(piece) - 2)}
    assert {tuple(words[i : i + 3]) for i in range(len(words) - 2)} <= runs


@settings(deadline=None)  # the first example imports datatrove
@given(TEXT, TEXT, st.integers(1, 4))
def test_shingles_are_equal_just_where_datatroves_are(one, other, ngram):
    pytest.importorskip("datatrove")
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.text import TextNormConfig

    from opendeep_jax.data.curation.words import shingles, word_tokenizer

    settings = MinhashConfig(n_grams=ngram, norm_config=TextNormConfig(norm_numbers=False))
    block = MinhashDedupSignature(".", settings, language=word_tokenizer())

    def pattern(get) -> list[list[bool]]:
        values = np.concatenate([np.asarray(get(text)).reshape(-1) for text in (one, other)])
        return (values[:, None] == values[None, :]).tolist()

    assert pattern(lambda text: shingles(text, ngram)) == pattern(block.get_shingles)
    assert len(shingles(one, ngram)) == len(block.get_shingles(one))


def test_shingles_of_a_long_text_are_those_of_the_whole(monkeypatch):
    pytest.importorskip("datatrove")
    from opendeep_jax.data.curation import words

    text = " ".join(f"w{i * i % 101}" for i in range(500))
    whole = words.shingles(text, 5)
    cut = words.pieces
    monkeypatch.setattr(words, "pieces", lambda text: cut(text, 64))
    assert np.array_equal(words.shingles(text, 5), whole)
