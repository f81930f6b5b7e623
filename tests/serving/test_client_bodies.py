"""Requests that ordinary clients make: what has no effect is taken, null is not given, a browser may ask first."""

import time

import openai
import pytest
from fake_engine import EchoEngine
from live_server import chat_tokenizer, live
from test_conversation import thinker

from opendeep_jax.serving.server import ServerConfig

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASK = [{"role": "user", "content": "hi"}]
MINE = {"content": "Yes", "refusal": None, "role": "assistant", "annotations": None, "audio": None,
        "function_call": None, "tool_calls": None, "reasoning_content": "Hm."}  # fmt: skip
CLIENTS = {
    "an answer's model_dump() as the next message": {"messages": [*ASK, MINE, *ASK]},
    "an answer of another server's": {"messages": [*ASK, MINE | {"reasoning": "Hm.", "annotations": [],
        "tool_calls": [], "provider_specific_fields": {"a": 1}}, *ASK]},
    "null means not given": dict.fromkeys(("web_search_options", "tools", "stop", "n", "logit_bias", "audio"), None),
    "langchain-openai": {"stream": False, "n": 1, "temperature": 0.7, "stop": ["\n\n"]},
    "litellm": {"user": "me", "metadata": {"a": "b"}, "max_tokens": 4, "parallel_tool_calls": True},
    "Vercel's AI SDK": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 4},
    "instructor, asking for JSON in words": {"messages": [{"role": "system", "content": "As JSON."}, *ASK]},
    "Anthropic's caching marks": {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]}]},
    "vLLM's settings at rest": {"repetition_penalty": 1.0, "length_penalty": 1.0, "skip_special_tokens": True,
        "use_beam_search": False, "add_generation_prompt": True, "min_tokens": 0, "stop_token_ids": []},
    "about the request": {"prompt_cache_key": "a", "safety_identifier": "b", "store": False, "service_tier": "auto"},
    "what it does anyway": {"modalities": ["text"], "response_format": {"type": "text"}, "tool_choice": "none",
        "tools": [], "verbosity": "medium", "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
    "lm-eval's local-chat-completions": {"max_tokens": 256, "temperature": 0, "stop": ["Q:", "\n"], "seed": 1234},
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with live() as running:
        yield running


@pytest.mark.parametrize("body", CLIENTS.values(), ids=CLIENTS)
def test_what_clients_send_is_taken(server, body):
    answer = server.post(CHAT, {"model": "echo", "messages": ASK} | body)
    assert answer.status_code == 200, answer.text


def test_a_stream_may_ask_for_no_padding(server):
    options = {"include_usage": True, "include_obfuscation": False}
    assert server.post(CHAT, {"messages": ASK, "stream": True, "stream_options": options}).status_code == 200


def test_penalties_bias_and_ends_reach_the_engine(server):
    seen, engine = [], server.service.engine
    submit = engine.submit
    engine.submit = lambda prompt, params: (seen.append(params), submit(prompt, params))[1]
    asked = {"frequency_penalty": 0.5, "presence_penalty": -1, "repetition_penalty": 1.2, "min_tokens": 2}
    try:
        server.post(COMPLETIONS, {"prompt": "a", "logit_bias": {"97": -100}, "stop_token_ids": [98], **asked})
    finally:
        del engine.submit
    (params,) = seen
    assert {name: getattr(params, name) for name in asked} == asked
    assert params.logit_bias == ((97, -100.0),) and params.end_ids == (*chat_tokenizer().end_ids, 98)


def test_more_tokens_than_the_context_leaves_are_cut_to_it(server):
    for field in ("max_tokens", "max_completion_tokens"):
        answer = server.post(CHAT, {"messages": ASK, field: 32_000}).json()
        assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] == 512
    answer = server.post(COMPLETIONS, {"prompt": "abc", "max_tokens": 10**6}).json()
    assert answer["usage"]["total_tokens"] == 512


