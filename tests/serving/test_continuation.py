"""Prompts that are gone on with together: their pieces, their ends, and what a stop string leaves of them."""

from types import SimpleNamespace

import pytest
import tokenizers
from fake_engine import EchoEngine, Progress
from live_server import chat_tokenizer

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.evaluation.harness import HarnessModel
from opendeep_jax.generation.answers import Answer
from opendeep_jax.generation.requests import SamplingParams, TokenLogprob
from opendeep_jax.serving.continuation import continued
from opendeep_jax.serving.requests import completion
from opendeep_jax.serving.schemas import CompletionRequest
from opendeep_jax.serving.service import Limits
from opendeep_jax.text.stream import TextStream
from opendeep_jax.text.tokenizer import Tokenizer

SIX = SamplingParams(max_tokens=6)


def whole(pieces) -> dict[int, tuple[str, str]]:
    """Each prompt's text and end."""
    texts, ends = {}, {}
    for place, piece in pieces:
        assert place not in ends  # nothing comes after an end
        texts[place] = texts.get(place, "") + piece.text
        if piece.finish:
            ends[place] = piece.finish
    return {place: (text, ends[place]) for place, text in texts.items()}


def test_each_prompt_has_its_own_text_and_end():
    engine = EchoEngine(slots=2)
    found = whole(continued(engine, chat_tokenizer(), ["abc", "xyz", "größe"], [SIX] * 3, ["ca"]))
    assert found[0] == ("ab", "stop") and not engine.busy
    assert found[1][1] == "length" and found[1][0].startswith("xyz")
    assert found[2][0].startswith("grö")


def test_a_prompt_that_is_too_long_is_refused_before_a_piece_is_asked_for():
    with pytest.raises(ConfigError, match="too long"):
        continued(EchoEngine(max_length=8), chat_tokenizer(), ["a" * 9], [SIX])


def test_no_prompts_are_no_pieces():
    assert list(continued(EchoEngine(), chat_tokenizer(), [], [])) == []


def spaced_tokenizer(kind: str) -> Tokenizer:
    """A tokenizer whose decoder cuts a text's leading space off, as those of Llama 2, Mistral and T5 do."""
    names = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehiknrstuy"]
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    library.add_special_tokens(names[:3])
    steps = [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    if kind == "Strip":
        space = tokenizers.normalizers.Replace(" ", "▁")
        library.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), space])
        steps = [tokenizers.decoders.Replace("▁", " "), *steps, tokenizers.decoders.Strip(" ", 1, 0)]
    else:
        library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps = [tokenizers.decoders.Metaspace(prepend_scheme="first"), *steps]
    library.decoder = tokenizers.decoders.Sequence(steps)
    return Tokenizer(library, begin_id=0, end_ids=(1,))


@pytest.mark.parametrize("kind", ["Strip", "Metaspace"])
def test_a_text_and_what_goes_on_with_it_are_the_whole_text(kind):
    tokenizer = spaced_tokenizer(kind)
    ids = [tokenizer.begin_id, *tokenizer.encode("the sky  is 🦜 here ")]
    starts = [
        n for n in range(len(ids) + 1) if not tokenizer.byte_decoder.raw & {*ids[n : n + 1], *ids[max(n - 1, 0) : n]}
    ]
    for n in [0, 1, *starts]:
        stream = TextStream(tokenizer, before=ids[:n])
        assert (
            tokenizer.decode(ids[:n]) + stream.push(ids[n:]) + stream.finish()
            == tokenizer.decode(ids)
            == "the sky  is 🦜 here "
        )


@pytest.mark.parametrize("kind", ["Strip", "Metaspace"])
def test_generate_server_and_harness_keep_the_space_of_a_continuations_first_word(kind):
    tokenizer = spaced_tokenizer(kind)
    says = tokenizer.encode("the end")
    engine = EchoEngine(answer=says, vocab_size=tokenizer.vocab_size)
    params = SamplingParams(max_tokens=len(says))
    assert whole(continued(engine, tokenizer, ["this is"], [params])) == {0: (" the end", "length")}
    asked = SimpleNamespace(args=("this is", {"until": ["\n"], "max_gen_toks": len(says)}))
    assert HarnessModel(engine, tokenizer, "small").generate_until([asked]) == [" the end"]
    body = CompletionRequest.model_validate({"prompt": "this is", "logprobs": 0, "echo": True})
    asked = completion(body, tokenizer, Limits(1, 100, tokenizer.vocab_size), "small")
    asked.answers[0].push(Progress(None, says, [TokenLogprob(i, -1.0, ()) for i in says], "length"))
    choice = asked.choice(0, None)
    assert choice["text"] == "this is the end"
    assert choice["logprobs"]["text_offset"] == list(range(len("this is"), len(choice["text"])))


@pytest.mark.parametrize("least, text", [(0, "the"), (4, "the"), (5, "thesky"), (8, "thesky"), (9, "theskyis")])
def test_no_stop_string_ends_an_answer_that_is_shorter_than_its_least_length(least, text):
    tokenizer = spaced_tokenizer("Strip")
    says = [*tokenizer.encode("the"), 1, *tokenizer.encode("sky")[1:], 1, *tokenizer.encode("is")[1:], 1]
    answer = Answer(tokenizer, ["</s>"], least=least)
    for i in says:
        answer.push(Progress(None, [i], [], None))
    assert (answer.whole.text, answer.whole.finish) == (text, "stop")
