"""`/v1/responses` as OpenAI's own client reads it."""

import openai
import pytest
from live_server import chat_tokenizer, live
from test_conversation import THINKS, thinker


@pytest.fixture(scope="module")
def server():
    with live(lambda: thinker("Hm.</think>42"), tokenizer=chat_tokenizer(THINKS)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as made:
        yield made


def test_a_response_has_its_text_and_its_thinking(client):
    found = client.responses.create(model="echo", input="?", instructions="Be brief.", store=False, temperature=0.5)
    assert (found.output_text, found.status, found.temperature) == ("42", "completed", 0.5)
    assert [item.type for item in found.output] == ["reasoning", "message"]
    assert found.output[0].content[0].text == "Hm."
    assert found.usage.input_tokens == len("<system>Be brief.<user>?<assistant><think>")
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens


def test_a_stream_tells_the_same_response_in_order(client):
    events = list(client.responses.create(model="echo", input=[{"role": "user", "content": "?"}], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 2
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert (text, thought) == ("42", "Hm.") and events[-1].response.output_text == "42"
    with client.responses.stream(model="echo", input="?") as stream:
        assert stream.get_final_response().output_text == "42"


def test_an_answers_own_output_is_taken_as_the_next_input(client):
    first = client.responses.create(model="echo", input="?")
    again = [{"role": "user", "content": "?"}, *first.output, {"role": "user", "content": "!"}]
    assert client.responses.create(model="echo", input=again).output_text == "42"


def test_an_answer_that_is_cut_is_incomplete(client):
    found = client.responses.create(model="echo", input="?", max_output_tokens=2)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")


@pytest.mark.parametrize(
    "change, param",
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}}]}, "tools"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"background": True}, "background"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"temperature": 3}, "temperature"),
        ({"model": "other"}, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(server, change, param):
    answer = server.post("/v1/responses", {"input": "?"} | change)
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    assert answer.json()["error"]["param"].startswith(param)
