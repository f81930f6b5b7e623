"""Chat in a terminal, in a pipe, and what thinking becomes there and over HTTP."""

import io
import json
import os
import signal
import sys
import threading

import pytest
from fake_engine import EchoEngine
from live_server import chat_tokenizer, live
from rich.console import Console

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.requests import SamplingParams
from opendeep_jax.serving.conversation import Conversation
from opendeep_jax.serving.terminal import answer, chat, piped_input

THINKS = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "<assistant>{% if enable_thinking is not defined or enable_thinking %}<think>{% else %}<think></think>{% endif %}"
)


def thinker(text: str, **more) -> EchoEngine:
    """An engine that says this text and ends."""
    return EchoEngine(answer=[*chat_tokenizer().encode(text), *chat_tokenizer().end_ids[:1]], **more)


def conversation(engine=None, template=None, **more) -> Conversation:
    tokenizer = chat_tokenizer(template) if template else chat_tokenizer()
    return Conversation(engine or EchoEngine(), tokenizer, SamplingParams(), **more)


def said(pieces) -> tuple[str, str]:
    pieces = list(pieces)
    return "".join(piece.reasoning for piece in pieces), "".join(piece.text for piece in pieces)


def test_what_was_said_before_is_part_of_the_next_question():
    talk = conversation(thinker("Yes."), system="Be kind.")
    assert said(talk.ask("Is it?")) == ("", "Yes.")
    list(talk.ask("Really?"))
    assert [message["content"] for message in talk.messages] == ["Is it?", "Yes.", "Really?", "Yes."]
    prompt = talk.engine.stats.prompt_tokens - len("<system>Be kind.<user>Is it?<assistant>")
    assert prompt == len("<system>Be kind.<user>Is it?<assistant>Yes.<user>Really?<assistant>")


def test_each_answer_has_a_seed_of_its_own():
    seeds = []

    class Noting(EchoEngine):
        def submit(self, prompt, params):
            seeds.append(params.seed)
            return super().submit(prompt, params)

    talk = conversation(Noting(), max_tokens=1)
    for _ in range(3):
        list(talk.ask("a"))
    assert seeds == [1, 2, 3]


def test_thinking_comes_apart_from_the_answer():
    talk = conversation(thinker("Hm.\n</think>\n\n42"), THINKS)
    assert said(talk.ask("?")) == ("Hm.", "42")
    assert talk.messages[-1] == {"role": "assistant", "content": "42"}


def test_a_conversation_beyond_the_context_says_so_and_forgets_the_question():
    talk = conversation(EchoEngine(max_length=40))
    with pytest.raises(ConfigError, match="the model's context is 40"):
        list(talk.ask("a" * 50))
    assert talk.messages == []
    assert said(talk.ask("hi"))[1]  # the answer takes what is left, and no more
    assert talk.engine.stats.generated_tokens == 40 - len("<user>hi<assistant>")


def test_a_stopped_answer_ends_where_it_is_and_frees_its_pages():
    talk = conversation(EchoEngine(max_length=10**6))
    seen = []
    for piece in talk.ask("hello", stopped=lambda: len(seen) >= 4):
        seen.append(piece.text)
    assert "".join(seen) == talk.messages[-1]["content"] == "<use"
    assert not talk.engine.busy
    asking = talk.ask("again")
    next(asking)
    asking.close()  # whoever shows the answer may go, too
    assert not talk.engine.busy


def test_ctrl_c_stops_the_answer_and_not_the_chat(monkeypatch, capsys):
    class Interrupted(EchoEngine):
        def step(self):
            if self.stats.steps == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return super().step()

    talk = conversation(Interrupted(max_length=10**6))
    before = signal.getsignal(signal.SIGINT)
    lines = iter(["first", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat(talk, "echo")
    assert signal.getsignal(signal.SIGINT) is before
    assert "<user" in capsys.readouterr().out
    assert len(talk.messages) == 2


def test_the_commands_of_the_chat(monkeypatch, capsys):
    talk = conversation(max_tokens=5)
    typed = ["", "/help", "/nonsense", "one \\", "two", "/reset", "three", "a" * 600, EOFError]

    def read(_):
        line = typed.pop(0)
        if line is EOFError:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    chat(talk, "echo")
    out = capsys.readouterr().out
    assert "/reset" in out and "no command /nonsense" in out and "model's context" in out
    assert [message["content"] for message in talk.messages] == ["three", "<user"]


def test_a_terminal_shows_thinking_dimmed_and_no_control_characters():
    talk = conversation(thinker("Hm.</think>ok \x1b[2Jdone\x07 größe"), THINKS)
    shown = io.StringIO()
    answer(talk, "?", Console(file=shown, force_terminal=True, color_system="standard", highlight=False, width=80))
    text = shown.getvalue()
    assert "\x1b[2J" not in text and "\x07" not in text and "größe" in text
    assert "\x1b[2;3mH" in text and "\x1b[2;3mok" not in text


def test_outside_of_a_terminal_standard_output_has_the_answer_alone(capsys):
    talk = conversation(thinker("Hm.</think>4[bold]2[/bold]\x1b"), THINKS)
    answer(talk, "?", Console())
    out, err = capsys.readouterr()
    assert out == "4[bold]2[/bold]\x1b\n"  # data, as it is
    assert err.strip() == "Hm."


def test_answers_can_be_shown_outside_of_the_main_thread(capsys):
    thread = threading.Thread(target=lambda: answer(conversation(max_tokens=5), "?", Console()))
    thread.start()
    thread.join(20)
    assert capsys.readouterr().out == "<user\n"


def test_piped_input_is_read_as_text(tmp_path, monkeypatch):
    path = tmp_path / "question"
    for wanted in ("Wie groß?", ""):
        path.write_text(wanted, "utf-8")
        with open(path) as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            assert piped_input() == wanted
    path.write_bytes(b"\xff\xfe")
    with open(path) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(ConfigError, match="not text in UTF-8"):
            piped_input()
    with open(os.devnull) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert piped_input() is None
    monkeypatch.setattr(sys, "stdin", None)
    assert piped_input() is None


def test_the_api_gives_thinking_as_reasoning_content():
    ask = {"messages": [{"role": "user", "content": "?"}]}
    with live(lambda: thinker("Hm.\n</think>\n\n42"), chat_tokenizer(THINKS)) as server:
        message = server.post("/v1/chat/completions", ask).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "42")
        lines = server.post("/v1/chat/completions", {**ask, "stream": True}).text.split("\n\n")[:-2]
        deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
        assert "".join(delta.get("content", "") for delta in deltas) == "42"
        # The template's own switch, which leaves the thinking empty.
        ask["chat_template_kwargs"] = {"enable_thinking": False}
        message = server.post("/v1/chat/completions", ask).json()["choices"][0]["message"]
        assert "reasoning_content" not in message and message["content"].startswith("Hm.")
