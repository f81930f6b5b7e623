"""The harness' three questions, answered from the model's own logits, and its tasks and settings, where they fail."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval")

from opendeep_jax.config.checks import ConfigError  # noqa: E402
from opendeep_jax.evaluation.harness import HarnessModel, find_tasks  # noqa: E402
from opendeep_jax.evaluation.windows import windows  # noqa: E402
from opendeep_jax.generation.requests import Request, RequestProgress  # noqa: E402


@pytest.fixture
def harness(tiny, engine):
    return HarnessModel(engine, tiny[1], "tiny")


def asked(*arguments) -> list:
    """Requests, as far as the model looks at them."""
    return [SimpleNamespace(args=one) for one in arguments]


def logprobs_of(model, tokens: list[int]) -> np.ndarray:
    """Of all tokens [length, vocabulary] after each of `tokens`; padded, so that one program does for all lengths."""
    padded = jnp.asarray([[*tokens, *[0] * (64 - len(tokens))]])
    return np.asarray(jax.nn.log_softmax(model(padded), -1))[0, : len(tokens)]


def expected(model, before: list[int], after: list[int]) -> tuple[float, bool]:
    """Of a continuation under the whole model."""
    logprobs = logprobs_of(model, [*before, *after])[len(before) - 1 : -1]
    chosen = logprobs[np.arange(len(after)), after]
    return float(chosen.sum()), bool((logprobs.argmax(-1) == after).all())


def greedy(model, tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(logprobs_of(model, tokens)[-1, :262].argmax()))
    return tokens[-count:]


def test_continuations_have_the_models_own_probability(tiny, harness):
    model, tokenizer = tiny
    pairs = [("The sky is", " blue"), ("The sky is ", "blue"), ("", "größe"), ("The sky is", " blue"), ("Ja", "")]
    found = harness.loglikelihood(asked(*pairs))
    first = expected(model, tokenizer.encode_prompt("The sky is"), tokenizer.encode(" blue"))
    alone = expected(model, [tokenizer.begin_id], tokenizer.encode("größe"))
    assert [value for value, _ in found] == pytest.approx([first[0], first[0], alone[0], first[0], 0.0], abs=1e-4)
    assert [is_greedy for _, is_greedy in found] == [first[1], first[1], alone[1], first[1], True]
    assert harness.cut_prompts == 0


def test_the_greedy_continuation_is_said_to_be_it(tiny, harness):
    model, tokenizer = tiny
    best = {prompt: greedy(model, tokenizer.encode_prompt(prompt), 1)[0] for prompt in "abcdefghijklmnop"}
    prompt, letter = next((prompt, chr(token)) for prompt, token in best.items() if 33 <= token < 127)
    other = "A" if letter != "A" else "B"
    assert [is_greedy for _, is_greedy in harness.loglikelihood(asked((prompt, letter), (prompt, other)))] == [
        True,
        False,
    ]


def test_a_long_context_loses_its_beginning_and_is_counted(tiny, harness):
    model, tokenizer = tiny
    context = "".join(chr(97 + n % 26) for n in range(100))
    (found,) = harness.loglikelihood(asked((context, "xyz")))
    value, _ = expected(model, tokenizer.encode(context)[-61:], tokenizer.encode("xyz"))
    assert found[0] == pytest.approx(value, abs=1e-4)
    assert harness.cut_prompts == 1
    with pytest.raises(ConfigError, match="64 tokens is to be scored as one, and the model reads 64"):
        harness.loglikelihood(asked(("a", "x" * 64)))


def test_whole_texts_are_scored_in_windows_without_overlap(tiny, harness):
    model, tokenizer = tiny
    text = "abcdefghij" * 15
    found = harness.loglikelihood_rolling(asked((text,), ("",), ("q",)))
    pieces = windows([tokenizer.begin_id, *tokenizer.encode(text)], 64, 63)
    values = [expected(model, piece.tokens[: piece.first], piece.tokens[piece.first :])[0] for piece in pieces]
    single = expected(model, [tokenizer.begin_id], tokenizer.encode("q"))[0]
    assert found == pytest.approx([sum(values), 0.0, single], abs=1e-3)


def test_answers_are_greedy_and_end_before_a_stop_string(tiny, harness):
    model, tokenizer = tiny
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    (whole,) = harness.generate_until(asked(("The sky", settings)))
    assert whole == tokenizer.decode(greedy(model, tokenizer.encode_prompt("The sky"), 12))
    stop = whole[3:5]
    cut, other = harness.generate_until(
        asked(("The sky", settings | {"until": stop}), ("Snow", settings | {"until": ["\0\0"]}))
    )
    assert cut == whole[: whole.index(stop)] and len(tokenizer.encode(other)) > 0
    assert not harness.engine.busy
    stats = harness.engine.stats
    assert stats.free_pages == stats.total_pages


def test_a_sampled_answer_depends_on_seed_and_prompt_alone(tiny, engine):
    settings = {"max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_p": 0.95}
    prompts = [("one", settings), ("two", settings), ("two", settings), ("three", settings)]
    model = HarnessModel(engine, tiny[1], "tiny", seed=5)
    found = model.generate_until(asked(*prompts))
    again = model.generate_until(asked(*reversed(prompts)))
    assert found[0] == again[3] and found[3] == again[0]
    assert found[1] != found[2] and {found[1], found[2]} == {again[1], again[2]}  # repeats are not copies
    assert HarnessModel(engine, tiny[1], "tiny", seed=6).generate_until(asked(*prompts)) != found


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"max_gen_toks": 64}, "may have 64 tokens, and prompt and answer together 64"),
        ({"max_gen_toks": 0}, "--max_tokens"),
        ({"max_gen_toks": 4, "num_beams": 4}, "num_beams=4"),
        ({"max_gen_toks": 4, "typical_p": 0.3}, "typical_p=0.3"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_by_name(harness, settings, words):
    with pytest.raises(ConfigError, match=words):
        harness.generate_until(asked(("a", settings)))
    assert not harness.engine.busy


def test_settings_of_others_that_change_nothing_are_passed_over(harness):
    (text,) = harness.generate_until(asked(("a", {"max_new_tokens": 2, "num_beams": 1, "until": None})))
    assert text == harness.generate_until(asked(("a", {"max_tokens": 2})))[0]


def test_chats_go_through_the_template_and_its_special_tokens_are_tokens(tiny, engine):
    model = HarnessModel(engine, tiny[1], "tiny", chat=True)
    messages = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "It is "}]
    assert model.apply_chat_template(messages[:1]) == "<user>2+2<assistant>"
    assert model.apply_chat_template(messages, add_generation_prompt=False).endswith("<assistant>It is")
    assert model.chat_template(True) == tiny[1].chat_template and model.tokenizer_name == "tiny"
    marker = tiny[1].decode([tiny[1].begin_id], special=True)
    (found,) = model.loglikelihood(asked((f"{marker}ab", "c")))
    tokenizer = tiny[1]
    value, _ = expected(tiny[0], [tokenizer.begin_id, *tokenizer.encode("ab")], tokenizer.encode("c"))
    assert found[0] == pytest.approx(value, abs=1e-4)


def test_tasks_of_ones_own_are_found_by_name_and_pattern(task_directory):
    _, names = find_tasks(["colors"], str(task_directory))
    assert names == ["colors"]
    assert find_tasks(["colors*"], str(task_directory))[1] == ["colors", "colors_written"]
    with pytest.raises(ConfigError, match="is no directory"):
        find_tasks(["colors"], str(task_directory / "nowhere"))


def test_a_task_whose_data_is_not_there_is_refused(task_directory):
    (task_directory / "examples.jsonl").unlink()
    tasks, names = find_tasks(["colors"], str(task_directory))
    with pytest.raises(ConfigError, match="--tasks=colors: cannot be loaded"):
        tasks.load(names)


THINKS = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
CHANNELS = "{{ messages[0].content }}<|start|>assistant{# <|channel|> #}"


class Saying:
    """An engine that says a text, whatever it is asked."""

    max_length, shards = 512, 1

    def __init__(self, tokenizer, text):
        self.left, self.request = tokenizer.encode(text, special=True), None

    @property
    def busy(self):
        return self.request.finish is None

    def submit(self, prompt, params):
        self.request = Request(list(prompt), params)
        return self.request

    def abort(self, request):
        request.finish = "aborted"

    def step(self):
        tokens, self.left = self.left[:1], self.left[1:]
        self.request.finish = self.request.finish or (None if tokens else "stop")
        return [RequestProgress(self.request, tokens, [], self.request.finish)]


@pytest.mark.parametrize(
    "template, says, answer",
    [
        (THINKS, "Two and two.\n\nFour.\n</think>\n\n4\n\n5", "4"),
        (THINKS, "Two and two.\n\nFour.", ""),
        (CHANNELS,
         "<|channel|>analysis<|message|>A.\n\nB.<|end|><|start|>assistant<|channel|>final<|message|>4\n\n5", "4"),
        (CHANNELS, "4\n\n5", "4"),
    ],
)  # fmt: skip
def test_thinking_is_no_part_of_an_answer_and_stop_strings_do_not_end_it(tiny, template, says, answer):
    tokenizer = dataclasses.replace(tiny[1], chat_template=template)
    model = HarnessModel(Saying(tokenizer, says), tokenizer, "tiny", chat=True)
    prompt = model.apply_chat_template([{"role": "user", "content": "2+2?"}])
    assert model.generate_until(asked((prompt, {"until": ["\n\n"]}))) == [answer]
    plain = HarnessModel(Saying(tokenizer, says), tokenizer, "tiny")
    assert plain.generate_until(asked((prompt, {"until": ["\n\n"]}))) == [says.split("\n\n")[0]]
