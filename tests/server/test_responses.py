"""``/v1/responses`` with OpenAI's own client: the answers of the other interfaces, whole and as events."""

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from softprompt.server.unserved import RESPONSES

TEXT = "Where is my parcel, it is two weeks late"
CHAT = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": TEXT}]


class Colour(BaseModel):
    name: Literal["red", "green"]
    dark: bool


@pytest.fixture(scope="module")
def ai(chat_server):
    return chat_server.openai()


def test_a_response_is_the_chats_answer(ai):
    chat = ai.chat.completions.create(model="writer", messages=CHAT, max_tokens=9, temperature=0)
    for asked in ({"input": TEXT, "instructions": "Be kind"}, {"input": CHAT}):
        found = ai.responses.create(model="writer", max_output_tokens=9, temperature=0, **asked)
        assert found.output_text == chat.choices[0].message.content
        assert found.status == {"stop": "completed", "length": "incomplete"}[chat.choices[0].finish_reason]
        assert found.usage.input_tokens == chat.usage.prompt_tokens
        assert found.usage.output_tokens == chat.usage.completion_tokens
        assert found.usage.total_tokens == chat.usage.total_tokens
        assert found.usage.virtual_tokens == 3
        assert (found.object, found.model, found.error) == ("response", "writer", None)
        assert found.id.startswith("resp_")


def test_a_stream_is_the_same_in_events(ai):
    ask = {"model": "writer", "input": CHAT, "max_output_tokens": 12, "temperature": 0}
    whole = ai.responses.create(**ask)
    events = list(ai.responses.create(**ask, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", whole.status),
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type.endswith("delta")) == whole.output_text
    last = events[-1].response
    assert last.output_text == whole.output_text
    assert last.usage == whole.usage
    assert events[0].response.id == last.id
    assert events[0].response.usage is None
    with ai.responses.stream(**ask) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == whole.output_text


def test_a_cut_answer_says_why(ai):
    found = ai.responses.create(model="writer", input=TEXT, max_output_tokens=1, temperature=0)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_events_are_named_for_other_clients(chat_server):
    body = {"model": "writer", "input": TEXT, "max_output_tokens": 2, "stream": True}
    with chat_server.client() as client:
        blocks = client.post("/v1/responses", json=body).text.strip().split("\n\n")
    assert blocks.pop() == "data: [DONE]"
    for block in blocks:
        name, data = block.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_an_answer_goes_on_as_the_next_input(ai):
    first = ai.responses.create(model="writer", input=CHAT, max_output_tokens=4, temperature=0)
    asked = [*CHAT, *(each.model_dump() for each in first.output), {"role": "user", "content": "And now?"}]
    found = ai.responses.create(model="writer", input=asked, max_output_tokens=4, temperature=0)
    messages = [*CHAT, {"role": "assistant", "content": first.output_text}, asked[-1]]
    chat = ai.chat.completions.create(model="writer", messages=messages, max_tokens=4, temperature=0)
    assert found.output_text == chat.choices[0].message.content
    assert found.usage.input_tokens == chat.usage.prompt_tokens


def test_the_form_of_an_answer(ai):
    found = ai.responses.parse(model="writer", input=TEXT, text_format=Colour, max_output_tokens=60, temperature=0)
    assert isinstance(found.output_parsed, Colour)
    chosen = ai.responses.create(
        model="writer", input=TEXT, extra_body={"text": {"format": {"type": "choice", "choices": ["a", "b"]}}}
    )
    assert chosen.output_text in ("a", "b")


def test_without_a_chat_template_one_text_is_put_as_the_prompt_puts_it(server):
    ai = server.openai()
    found = ai.responses.create(model="complaints", input=TEXT, max_output_tokens=5, temperature=0)
    same = ai.completions.create(model="complaints", prompt=TEXT, max_tokens=5, temperature=0)
    assert found.output_text == same.choices[0].text
    for asked in ({"input": CHAT}, {"input": TEXT, "instructions": "Be kind"}):
        with pytest.raises(openai.BadRequestError, match="no chat template; send one text as input"):
            ai.responses.create(model="complaints", **asked)


ASKING = {
    "access_programs": {"cyber": "standard"},
    "background": True,
    "context_management": [{"type": "compaction"}],
    "conversation": "c",
    "image": {"context_compression": "auto"},
    "include": ["message.output_text.logprobs"],
    "previous_response_id": "resp_1",
    "prompt": {"id": "p"},
    "reasoning": {"effort": "high"},
    "tools": [{"type": "web_search"}],
    "top_logprobs": 3,
    "truncation": "auto",
    "store": True,
}


@pytest.mark.parametrize("name", ASKING)
def test_what_is_not_served_is_refused_by_name(ai, name):
    with pytest.raises(openai.BadRequestError, match=f"^Error code: 400.*{name} is not served"):
        ai.responses.create(model="writer", input=TEXT, extra_body={name: ASKING[name]})


def test_defaults_that_clients_send_are_taken(ai):
    every = {name: values[0] if values else None for name, values in RESPONSES.items()}
    found = ai.responses.create(
        **every,
        **{"model": "writer", "input": TEXT, "max_output_tokens": 2, "metadata": {"a": "b"}, "store": False},
        **{"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "text": {"verbosity": "medium"}},
        **{"service_tier": "auto", "stream_options": {"include_obfuscation": False}},
    )
    assert found.output_text is not None
    assert set(ASKING) >= {name for name, values in RESPONSES.items() if values is not None}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"input": []}, "input takes a text, or a list of messages"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input takes"),
        ({"input": TEXT, "n": 2}, "n is 1 here"),
        (
            {"input": TEXT, "text": {"format": {"type": "json_schema", "name": "x"}}},
            "needs json_schema beside type",
        ),
        (
            {
                "input": TEXT,
                "text": {"format": {"type": "json_object"}},
                "response_format": {"type": "json_object"},
            },
            "text.format and response_format are the same thing; send one",
        ),
        ({}, "input is missing"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(chat_server, more, told):
    with chat_server.client() as client:
        reply = client.post("/v1/responses", json={"model": "writer", **more})
    assert reply.status_code == 400
    assert told in reply.json()["error"]["message"]


def test_an_error_in_a_stream_is_raised_by_the_client(base, shared_prompts):
    from oracles.serving import ScriptedBatcher, app_over, running
    from softprompt.errors import ServingError

    class Failing(ScriptedBatcher):
        def answer(self, ticket):
            ticket.push(self.token(5))
            ticket.push(error=ServingError("the model failed"))

    with running(app_over(base, shared_prompts, Failing(auto=True))) as server:
        with pytest.raises(openai.APIError, match="the model failed"):
            list(server.openai().responses.create(model="writer", input=TEXT, stream=True))
