"""What is wrong with a request is said in one line: where, what was expected, and what came."""

import typing

import pytest
from pydantic import BaseModel

from oracles.serving import ScriptedBatcher, app_over, running, write_prompt
from softprompt.server.chat import ChatBody, Message
from softprompt.server.classify import ClassifyBody
from softprompt.server.completions import CompletionBody
from softprompt.server.errors import CHOICES

COMPLETIONS, CHAT, CLASSIFY = "/v1/completions", "/v1/chat/completions", "/v1/classify"
PROMPT = (
    "prompt takes a text, token ids from 0 up, or a list of up to 2,048 texts or token id lists, none empty; got "
)
STOP = "stop takes a text, or up to 16 texts, each of 1 to 200 characters; got "
CONTENT = 'a text, or a list of parts {"type": "text", "text": ...}'
NO_OBJECT = "expected a JSON object in the body, and the header 'Content-Type: application/json'; got "


def message(found, status=400):
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert "\n" not in error["message"]
    assert len(found.content) < 500, "what came is not sent back whole"
    return error["message"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"temperature": "hot"}, 'temperature takes a number; got "hot"'),
        ({"temperature": -1}, "temperature takes a number of at least 0; got -1"),
        ({"top_p": 0}, "top_p takes a number above 0; got 0"),
        ({"max_tokens": 2e9}, "max_tokens takes a number of at most 1,048,576; got 2000000000.0"),
        ({"max_tokens": 1.5}, "max_tokens takes a whole number; got 1.5"),
        ({"stream": "yes"}, 'stream takes true or false; got "yes"'),
        ({"model": 3}, "model takes a text; got 3"),
        ({"prompt": ["x", 1]}, PROMPT + '["x", 1]'),
        ({"prompt": [-1]}, PROMPT + "[-1]"),
        ({"prompt": []}, PROMPT + "[]"),
        ({"prompt": {"tensor": 1}}, PROMPT + '{"tensor": 1}'),
        ({"stop": ["x"] * 17}, STOP + "a list of 17"),
        ({"stop": "x" * 5000}, STOP + '"' + "x" * 63 + "..."),
        ({"suffix": "x"}, "suffix is not served; leave it out"),
        ({"temprature": 1}, "temprature is not known here (did you mean 'temperature'?); leave it out"),
        ({"labels": ["a"]}, "labels is not known here; leave it out"),
        ({"x" * 3000: 1}, "x" * 64 + "... is not known here; leave it out"),
        ({"stream_options": {"x": 1}}, "stream_options.x is not known here; leave it out"),
        ({"task": [1]}, "task takes the name or number of a task; got [1]"),
        ({"task": "sort"}, "the prompt 'writer' has no task 'sort', as it has no tasks; leave task out"),
        ({"model": "pairs"}, 'the template of \'pairs\' has several fields, so one text is not enough; '
                             'send fields {"first": "...", "second": "..."} instead'),
        ({"prompt": None, "fields": {"input": "x"}, "raw": True}, "raw takes prompt as it is; leave fields out"),
        ({"model": "demo", "prompt": None, "fields": {"input": "x"}},
         "the base model has no template; send its text as prompt"),
    ],
)  # fmt: skip
def test_completions(client, change, expected):
    body = {"model": "writer", "prompt": "x", **change}
    assert message(client.post(COMPLETIONS, json=body)) == expected


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages takes a list of at least 1; got []"),
        ("hi", 'messages takes a list; got "hi"'),
        ([{"role": "user"}], f"messages[0].content is missing; send {CONTENT}"),
        ([{"role": "user", "content": 3}], f"messages[0].content takes {CONTENT}; got 3"),
        (
            [{"role": "user", "content": "x"}, {"role": "A", "content": "x"}],
            'messages[1].role takes one such as "user", of small letters and underscores; got "A"',
        ),
    ],
)
def test_chats(client, messages, expected):
    body = {"model": "writer", "messages": messages}
    assert message(client.post(CHAT, json=body)) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"max_tokens": 3, "max_completion_tokens": 4},
            "max_tokens and max_completion_tokens are the same thing; send one",
        ),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs=true"),
    ],
)
def test_settings_of_chats_that_contradict_each_other(client, change, expected):
    body = {"model": "writer", "messages": [{"role": "user", "content": "x"}], **change}
    assert message(client.post(CHAT, json=body)) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"input": [3]}, "input takes a text, or a list of texts; got [3]"),
        ({"labels": ["a", ""]}, 'labels[1] takes a text of 1 or more characters; got ""'),
        ({"labels": ["x"] * 1001}, "labels takes a list of at most 1,000; got a list of 1,001"),
    ],
)
def test_classify(client, change, expected):
    body = {"model": "complaints", "input": "x", **change}
    assert message(client.post(CLASSIFY, json=body)) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", NO_OBJECT + "nothing"),
        (b"null", NO_OBJECT + "null"),
        (b"[1]", NO_OBJECT + "[1]"),
        (
            b"{}",
            "model is missing; send the name of a prompt, or of the base; GET /v1/models lists them",
        ),
        (b"{", "the body is not JSON (Expecting property name enclosed in double quotes)"),
        (b'{"a": "\\ud800"}', "the body cannot be read: there is half of a character"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the body cannot be read as JSON"),
        ('{"prompt": "é"}'.encode("latin-1"), "the body cannot be read as JSON in UTF-8"),
    ],
)
def test_bodies(client, body, expected):
    found = client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert message(found).startswith(expected)
    plain = client.post(COMPLETIONS, content=b'{"model": "writer"}')
    assert message(plain) == NO_OBJECT + "19 bytes"


