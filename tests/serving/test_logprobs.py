"""Log-probabilities as OpenAI's API spells them, also of tokens that are parts of characters."""

import pytest
import tokenizers
from live_server import chat_tokenizer, live

from opendeep_jax.generation.requests import TokenLogprob
from opendeep_jax.serving.answers import TextOffsets, chat_logprobs, completion_logprobs, token_name
from opendeep_jax.text.tokenizer import Tokenizer

PARROT = chat_tokenizer().encode("🦜")


def test_parts_of_a_character_are_told_apart_by_their_bytes():
    first, second, third, last = PARROT
    entry = TokenLogprob(second, -0.03, ((second, -0.03), (third, -4.4), (last, -6.0)))
    found = completion_logprobs(chat_tokenizer(), [entry])
    assert found["top_logprobs"] == [{r"bytes:\x9f": -0.03, r"bytes:\xa6": -4.4, r"bytes:\x9c": -6.0}]
    assert found["tokens"] == [r"bytes:\x9f"]
    (one,) = chat_logprobs(chat_tokenizer(), [entry])["content"]
    assert one["bytes"] == [0x9F] and [each["bytes"] for each in one["top_logprobs"]] == [[0x9F], [0xA6], [0x9C]]


def test_bytes_of_a_streamed_character_put_together_are_the_character():
    entries = [TokenLogprob(token, -1.0, ()) for token in PARROT]
    content = chat_logprobs(chat_tokenizer(), entries)["content"]
    assert bytes(byte for one in content for byte in one["bytes"]).decode() == "🦜"


def test_places_count_characters_and_parts_stand_where_theirs_begins():
    places = TextOffsets(chat_tokenizer(), 2)
    assert [places.take(token) for token in chat_tokenizer().encode("a🦜é!")] == [2, 3, 3, 3, 3, 4, 4, 5]


@pytest.mark.parametrize("asked, names", [(0, {"c"}), (1, {"a", "c"}), (2, {"a", "b", "c"})])
def test_the_chosen_token_is_among_the_alternatives_with_its_own_value(asked, names):
    a, b, c = chat_tokenizer().encode("abc")
    entry = TokenLogprob(c, -3.0, ((a, -0.5), (b, -1.0))[:asked])
    (top,) = completion_logprobs(chat_tokenizer(), [entry])["top_logprobs"]
    assert set(top) == names and top["c"] == -3.0


def test_two_tokens_of_the_same_text_are_both_there():
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<0x61>": 1, "b": 2}, [], byte_fallback=True))
    library.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    tokenizer = Tokenizer(library)
    (top,) = completion_logprobs(tokenizer, [TokenLogprob(0, -0.1, ((0, -0.1), (1, -2.0), (2, -3.0)))])["top_logprobs"]
    assert top == {"a": -0.1, "token_id:1": -2.0, "b": -3.0}
    assert token_name(tokenizer, 7) == "token_id:7"


def test_an_echoed_prompt_has_alternatives_but_for_its_first_token():
    with live() as server:
        ids = chat_tokenizer().encode("aé")
        body = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        found = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
        assert found["top_logprobs"][0] is None and found["token_logprobs"][0] is None
        for value, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True):
            assert value in top.values() and len(top) <= 2
        assert found["text_offset"] == [0, 1, 1, 2]


def test_an_echoed_text_is_the_text_without_the_begin_token_that_goes_before_it():
    with live() as server:
        body = {"prompt": "aé", "max_tokens": 2, "echo": True, "logprobs": 1}
        choice = server.post("/v1/completions", body).json()["choices"][0]
        assert choice["text"] == "aéa"  # this engine says the prompt's own tokens, the first of which shows nothing
        assert choice["logprobs"]["tokens"][0] == chat_tokenizer().library.id_to_token(chat_tokenizer().begin_id)
        assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 2, 2]
