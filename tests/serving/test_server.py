"""The API as clients use it, against a real server whose engine echoes."""

import json
import math
import re
import threading
import time

import openai
import pytest
from fake_engine import EchoEngine
from live_server import chat_tokenizer, live

from opendeep_jax.serving.server import ServerConfig


@pytest.fixture(scope="module")
def server():
    with live() as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as made:
        yield made


def events(response) -> list[dict]:
    """The chunks of a stream, which ended as it should."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_the_openai_client_completes(client):
    answer = client.completions.create(model="echo", prompt="abc", max_tokens=6)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abca", "length")  # and twice the first token
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 6)
    assert answer.object == "text_completion"


def test_the_openai_client_streams_completions(client):
    chunks = list(client.completions.create(model="echo", prompt="hello", max_tokens=12, stream=True))
    whole = client.completions.create(model="echo", prompt="hello", max_tokens=12).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert len(chunks) > 6


def test_the_openai_client_chats(client):
    answer = client.chat.completions.create(
        model="echo", messages=[{"role": "user", "content": "hi"}], max_completion_tokens=5
    )
    message = answer.choices[0].message
    assert (message.role, message.content, answer.choices[0].finish_reason) == ("assistant", "<user", "length")
    assert answer.usage.prompt_tokens == len("<user>hi<assistant>")


def test_the_openai_client_streams_chat_with_usage(client):
    chunks = list(
        client.chat.completions.create(
            model="echo",
            messages=[{"role": "user", "content": [{"type": "text", "text": "größe"}]}],
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "<user>größ"  # 12 bytes
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 12)


def test_the_openai_client_lists_the_model_and_nothing_else(client):
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").id == "echo"
    with pytest.raises(openai.NotFoundError, match="There is no model 'other' here"):
        client.models.retrieve("other")


def test_every_form_of_prompt_is_read(server):
    def texts(prompt, **more):
        answer = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 3, **more}).json()
        return [choice["text"] for choice in answer["choices"]]

    ids = chat_tokenizer().encode("xyz")
    assert texts(ids) == ["xyz"]
    assert texts([ids, ids[1:]]) == ["xyz", "yzy"]
    assert len(texts(["one", "two"], n=3)) == 6
    assert texts([ids, ids[::-1]], n=2) == ["xyz", "xyz", "zyx", "zyx"]


def test_answers_have_seeds_of_their_own_unless_one_is_given(server):
    seen = []
    engine = server.service.engine
    submit = engine.submit
    engine.submit = lambda prompt, params: (seen.append(params.seed), submit(prompt, params))[1]
    try:
        ask = {"prompt": ["a", "b"], "max_tokens": 1, "n": 2}
        server.post("/v1/completions", ask)
        server.post("/v1/completions", ask)
        assert len(set(seen)) == 8
        del seen[:]
        server.post("/v1/completions", {**ask, "seed": 2**32 - 1})
        assert seen == [2**32 - 1, 0, 2**32 - 1, 0]
    finally:
        del engine.submit


def test_sampling_settings_reach_the_engine(server):
    seen = []
    engine = server.service.engine
    submit = engine.submit
    engine.submit = lambda prompt, params: (seen.append(params), submit(prompt, params))[1]
    try:
        settings = {"temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.25, "seed": 3}
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 2, **settings}).status_code == 200
        server.post("/v1/completions", {"prompt": "a", "max_tokens": 2, "ignore_eos": True})
    finally:
        del engine.submit
    assert {name: getattr(seen[0], name) for name in settings} == settings
    assert (seen[0].max_tokens, seen[0].logprobs) == (2, -1)
    assert seen[0].end_ids == chat_tokenizer().end_ids and seen[1].end_ids == ()
    assert (seen[1].temperature, seen[1].top_p, seen[1].top_k, seen[1].min_p) == (1.0, 1.0, 0, 0.0)


def test_stop_strings_end_an_answer_and_its_tokens(server):
    ask = {"prompt": chat_tokenizer().encode("hello world "), "max_tokens": 100, "stop": ["xx", "o wo"]}
    answer = server.post("/v1/completions", ask).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("hell", "stop")
    assert answer["usage"]["completion_tokens"] == len("hello wo")
    chunks = events(server.post("/v1/completions", {**ask, "stream": True, "stop": "o wo"}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hell"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    deadline = time.monotonic() + 5
    while server.service.open_prompts and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.service.engine.requests == []


def test_log_probabilities_of_completions(server):
    ids = chat_tokenizer().encode("abc")
    answer = server.post("/v1/completions", {"prompt": ids, "max_tokens": 3, "logprobs": 2}).json()
    found = answer["choices"][0]["logprobs"]
    assert found["tokens"] == ["a", "b", "c"] and found["text_offset"] == [0, 1, 2]
    assert found["token_logprobs"] == [-0.5] * 3
    assert found["top_logprobs"][0] == {"a": -0.5, "b": -1.5}
    chunks = events(server.post("/v1/completions", {"prompt": ids, "max_tokens": 3, "logprobs": 0, "stream": True}))
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [offset for each in streamed for offset in each["text_offset"]] == [0, 1, 2]


def test_log_probabilities_of_chat(server):
    ask = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 1}
    found = server.post("/v1/chat/completions", ask).json()["choices"][0]["logprobs"]["content"]
    assert [each["token"] for each in found] == ["<", "u"]
    assert found[0]["bytes"] == [ord("<")] and len(found[0]["top_logprobs"]) == 1


def test_echo_gives_the_prompt_back_with_its_log_probabilities(server):
    ids = chat_tokenizer().encode("abc")
    answer = server.post("/v1/completions", {"prompt": ids, "max_tokens": 2, "echo": True, "logprobs": 0}).json()
    choice = answer["choices"][0]
    assert choice["text"] == "abcab"
    assert choice["logprobs"]["tokens"] == list("abcab")
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0, -0.5, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    scored = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = server.post("/v1/completions", scored).json()
    assert answer["choices"][0]["text"] == "abc" and answer["usage"]["completion_tokens"] == 0
    chunks = events(server.post("/v1/completions", {"prompt": ids, "max_tokens": 2, "echo": True, "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcab"


def test_health_readiness_and_metrics_tell_how_it_goes(server):
    server.post("/v1/completions", {"prompt": "abc", "max_tokens": 4})
    assert server.client.get("/health").json() == {"status": "ok"}
    assert server.client.get("/ready").json() == {"status": "ready"}
    metrics = server.client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(values["opendeep_generated_tokens_total"]) >= 4
    assert float(values["opendeep_free_pages"]) == 64 == float(values["opendeep_total_pages"])
    assert float(values['opendeep_requests_total{route="/v1/completions",status="200"}']) >= 1
    assert float(values["opendeep_time_to_first_token_seconds_count"]) >= 1
    assert math.isfinite(float(values["opendeep_time_per_output_token_seconds_sum"]))


def test_the_page_loads_nothing_and_runs_nothing_but_itself(server):
    answer = server.client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'sha256-" in policy
    for forbidden in ("http://", "https://", "innerHTML", "onclick=", "style=", "eval("):
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert forbidden not in text, forbidden


def test_the_page_fits_a_phone(server):
    page = server.client.get("/").text
    assert re.search(r'name="viewport" content="[^"]*viewport-fit=cover[^"]*interactive-widget=resizes-content', page)
    assert "safe-area-inset-bottom" in page and "100dvh" in page
    # Safari enlarges the page at a field of less than 16 px, and gives no clipboard to one of plain http.
    assert re.search(r"#settings textarea,#settings input\{font-size:16px\}", page)
    assert re.search(r"try \{ await navigator\.clipboard.*\n.*catch \{", page) and "!touch && !event.shiftKey" in page
    assert "autofocus" not in page and page.count(".focus()") == 2  # unasked, it would open the keyboard
    assert re.search(r"header small\{[^}]*text-overflow:ellipsis", page) and "coarse){button{min-height:44px" in page


def test_a_client_that_goes_frees_its_pages():
    engine = EchoEngine(step_seconds=0.002, max_length=10**6)
    ask = {"prompt": "abc", "max_tokens": 10**5}
    with live(lambda: engine) as server:
        with server.client.stream("POST", "/v1/completions", json={**ask, "stream": True}) as response:
            next(response.iter_lines())
            assert len(engine.requests) == 1
        wait_for_nothing(server, engine)
        with pytest.raises(Exception, match="timed out"):
            server.post("/v1/completions", ask, timeout=0.3)  # not streaming, and gone just as well
        wait_for_nothing(server, engine)


def wait_for_nothing(server, engine) -> None:
    deadline = time.monotonic() + 5
    while (server.service.open_prompts or engine.requests) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.service.open_prompts and not engine.requests
    assert engine.stats.free_pages == engine.stats.total_pages


def test_a_stream_comes_token_by_token():
    with live(lambda: EchoEngine(step_seconds=0.02)) as server:
        times = []
        with server.client.stream(
            "POST", "/v1/completions", json={"prompt": "abcdef", "max_tokens": 20, "stream": True}
        ) as response:
            for line in response.iter_lines():
                times += [time.monotonic()] * bool(line)
        assert times[-1] - times[0] > 0.2


def test_draining_says_so_and_finishes_what_runs():
    with live(lambda: EchoEngine(step_seconds=0.01), drain_seconds=20) as server:
        found = {}

        def ask() -> None:
            found["answer"] = server.post("/v1/completions", {"prompt": "abc", "max_tokens": 60})

        asking = threading.Thread(target=ask)
        asking.start()
        while not server.service.open_prompts:
            time.sleep(0.005)
        server.end()
        while server.client.get("/ready").status_code == 200:
            time.sleep(0.005)
        assert server.client.get("/ready").json() == {"status": "draining"}
        assert server.client.get("/health").status_code == 200
        refused = server.post("/v1/completions", {"prompt": "abc"})
        assert refused.status_code == 503 and "Retry-After" in refused.headers
        asking.join(20)
        assert found["answer"].json()["usage"]["completion_tokens"] == 60
        server.thread.join(20)
        assert not server.thread.is_alive()


def test_draining_ends_long_answers_with_an_error_in_their_stream():
    with live(lambda: EchoEngine(step_seconds=0.005, max_length=10**6), drain_seconds=0.2) as server:
        ask = {"prompt": "abc", "max_tokens": 10**5, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=ask) as response:
            lines = response.iter_lines()
            next(lines)
            server.end()
            last = [line for line in lines if line][-1]
        assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_an_engine_failure_is_told_and_survived(caplog):
    def fail(requests):
        if any(request.params.seed == 13 for request in requests):
            raise FloatingPointError("thirteen")

    with live(lambda: EchoEngine(fail=fail, step_seconds=0.001)) as server:
        answer = server.post("/v1/completions", {"prompt": "a", "seed": 13})
        assert answer.status_code == 500 and "thirteen" in answer.json()["error"]["message"]
        assert server.client.get("/health").status_code == 503
        streamed = server.post("/v1/completions", {"prompt": "a", "seed": 13, "stream": True})
        assert "thirteen" in streamed.text and streamed.status_code == 200
        assert server.post("/v1/completions", {"prompt": "a", "seed": 12}).status_code == 200
        assert server.client.get("/health").status_code == 200


def test_a_full_server_says_when_to_come_back():
    with live(lambda: EchoEngine(slots=1, step_seconds=0.005, max_length=10**6), max_waiting=0) as server:
        ask = {"prompt": "abc", "max_tokens": 10**5, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=ask) as response:
            next(response.iter_lines())
            refused = server.post("/v1/completions", {"prompt": "abc"})
            assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"


def test_an_answer_that_takes_too_long_ends():
    config = ServerConfig(request_seconds=0.2)
    with live(lambda: EchoEngine(step_seconds=0.01, max_length=10**6), config=config) as server:
        ask = {"prompt": "abc", "max_tokens": 10**5}
        assert server.post("/v1/completions", ask).status_code == 504
        assert "longer than the server allows" in server.post("/v1/completions", {**ask, "stream": True}).text
        wait_for_nothing(server, server.service.engine)
