"""Bodies made to be costly: what reading one takes is linear in its bytes, for every endpoint."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from pydantic import ValidationError

from oracles.slow import only
from softprompt.server.chat import ChatBody
from softprompt.server.classify import ClassifyBody
from softprompt.server.completions import CompletionBody
from softprompt.server.embeddings import EmbeddingsBody
from softprompt.server.errors import refusal
from softprompt.server.responses import ResponsesBody

BODIES = {
    CompletionBody: ("prompt", "fields", "stop", "guided_choice", "guided_json", "response_format", "logprobs"),
    ChatBody: ("messages", "stop", "structured_outputs", "response_format"),
    ResponsesBody: ("input", "text", "instructions"),
    ClassifyBody: ("input", "fields", "labels"),
    EmbeddingsBody: ("input", "dimensions"),
}
COUNT = 1_000
ITEMS = ["[]", "{}", "0", '""', "null", "-1", "[[]]", '{"":0}', "1e9", '"\\u00e9"', '{"type":[],"role":{}}']
BYTES_PER_BYTE = 60
"""An empty list is 3 bytes of JSON, and 64 in Python."""


def hostile(name: str) -> list[str]:
    """Return bodies that hold very many small things under a name, or beside it."""
    lists = [f"[{','.join([item] * COUNT)}]" for item in ITEMS]
    named = "{" + ",".join(f'"{number}":[]' for number in range(COUNT)) + "}"
    inside = [f'{{"content":{each},"role":"user","choices":{each},"format":{each}}}' for each in lists[:4]]
    values = [*lists, named, *inside, *(f"[{each}]" for each in inside), f"[{named}]"]
    return [*(f'{{"model":"m","{name}":{value}}}' for value in values), f'{{"model":"m",{named[1:]}']


@pytest.mark.parametrize(
    ("body", "name"),
    only(
        [(CompletionBody, "guided_json"), *((body, names[0]) for body, names in BODIES.items())],
        [(body, name) for body, names in BODIES.items() for name in names],
    ),
)
def test_memory_is_linear_in_the_bytes_of_a_body(body, name):
    for text in hostile(name):
        tracemalloc.start()
        value = json.loads(text)
        try:
            body.model_validate(value)
        except ValidationError as error:
            errors = error.errors()
            assert len(errors) < 20, text[:60]
            problem = refusal([{**each, "loc": ("body", *each["loc"])} for each in errors], value, [], {})
            assert len(str(problem)) < 400
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < BYTES_PER_BYTE * len(text), text[:60]


def test_every_body_of_the_server_is_here():
    from softprompt.server.protocol import Body, SamplingBody

    assert {*Body.__subclasses__(), *SamplingBody.__subclasses__()} - {SamplingBody} == {*BODIES}
