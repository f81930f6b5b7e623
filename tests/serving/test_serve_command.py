"""`opendeep serve` as a process with a real engine and a tiny model, and `opendeep chat` beside it."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import openai
import pytest
from live_server import TEMPLATE, live
from small_models import V3, random_model

import opendeep_jax
from opendeep_jax.cli import chat, serve
from opendeep_jax.generation.engine import Engine, EngineConfig
from opendeep_jax.generation.requests import SamplingParams
from opendeep_jax.interop import save_hf
from opendeep_jax.pretrained.sources import open_tokenizer, open_weights
from opendeep_jax.text.files import byte_tokenizer

ROOT = os.path.dirname(os.path.dirname(opendeep_jax.__file__))
PROGRAM = """
import sys
from opendeep_jax.cli.main import COMMANDS, main
COMMANDS.setdefault("serve", "")
sys.exit(main(["serve", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Hugging Face directory with a random V3 over bytes, and a chat template."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    model = dataclasses.replace(V3, vocab_size=264, mtp=dataclasses.replace(V3.mtp, depth=0), context_length=256)
    save_hf(random_model(model), directory)
    tokenizer = byte_tokenizer()
    tokenizer.library.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE} | dict(tokenizer.special)))
    return directory


@pytest.fixture(scope="module")
def server(tiny):
    """A server with the real engine, in this process."""
    tokenizer, name = open_tokenizer(tiny)
    make = lambda: Engine(open_weights(tiny), EngineConfig(slots=4, page_size=16, max_length=256))  # noqa: E731
    with live(make, tokenizer, name=name) as running:
        yield running


@pytest.mark.slow
def test_the_command_serves_and_drains_on_sigterm(tiny):
    environ = os.environ | {"OPENDEEP_API_KEY": "secret", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, f"--model={tiny}", "--port=0", "--max_length=256", "--slots=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environ, cwd=ROOT, **pipes)
    try:
        said = process.stdout.readline()
        assert said.startswith("tiny answers at http://127.0.0.1:"), process.stderr.read()
        address = said.split()[3]
        with httpx.Client(base_url=address) as http:  # all is compiled ahead, and then it says that it is ready
            while http.get("/ready").status_code == 503:
                time.sleep(0.1)
        with openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        with openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            stream = client.completions.create(
                model="tiny", prompt="def", max_tokens=200, stream=True, stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            next(stream)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
            with httpx.Client(base_url=address) as http:
                try:  # it may have been quick, and be gone
                    assert http.get("/ready").status_code == 503
                except httpx.TransportError:
                    pass
            assert [chunk.usage for chunk in stream][-1].completion_tokens == 200
        assert process.wait(30) == 0
    finally:
        process.kill()
        out, err = process.communicate()
    assert "Traceback" not in err and re.search(r"^compiled \d+ programs in \d+ s$", err, flags=re.MULTILINE)


def test_a_second_signal_ends_the_server_at_once_and_quietly(tiny):
    command = [sys.executable, "-c", PROGRAM, f"--model={tiny}", "--port=0", "--max_length=256", "--warm_up=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=ROOT, **pipes)
    try:
        address = process.stdout.readline().split()[3]
        ask = {"prompt": "def", "max_tokens": 200, "stream": True, "ignore_eos": True}
        with contextlib.suppress(httpx.TransportError), httpx.stream("POST", f"{address}/v1/completions", json=ask):
            end = time.monotonic() + 20
            while process.poll() is None and time.monotonic() < end:  # the first program is being compiled
                process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
            assert process.returncode == 130
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


def test_an_engine_that_cannot_be_ends_the_command_with_the_reason(tiny):
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, f"--model={tiny}", "--port=0", "--max_length=1000000"]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "max_length = 1000000" in done.stderr and "Traceback" not in done.stderr


def test_streams_wholes_and_neighbors_agree(server):
    ask = {"prompt": "def main(", "max_tokens": 30, "temperature": 0, "logprobs": 2, "ignore_eos": True}
    alone = server.post("/v1/completions", ask).json()["choices"][0]
    assert len(alone["logprobs"]["tokens"]) == 30

    def streamed(number: int) -> str:
        other = {**ask, "prompt": "x" * number, "temperature": 1, "seed": number}
        wanted = ask if number % 2 else other
        with httpx.Client(base_url=server.address, timeout=60) as http:
            text = http.post("/v1/completions", json={**wanted, "stream": True}).text
        chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(streamed, range(1, 17)))
    assert set(texts[::2]) == {alone["text"]}


def test_a_seed_gives_the_same_answer_again_and_none_another(server):
    ask = {"prompt": "def", "max_tokens": 20, "n": 2, "ignore_eos": True}

    def texts(**more) -> list[str]:
        return [choice["text"] for choice in server.post("/v1/completions", ask | more).json()["choices"]]

    first = texts(seed=5)
    assert texts(seed=5) == first and first[0] != first[1]
    assert texts(seed=6)[0] == first[1]
    assert texts() != texts()


def test_echo_scores_the_prompt_as_it_scores_what_it_writes(server, tiny):
    prompt = list(range(10, 20))
    params = SamplingParams(max_tokens=6, temperature=0.0, logprobs=0)
    (written,) = Engine(open_weights(tiny), EngineConfig(slots=1, max_length=256)).generate([prompt], params)
    ask = {"prompt": prompt + written.tokens, "max_tokens": 0, "echo": True, "logprobs": 0}
    scored = server.post("/v1/completions", ask).json()["choices"][0]["logprobs"]["token_logprobs"]
    assert scored[0] is None and scored[-6:] == pytest.approx([each.logprob for each in written.logprobs], abs=1e-4)


def test_a_client_that_goes_frees_the_pages_of_the_real_engine(server):
    engine = server.service.engine
    step, total = engine.step, engine.stats.total_pages
    engine.step = lambda: (time.sleep(0.01), step())[1]
    ask = {"prompt": "abc", "max_tokens": 200, "stream": True, "ignore_eos": True}
    with server.client.stream("POST", "/v1/completions", json=ask) as response:
        next(response.iter_lines())
        assert engine.stats.free_pages < total
    until = time.monotonic() + 1.5  # of the two seconds that the whole answer would take
    while engine.stats.free_pages < total and time.monotonic() < until:
        time.sleep(0.01)
    assert engine.stats.free_pages == total
    del engine.step


def test_chat_says_what_the_server_says(tiny, server, capsys):
    chat.main([f"--model={tiny}", "--prompt=hello", "--max_tokens=12", "--temperature=0", "--max_length=256"])
    ask = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0}
    message = server.post("/v1/chat/completions", ask).json()["choices"][0]["message"]
    assert message["content"] and capsys.readouterr().out == message["content"] + "\n"


def test_a_mesh_says_what_one_device_says(tiny, capsys):
    ask = [f"--model={tiny}", "--prompt=hello", "--max_tokens=12", "--temperature=0", "--max_length=256"]
    chat.main(ask)
    alone = capsys.readouterr().out
    chat.main([*ask, "--parallel.tensor=2", "--parallel.fsdp=2"])
    assert capsys.readouterr().out == alone != ""


def test_what_is_compiled_is_said_before_and_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr("opendeep_jax.generation.warm_up.warm_up", lambda engine, longest: ((n, 2) for n in range(3)))
    seen = [line.rpartition(",")[0] for line in serve.compiling(None, 64)]
    assert seen == ["compiling 1 of 2 programs", "compiling 2 of 2 programs"]
    assert re.fullmatch(r"compiled 2 programs in \d+ s\n", capsys.readouterr().err)