def test_the_models_own_sampling_stands_where_a_request_says_nothing():
    seen = []

    class Noting(EchoEngine):
        def submit(self, prompt, params):
            seen.append((params.temperature, params.top_k, params.top_p))
            return super().submit(prompt, params)

    with live(Noting, defaults={"temperature": 0.6, "top_k": 20}) as server:
        server.post(CHAT, {"messages": ASK, "max_tokens": 1})
        server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1, "temperature": 0, "top_k": -1, "top_p": 0.5})
    assert seen == [(0.6, 20, 1.0), (0.0, 0, 0.5)]


def test_a_page_of_a_named_origin_may_call_and_others_may_not():
    page = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    with live(config=ServerConfig(api_key="key", origins=("https://chat.example",))) as server:
        asked = server.client.options(CHAT, headers=page)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://chat.example"
        assert "authorization" in asked.headers["access-control-allow-headers"]
        refused = server.post(CHAT, {"messages": ASK}, headers=page)
        assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers  # it can read why
        other = server.client.options(CHAT, headers=page | {"Origin": "https://evil.example"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


SLOW = "{% for m in messages %}{% if 'slow' in m.content %}{% for i in range(99999) %}{% for j in range(99999) %}\
{% endfor %}{% endfor %}{% endif %}{{ m.content }}{% endfor %}"


def test_slow_templates_end_by_the_timeout_and_hold_nobody_up():
    with live(tokenizer=chat_tokenizer(SLOW), config=ServerConfig(request_seconds=0.3)) as server:
        import concurrent.futures

        slow = {"messages": [{"role": "user", "content": "slow"}]}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            waiting = [pool.submit(server.post, CHAT, slow) for _ in range(7)]
            time.sleep(0.05)
            assert server.post(COMPLETIONS, {"prompt": "hi", "max_tokens": 1}).status_code == 200
            assert server.client.get("/health").status_code == 200
        assert [each.result().status_code for each in waiting] == [504] * 7
        deadline = time.monotonic() + 10
        while server.post(CHAT, {"messages": ASK, "max_tokens": 1}).status_code != 200:
            assert time.monotonic() < deadline


HARMONY = "{% if tools %}{{ tools|tojson }}{% endif %}{% for m in messages %}<|start|>{{ m.role }}<|message|>\
{{ m.content }}{{ m.tool_calls|tojson if m.tool_calls }}<|end|>{% endfor %}<|start|>assistant{# <|channel|> #}"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
SAYS = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>One moment.<|end|>"
    '<|start|>assistant to=functions.add<|channel|>commentary <|constrain|>json<|message|>{"a": 1}<|call|>'
)


def test_a_tool_call_of_gpt_oss_comes_back_as_one_and_is_taken_again():
    with live(lambda: thinker(SAYS, max_length=2000), tokenizer=chat_tokenizer(HARMONY)) as server:
        with openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as client:
            found = client.chat.completions.create(model="echo", messages=ASK, tools=[TOOL]).choices[0]
            call = found.message.tool_calls[0]
            assert (call.function.name, call.function.arguments) == ("add", '{"a": 1}')
            assert (found.message.content, found.finish_reason) == ("One moment.", "tool_calls")
            assert found.message.model_dump()["reasoning_content"] == "Hm."
            result = {"role": "tool", "tool_call_id": call.id, "content": "5"}
            again = [*ASK, found.message.model_dump(), result]
            stream = client.chat.completions.create(model="echo", messages=again, tools=[TOOL], stream=True)
            chunks = [chunk.choices[0] for chunk in stream]
            pieces = [piece for chunk in chunks for piece in chunk.delta.tool_calls or ()]
            assert pieces[0].id and pieces[0].function.name == "add"
            assert "".join(piece.function.arguments for piece in pieces) == '{"a": 1}'
            assert chunks[-1].finish_reason == "tool_calls"
            tool = {"type": "function", "name": "add", "parameters": {}}
            output = client.responses.create(model="echo", input="?", tools=[tool]).output
            assert [item.type for item in output] == ["reasoning", "message", "function_call"]
            assert output[2].arguments == '{"a": 1}'
