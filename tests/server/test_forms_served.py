"""Forms of answers over HTTP, under OpenAI's names and vLLM's, with OpenAI's own client."""

import json
from typing import Literal

import openai
import pytest
from jsonschema_rs import is_valid
from pydantic import BaseModel

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["complaint", "praise"]}, "urgent": {"type": "boolean"}},
    "required": ["kind", "urgent"],
    "additionalProperties": False,
}
CHOICES = ["red", "green", "no colour"]
TEXT = "Where is my parcel, it is two weeks late"


class Colour(BaseModel):
    name: Literal["red", "green"]
    dark: bool


@pytest.fixture(scope="module")
def ai(chat_server):
    return chat_server.openai()


def of_schema(text):
    return is_valid(SCHEMA, json.loads(text))


@pytest.mark.parametrize(
    ("more", "holds"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, of_schema),
        ({"response_format": {"type": "choice", "choices": CHOICES}}, CHOICES.__contains__),
        (
            {"response_format": {"type": "regex", "regex": "[0-9]{4}"}},
            lambda text: len(text) == 4 and text.isdigit(),
        ),
        ({"guided_choice": CHOICES}, CHOICES.__contains__),
        ({"guided_regex": "a{3}"}, "aaa".__eq__),
        pytest.param({"guided_json": SCHEMA}, of_schema, marks=pytest.mark.slow),
        ({"guided_json": json.dumps(SCHEMA)}, of_schema),
        ({"structured_outputs": {"choice": CHOICES}}, CHOICES.__contains__),
        pytest.param({"structured_outputs": {"json": SCHEMA}}, of_schema, marks=pytest.mark.slow),
        ({"structured_outputs": {"regex": "b+", "json": None}}, lambda text: not text.strip("b")),
        ({"response_format": {"type": "text"}, "guided_choice": CHOICES}, CHOICES.__contains__),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1.2])
def test_completions_and_chats_have_the_form(ai, more, holds, temperature):
    settings = {"model": "writer", "max_tokens": 60, "temperature": temperature, "seed": 3, "extra_body": more}
    chat = ai.chat.completions.create(messages=[{"role": "user", "content": TEXT}], **settings)
    assert holds(chat.choices[0].message.content), chat
    whole = ai.completions.create(prompt=TEXT, **settings).choices[0]
    assert holds(whole.text), whole
    pieces = ai.completions.create(prompt=TEXT, stream=True, **settings)
    assert "".join(each.choices[0].text for each in pieces) == whole.text


def test_the_clients_own_parser_is_given_what_it_expects(ai):
    found = ai.chat.completions.parse(
        model="writer",
        messages=[{"role": "user", "content": TEXT}],
        response_format=Colour,
        max_tokens=100,
        temperature=0.5,
        seed=1,
    )
    assert isinstance(found.choices[0].message.parsed, Colour)
    held = ai.chat.completions.create(
        model="writer",
        messages=[{"role": "user", "content": TEXT}],
        response_format={"type": "json_object"},
        seed=1,
    )
    assert held.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"response_format": {"type": "json_schema"}}, "needs json_schema beside type"),
        ({"response_format": {"type": "choice"}}, "needs choices beside type"),
        ({"response_format": {"type": "grammar"}}, r"response_format\.type takes"),
        ({"response_format": {"type": "regex", "regex": "(a"}}, "unclosed group"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"guided_json": 3}, "guided_json takes a JSON schema, as an object or its text; got 3"),
        ({"guided_choice": []}, "guided_choice takes a list of at least 1"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice and guided_regex ask for several forms"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "ask for several forms"),
        ({"structured_outputs": {"grammar": "x"}}, r"structured_outputs\.grammar is not known here"),
        ({"guided_choice": ["a"], "min_tokens": 3}, "leave min_tokens out"),
        ({"guided_regex": "a" * 70_000}, "at most 65,536 characters"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(ai, more, told):
    with pytest.raises(openai.BadRequestError, match=told) as raised:
        ai.completions.create(model="writer", prompt=TEXT, extra_body=more)
    assert "\n" not in raised.value.body["message"]
