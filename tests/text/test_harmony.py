"""gpt-oss' channels: the grammar of its messages, whole and piece by piece."""

import pytest
from whole_text import split_thinking

from opendeep_jax.text.harmony import HarmonyStream
from opendeep_jax.text.stream import HARMONY

A = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
TEXTS = {
    "thinking and answer": (A + FINAL + "42<|return|>", "Hm.", "42", {}),
    "an answer alone": (FINAL + "42", "", "42", {}),
    "no header at all": ("Hello, <b>you</b>", "", "Hello, <b>you</b>", {}),
    "words like a header's": ("assistant to the king", "", "assistant to the king", {}),
    "a single word like a header's": ("assistant", "", "assistant", {}),
    "JSON, constrained": (A + "<|channel|>final <|constrain|>json<|message|>{}", "Hm.", "{}", {}),
    "JSON, unmarked": (A + "<|channel|>final json<|message|>{}", "Hm.", "{}", {}),
    "two thoughts": (A + "<|channel|>analysis<|message|>More.<|end|><|start|>assistant" + FINAL + "42",
        "Hm.\nMore.", "42", {}),
    "a preamble before the answer": (A + "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + FINAL
        + "42", "Hm.\nI look.", "42", {}),
    "a preamble before a call": (A + "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>", "Hm.", "I look.", {"f": "{}"}),
    "a preamble alone": ("<|channel|>commentary<|message|>I look.<|end|>", "", "I look.", {}),
    "a call, its recipient first": (A + ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        "Hm.", "", {"f": '{"a": 1}'}),
    "two calls": (A + " to=functions.f<|channel|>commentary<|message|>{}<|call|><|start|>assistant"
        "<|channel|>commentary to=functions.g<|message|>[]<|call|>", "Hm.", "", {"f": "{}", "g": "[]"}),
    "a call that is cut": (A + " to=functions.f<|channel|>commentary<|message|>{", "Hm.", "", {"f": "{"}),
    "python is no function": (A + " to=python<|channel|>analysis<|message|>1+1<|call|>", "Hm.\n1+1", "", {}),
    "a header that is cut": (A + "<|channel|>fin", "Hm.", "", {}),
    "a role that is cut": ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assis", "Hm.", "", {}),
    "thinking that is cut": ("<|channel|>analysis<|message|>Hm", "Hm", "", {}),
    "a message that is never closed": (
        "<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>42", "Hm.", "42", {}),
    "a message inside of a message": (FINAL + "4<|message|>2<|refusal|>!", "", "42!", {}),
    "others' words": (FINAL + "42<|end|><|start|>user<|message|>And?<|end|>", "And?", "42", {}),
    "two answers": (FINAL + "4<|end|><|start|>assistant" + FINAL + "2", "", "4\n2", {}),
    "marks that are none": (FINAL + "a <|b|> <| < <|en", "", "a <|b|> <| < <|en", {}),
}  # fmt: skip


def heard(text: str, size: int, prompt: str = "...<|start|>assistant") -> tuple[str, str, dict[str, str]]:
    """What a stream gives for a text in pieces of some size."""
    stream = HarmonyStream(prompt)
    spoken = [stream.push(text[at : at + size]) for at in range(0, len(text), size)] + [stream.finish()]
    names, calls = {}, {}
    for call in (call for one in spoken for call in one.calls):
        name = names.setdefault(call.index, call.name)
        calls[name] = calls.get(name, "") + call.arguments
    return "".join(one.thinking for one in spoken), "".join(one.answer for one in spoken), calls


@pytest.mark.parametrize("text, thinking, answer, calls", TEXTS.values(), ids=TEXTS)
def test_messages_become_thinking_answers_and_calls_however_they_are_cut(text, thinking, answer, calls):
    for size in (len(text), 1, 2, 3, 7, 16):
        assert heard(text, size) == (thinking, answer, calls)
    if not calls:
        assert split_thinking(text, marks=HARMONY) == (thinking, answer)


@pytest.mark.parametrize(
    "prompt, text, said",
    [
        ("<|start|>user<|message|>?<|end|><|start|>assistant<|channel|>analysis<|message|>", "Hm.<|end|>", ("Hm.", "")),
        ("<|start|>assistant<|channel|>final<|message|>old<|end|><|start|>assistant<|channel|>final<|message|>", "42",
         ("", "42")),
        ("<|start|>assistant<|channel|>final", "<|message|>42", ("", "42")),
        ("no marks", FINAL + "42", ("", "42")),
    ],
)  # fmt: skip
def test_a_prompt_may_have_opened_the_message(prompt, text, said):
    assert heard(text, 3, prompt)[:2] == said


def test_an_answer_is_given_as_it_comes():
    stream = HarmonyStream("<|start|>assistant")
    stream.push(FINAL)
    assert [stream.push(piece).answer for piece in ("a", "b <", "|", "c!")] == ["a", "b ", "", "<|c!"]