def test_every_field_of_several_kinds_is_described():
    """Of a union pydantic tells all branches, which nobody can read."""
    bodies = (CompletionBody, ChatBody, ClassifyBody, Message)
    for name, field in ((n, f) for body in bodies for n, f in body.model_fields.items()):
        kinds = [k for k in typing.get_args(field.annotation) if k is not type(None)]
        models = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        # What is left of X | None and of Annotated has one kind.
        if typing.get_origin(field.annotation) is not list and len(kinds) > 1 and not models:
            assert name in CHOICES, name


@pytest.mark.parametrize("path", [COMPLETIONS, CLASSIFY])
def test_a_near_miss_is_told_what_is_listed(client, path):
    ask = {"prompt": "x"} if path == COMPLETIONS else {"input": "x"}
    for name, meant in (("writr", "writer"), ("Complaints", "complaints"), ("demos", "demo")):
        found = message(client.post(path, json={"model": name, **ask}), 404)
        assert found == (f"there is no prompt {name!r} (did you mean {meant!r}?); GET /v1/models lists them")
    found = message(client.get("/v1/models/writr"), 404)
    assert "did you mean 'writer'" in found
    assert "did you mean 'writer'" in message(client.get("/v1/prompts/writr/card"), 404)
    assert "did you mean" not in message(client.post(path, json={"model": "zzz", **ask}), 404)


def test_what_is_not_listed_is_not_hinted_at(base, tmp_path):
    for name in ("shown-one", "hidden-two", "broken-three"):
        write_prompt(tmp_path / name, base)
    (tmp_path / "broken-three" / "softprompt.json").write_text("{}")
    (tmp_path / ".dotted-four").mkdir()
    (tmp_path / "empty-five").mkdir()
    with running(app_over(base, tmp_path, ScriptedBatcher())) as server, server.client() as client:
        server.service.registry.unload("hidden-two")
        for name in ("shown-on", "hidden-tw", "broken-thre", "dotted-four", "empty-fiv"):
            body = {"model": name, "prompt": "x"}
            found = message(client.post(COMPLETIONS, json=body), 404)
            assert ("did you mean 'shown-one'" in found) == (name == "shown-on"), found


def test_what_came_is_cut(client):
    long = "x" * 10_000
    said = message(client.post(COMPLETIONS, json={"model": long, "prompt": "x"}), 404)
    assert said == f"there is no prompt '{'x' * 64}...'; GET /v1/models lists them"
    message(client.get(f"/v1/models/{long}"), 404)
    message(client.get(f"/{long}"), 404)
    message(client.get("/v1/models", headers={"host": long}), 421)
    message(client.post(COMPLETIONS, json={"model": "writer", "prompt": "x", "task": long}))
