"""Prompts that are gone on with together: their pieces, their ends, and what a stop string leaves of them."""

import pytest
from fake_engine import EchoEngine
from live_server import byte_codec

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.params import SamplingParams
from opendeep_jax.serving.continuation import continued

SIX = SamplingParams(max_tokens=6)


def whole(pieces) -> dict[int, tuple[str, str]]:
    """Each prompt's text and end."""
    texts, ends = {}, {}
    for piece in pieces:
        assert piece.place not in ends  # nothing comes after an end
        texts[piece.place] = texts.get(piece.place, "") + piece.text
        if piece.finish:
            ends[piece.place] = piece.finish
    return {place: (text, ends[place]) for place, text in texts.items()}


def test_each_prompt_has_its_own_text_and_end():
    engine = EchoEngine(slots=2)
    found = whole(continued(engine, byte_codec(), ["abc", "xyz", "größe"], [SIX] * 3, ["ca"]))
    assert found[0] == ("ab", "stop") and not engine.busy
    assert found[1][1] == "length" and found[1][0].startswith("xyz")
    assert found[2][0].startswith("grö")


def test_a_prompt_that_is_too_long_is_refused_before_a_piece_is_asked_for():
    with pytest.raises(ConfigError, match="too long"):
        continued(EchoEngine(max_length=8), byte_codec(), ["a" * 9], [SIX])


def test_no_prompts_are_no_pieces():
    assert list(continued(EchoEngine(), byte_codec(), [], [])) == []
