"""Whatever a client sends, it gets a clear 4xx in OpenAI's form, and the server goes on."""

import concurrent.futures
import contextlib
import json
import socket
import time

import httpx
import openai
import pytest
from fake_engine import EchoEngine
from live_server import chat_tokenizer, live

from opendeep_jax.serving.server import ServerConfig

KEY = "sésame 🔑"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server():
    with live(config=ServerConfig(max_body_bytes=100_000)) as running:
        yield running
        answer = running.post(COMPLETIONS, {"prompt": "abc", "max_tokens": 2})
        assert answer.status_code == 200, "the server outlived none of it"


def error_of(answer: httpx.Response, status: int) -> dict:
    """The error of an answer, in the one form that all have."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    "path, body, status, words",
    [
        (COMPLETIONS, b"", 400, "Invalid JSON"),
        (COMPLETIONS, b"{", 400, "Invalid JSON"),
        (COMPLETIONS, b"null", 400, "object"),
        (COMPLETIONS, b'{"prompt": "a" "b"}', 400, "Invalid JSON"),
        (COMPLETIONS, b'{"prompt": "\xff\xfe"}', 400, "unicode"),
        (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, "Invalid JSON"),
        (COMPLETIONS, b"[" * 90_000, 400, "recursion limit"),
        (COMPLETIONS, b'{"prompt": "a", "metadata": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001, 400, "recursion"),
        (COMPLETIONS, b'{"prompt": "a", "seed": 1' + b"0" * 50_000 + b"}", 400, "out of range"),
        (CHAT, b'{"messages": [' + b"{}," * 30_000 + b"{}]}", 400, "messages"),
        (CHAT, b"{" + b",".join(b'"a%d":1' % i for i in range(9_000)) + b"}", 400, "messages: Field required"),
    ],
)
def test_what_is_no_json_object_is_refused(server, path, body, status, words):
    assert words in error_of(server.post(path, content=body, headers=JSON), status)["message"]


@pytest.mark.parametrize(
    "field, literal",
    [
        ("temperature", "NaN"),
        ("temperature", "Infinity"),
        ("temperature", "1e999"),
        ("temperature", "-0.1"),
        ("temperature", "2.1"),
        ("temperature", '"1"'),
        ("top_p", "0"),
        ("top_p", "1.01"),
        ("top_p", "-Infinity"),
        ("top_k", "-2"),
        ("top_k", "1.5"),
        ("top_k", "99999999999"),
        ("min_p", "-1"),
        ("min_p", "NaN"),
        ("n", "0"),
        ("n", "129"),
        ("n", "1000000000000000000000"),
        ("n", "true"),
        ("max_tokens", "-1"),
        ("max_tokens", "0"),
        ("max_tokens", "1e3"),
        ("max_tokens", "99999999999999999999"),
        ("seed", "1.5"),
        ("seed", "18446744073709551616"),
        ("stop", '""'),
        ("stop", '["a", ""]'),
        ("stop", "[" + ",".join(['"a"'] * 17) + "]"),
        ("stop", '"' + "a" * 1001 + '"'),
        ("logprobs", "21"),
        ("logprobs", "-1"),
        ("stream", '"yes"'),
        ("stream_options", '{"include_usage": true}'),
        ("presence_penalty", "2.5"),
        ("frequency_penalty", "-2.1"),
        ("logit_bias", '{"1": 101}'),
        ("logit_bias", '{"hello": 1}'),
        ("logit_bias", '{"262": 1}'),
        ("repetition_penalty", "0"),
        ("stop_token_ids", "[262]"),
        ("min_tokens", "-1"),
        ("suffix", '"}"'),
        ("length_penalty", "2"),
        ("use_beam_search", "true"),
        ("guided_json", "{}"),
        ("web_search_options", "{}"),
        ("best_of", "3"),
        ("unheard_of", "1"),
        ("prompt", "[]"),
        ("prompt", "[[]]"),
        ("prompt", "[-1]"),
        ("prompt", "[1.5]"),
        ("prompt", '[1, "a"]'),
        ("prompt", "[4294967296]"),
        ("prompt", "[262]"),
        ("prompt", '{"a": 1}'),
        ("prompt", "[" + ",".join(['"a"'] * 129) + "]"),
        ("model", '"other"'),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_its_name(server, field, literal):
    body = {"prompt": '"a"', field: literal}
    text = "{" + ", ".join(f'"{name}": {value}' for name, value in body.items()) + "}"
    error = error_of(server.post(COMPLETIONS, content=text.encode(), headers=JSON), 404 if field == "model" else 400)
    assert error["param"] == field
    assert len(error["message"]) < 600


@pytest.mark.parametrize(
    "change, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages.0.content"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "tool", "tool_call_id": "a", "content": "5"}]}, "messages"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
         "messages.0.content"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": {"b": 1}}}, "chat_template_kwargs.a"),
    ],
)  # fmt: skip
def test_a_conversation_that_cannot_be_is_refused_by_its_field(server, change, param):
    body = {"messages": [{"role": "user", "content": "hi"}]} | change
    assert error_of(server.post(CHAT, body), 400)["param"].startswith(param)


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(server):
    error = error_of(server.post(COMPLETIONS, {"prompt": "a" * 600}), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert "512" in error["message"] and "601" in error["message"]
    error_of(server.post(CHAT, {"messages": [{"role": "user", "content": "a" * 600}]}), 400)
    # What just fits is answered.
    assert server.post(COMPLETIONS, {"prompt": "a" * 411, "max_tokens": 100}).status_code == 200


def test_an_empty_prompt_of_a_model_without_a_beginning_is_refused():
    import dataclasses

    tokenizer = dataclasses.replace(chat_tokenizer(), add_begin=False)
    with live(tokenizer=tokenizer) as server:
        assert error_of(server.post(COMPLETIONS, {"prompt": ""}), 400)["param"] == "prompt"


def test_a_long_body_is_refused_whatever_its_length_claims(server):
    body = json.dumps({"prompt": "a" * 200_000}).encode()
    assert error_of(server.post(COMPLETIONS, content=body, headers=JSON), 413)["code"] == "body_too_long"
    chunks = (b" " * 10_000 for _ in range(1000))  # no Content-Length at all
    assert error_of(server.post(COMPLETIONS, content=chunks, headers=JSON), 413)["code"] == "body_too_long"
    assert b" 413 " in raw(server, b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999\r\n")


def raw(server, head: bytes, body: bytes = b"") -> bytes:
    """What the server says to bytes as they are; what has come when it hangs up on bytes that it did not want."""
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        said = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(head + b"Host: x\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n" + body)
            while part := connection.recv(1 << 16):
                said += part
        return said


def test_a_length_that_lies_hurts_nobody(server):
    said = raw(server, b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\n", b'{"prompt": "' + b"a" * 300_000)
    # The rest of the body is left unread, and the system may then drop the answer with the connection.
    assert said == b"" or b" 400 " in said
    assert server.client.get("/health").status_code == 200
    assert b" 400 " in raw(server, b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n")
    assert b" 400 " in raw(server, b"GARBAGE\r\n")


def test_a_body_that_does_not_come_is_not_waited_for_forever():
    with live(config=ServerConfig(body_seconds=0.2)) as server:
        assert b" 408 " in raw(server, b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n", b"{")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", "echo/", "echo%2f..", "a" * 5000, "%ff", "echo%20"]
)
def test_names_of_models_are_only_ever_compared(server, name):
    error = error_of(server.client.get(f"/v1/models/{name}"), 404)
    assert "root:" not in error["message"] and len(error["message"]) < 300
    error_of(server.post(COMPLETIONS, {"prompt": "a", "model": name}), 404)


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/nowhere", 404),
        ("GET", "/v1/", 404),
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/../opendeep_jax/serving/page.html", 404),
    ],
)
def test_other_addresses_and_methods_have_errors_of_the_same_form(server, method, path, status):
    error_of(server.client.request(method, path), status)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_another_web_page_could_send_unasked_is_refused(server, kind):
    headers = {"Content-Type": kind} if kind else {}
    answer = server.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)
    error_of(answer, 415)
    assert "access-control-allow-origin" not in answer.headers


def test_a_wrong_key_is_refused_and_the_right_one_taken():
    with live(config=ServerConfig(api_key=KEY)) as server:
        right = f"Bearer {KEY}".encode()
        wrong = [b"", b"Bearer", b"Bearer x", right + b"x", right[:-1], b"Basic " + KEY.encode(), b"\xff"]
        for path in ("/v1/models", "/v1/nowhere", "/v1/models/echo"):
            error_of(server.client.get(path), 401)
            for header in wrong:
                answer = server.client.get(path, headers={"Authorization": header})
                assert error_of(answer, 401)["code"] == "invalid_api_key"
        error_of(server.post(COMPLETIONS, {"prompt": "a"}), 401)
        assert server.client.get("/v1/models", headers={b"Authorization": right}).status_code == 200
        for path in ("/", "/health", "/ready", "/metrics"):
            assert server.client.get(path).status_code == 200
        with openai.OpenAI(base_url=f"{server.address}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                client.completions.create(model="echo", prompt="a")


def test_a_name_that_was_made_to_point_here_is_not_answered_to():
    with live(config=ServerConfig(hosts=("127.0.0.1", "[::1]"))) as server:
        assert server.post(COMPLETIONS, {"prompt": "a"}).status_code == 200
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
            error_of(server.post(COMPLETIONS, {"prompt": "a"}, headers={"Host": host}), 421)
        for host in ("127.0.0.1", "127.0.0.1:80", "[::1]:8000"):
            assert server.post(COMPLETIONS, {"prompt": "a"}, headers={"Host": host}).status_code == 200


def test_a_template_that_refuses_a_conversation_is_the_clients_error():
    tokenizer = chat_tokenizer("{{ raise_exception('roles must take turns') }}")
    with live(tokenizer=tokenizer) as server:
        error = error_of(server.post(CHAT, {"messages": [{"role": "user", "content": "hi"}]}), 400)
        assert "roles must take turns" in error["message"]


def test_64_clients_at_once_are_all_answered_and_leave_nothing_behind():
    engine = EchoEngine(slots=16, step_seconds=0.001)
    with live(lambda: engine, max_waiting=64) as server:
        errors = []

        def client(number: int) -> int:
            asked = 0
            with httpx.Client(base_url=server.address, timeout=30) as http:
                until = time.monotonic() + 2.5
                while time.monotonic() < until:
                    ask = {"prompt": f"number {number} ", "max_tokens": 8 + number % 20, "stream": number % 2 == 0}
                    if number % 8 == 7:  # some leave in the middle
                        with http.stream("POST", COMPLETIONS, json=ask | {"stream": True}) as response:
                            next(response.iter_lines())
                    else:
                        answer = http.post(COMPLETIONS, json=ask)
                        expected = f"number {number}"[: 7 + number % 20]
                        if answer.status_code != 200 or expected not in text_of(answer):
                            errors.append(answer.text)
                    asked += 1
            return asked

        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            asked = list(pool.map(client, range(64)))
        assert errors == [] and min(asked) >= 1
        deadline = time.monotonic() + 5
        while (server.service.open_prompts or engine.requests) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.requests == [] and server.service.open_prompts == 0 and not server.service._running
        assert engine.stats.free_pages == engine.stats.total_pages


def text_of(answer: httpx.Response) -> str:
    """The text of a completion, streamed or not."""
    if answer.headers["content-type"].startswith("application/json"):
        return answer.json()["choices"][0]["text"]
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
