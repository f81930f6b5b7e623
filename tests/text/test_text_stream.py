"""Streams give what decoding everything gives, cut at the first stop string, whatever the tokens' bounds are."""

import time

import hypothesis
import hypothesis.strategies as st
import pytest
from whole_text import split_thinking

from opendeep_jax.text.files import byte_tokenizer
from opendeep_jax.text.stream import HARMONY, THINK, TextStream, ThinkingStream, thinking_stream

TOKENIZER = byte_tokenizer()
WORDS = st.lists(st.sampled_from(["a", "b", "ab", "ba", "é", "🙂", "\n", " "]), max_size=12).map("".join)
STOPS = st.lists(st.sampled_from(["ab", "aba", "b\n", "é", "🙂b", "bab", ""]), max_size=3)


def plain(text: str, stops) -> str:
    """The shortest beginning of a text that a stop string ends, without it; of two that end there, the longer."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def pieces(sequence, sizes):
    """The sequence in parts of these sizes, over and over."""
    start, number = 0, 0
    while start < len(sequence):
        size = sizes[number % len(sizes)] if sizes else 1
        yield sequence[start : start + size]
        start, number = start + size, number + 1


@hypothesis.given(WORDS, STOPS, st.lists(st.integers(1, 5), max_size=4))
@hypothesis.settings(max_examples=400, deadline=None)
def test_a_stream_is_the_text_cut_at_its_first_stop_string(text, stops, sizes):
    stream, shown = TextStream(TOKENIZER, stops), ""
    for part in pieces(TOKENIZER.encode(text), sizes):
        shown += stream.push(part)
        assert plain(text, stops).startswith(shown)  # nothing is ever taken back
    shown += stream.finish()
    assert shown == plain(text, stops)
    assert stream.stopped == (plain(text, stops) != text)


@hypothesis.given(st.binary(max_size=40), st.lists(st.integers(1, 5), max_size=3))
def test_broken_utf8_is_what_decoding_gives(raw, sizes):
    stream = TextStream(TOKENIZER)
    shown = "".join(stream.push(part) for part in pieces(list(raw), sizes)) + stream.finish()
    assert shown == TOKENIZER.decode(raw) == raw.decode("utf-8", "replace")


def test_half_a_character_waits_for_its_other_half():
    stream = TextStream(TOKENIZER)
    first, *rest = TOKENIZER.encode("é")
    assert stream.push([first]) == "" and stream.push(rest) == "é" and stream.finish() == ""


def test_what_may_be_a_stop_string_waits_and_is_given_when_it_is_none():
    stream = TextStream(TOKENIZER, ["###"])
    assert stream.push(TOKENIZER.encode("a##")) == "a"
    assert stream.push(TOKENIZER.encode("b#")) == "##b"
    assert stream.finish() == "#" and not stream.stopped


def test_what_comes_after_the_stop_string_is_nothing():
    stream = TextStream(TOKENIZER, ["END"])
    assert stream.push(TOKENIZER.encode("xENDy")) == "x"
    assert stream.matched == "END" and stream.push(TOKENIZER.encode("z")) == stream.finish() == ""


def test_special_tokens_are_text_only_where_that_is_asked():
    end = TOKENIZER.end_ids[0]
    assert TextStream(TOKENIZER).push([end]) == ""
    assert TextStream(TOKENIZER, special=True).push([end]) == "<｜end▁of▁sentence｜>"


def test_the_time_for_a_token_does_not_grow_with_the_text():
    stream = TextStream(TOKENIZER, ["b" * 50, "c" * 50])

    def seconds(tokens):
        begun = time.perf_counter()
        for _ in range(tokens):
            stream.push((97,))
        return time.perf_counter() - begun

    seconds(2000)
    early = min(seconds(2000) for _ in range(3))
    seconds(100_000)
    assert min(seconds(2000) for _ in range(3)) < 5 * early


@pytest.mark.parametrize(
    "text, opened, said",
    [
        ("<think>\nHm.\n</think>\n\n42", False, ("Hm.", "42")),
        ("Hm.\n</think>\n42 <think>", True, ("Hm.", "42 <think>")),
        ("\n<think>cut off", False, ("cut off", "")),
        ("42", False, ("", "42")),
        (" <thin", False, ("", " <thin")),
        ("</think>42", False, ("", "</think>42")),
        ("<think></think>42", False, ("", "42")),
        ("", True, ("", "")),
        ("a < b", False, ("", "a < b")),
    ],
)
def test_thinking_is_told_from_the_answer(text, opened, said):
    assert split_thinking(text, opened) == said


def test_gpt_oss_channels_are_told_apart():
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>42"
    assert split_thinking(thought, marks=HARMONY) == ("Hm.", "42")
    assert split_thinking("<|channel|>final<|message|>42", marks=HARMONY) == ("", "42")


@hypothesis.given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "a", " ", "\n", "</", "think>"]), max_size=10).map("".join),
    st.booleans(),
    st.lists(st.integers(1, 7), max_size=4),
)
@hypothesis.settings(max_examples=400, deadline=None)
def test_a_stream_of_thinking_is_the_whole_texts(text, opened, sizes):
    stream = ThinkingStream(opened)
    parts = [*(stream.push(part) for part in pieces(text, sizes)), stream.finish()]
    said = "".join(part.thinking for part in parts), "".join(part.answer for part in parts)
    assert said == split_thinking(text, opened)


def test_a_prompt_may_have_opened_the_thinking():
    assert thinking_stream(THINK, "<｜Assistant｜><think>\n").push("Hm.").thinking == "Hm."
    assert thinking_stream(THINK, "<think>x</think>").push("Hm.").answer == "Hm."
