"""Whatever is sent, the answer is an error in OpenAI's shape, and the next request is answered."""

import json

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings

from oracles.serving import ScriptedBatcher, app_over

COMPLETIONS = "/v1/completions"
OK = {"model": "writer", "prompt": "x", "max_tokens": 1}


@pytest.fixture(scope="module")
def asked(server):
    with server.client() as client:
        yield client
        found = client.post(COMPLETIONS, json=OK)
        assert found.status_code == 200


ASKABLE = {
    COMPLETIONS: {"model": "writer", "prompt": "x"},
    "/v1/classify": {"model": "complaints", "input": "x"},
}
"""What generated bodies are given, as no schema says which prompts there are."""


def check(found, status=400):
    assert found.status_code == status, found.text
    assert found.headers["content-type"] == "application/json"
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"{}",
        b"\xff\xfe",
        b"\x00",
        b"[" * 50_000,
        b'{"model": "writer", "prompt": ' + b'{"a":' * 20_000,
        b'{"model": "writer", "prompt": "x", "temperature": NaN}',
        b'{"model": "writer", "prompt": "x", "temperature": Infinity}',
        b'{"model": "writer", "prompt": "x", "temperature": -Infinity}',
        b'{"model": "writer", "prompt": "x", "temperature": 1e400}',
        b'{"model": "writer", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "writer", "prompt": "\\ud800"}',
        b'{"model": "writer", "prompt": "x", "\\ud800": 1}',
        b'{"model": "\\ud800", "prompt": "x"}',
    ],
)
def test_bodies_that_are_no_requests(asked, body):
    headers = {"content-type": "application/json"}
    check(asked.post(COMPLETIONS, content=body, headers=headers))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 1e-9}, None),
        ({"max_tokens": 1e9}, "max_tokens"),
        ({"max_tokens": 2**70}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, None),
        ({"max_tokens": 100_000}, None),
        ({"min_tokens": 9}, None),
        ({"n": 0}, "n"),
        ({"n": 100_000}, "n"),
        ({"n": 65}, None),
        ({"n": 40}, None),
        ({"prompt": ["x"] * 65}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["x", 1]}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**6]}, None),
        ({"prompt": [2**63]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": {"tensor": [0.1]}}, "prompt"),
        ({"prompt": ""}, None),
        ({"prompt": None}, None),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"fields": {"input": "x"}}, None),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"logit_bias": {"1": 100}}, "logit_bias"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"task": "x"}, None),
        ({"task": 3}, None),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"x": 1}}, "stream_options"),
        ({"model": 3}, "model"),
        ({"mdoel": "x"}, "mdoel"),
    ],
)
def test_values_that_are_refused(asked, change, param):
    error = check(asked.post(COMPLETIONS, json={**OK, **change}))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


CHAT = {"messages": [{"role": "user", "content": "x"}]}


def deep(depth):
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize("depth", [257, 950, 3000])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "x", "guided_json": "SCHEMA"}),
        (COMPLETIONS, {"prompt": "x", "structured_outputs": {"json": "SCHEMA"}}),
        ("/v1/chat/completions", CHAT | {"guided_json": "SCHEMA"}),
        (
            "/v1/chat/completions",
            CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "SCHEMA"}}},
        ),
        (
            "/v1/responses",
            {"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": "SCHEMA"}}},
        ),
        ("/v1/responses", {"input": "x", "guided_json": "SCHEMA"}),
    ],
)
@pytest.mark.parametrize("as_text", [True, False])
def test_schemas_too_deep_to_be_read(asked, path, body, depth, as_text):
    schema = deep(depth)
    content = json.dumps({"model": "writer", **body}).replace('"SCHEMA"', json.dumps(schema) if as_text else schema)
    check(asked.post(path, content=content, headers={"content-type": "application/json"}))


@pytest.mark.parametrize(
    "name", ["../writer", "..", ".", "", "writer/../complaints", "/etc", "a\x00b", "x" * 10_000]
)
def test_names_that_are_none(asked, name):
    error = check(asked.post(COMPLETIONS, json={**OK, "model": name}), 404)
    assert error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("GET", "/v1/nope", 404),
        ("POST", "/v1/nope", 404),
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("DELETE", "/v1/models/writer", 405),
        ("PUT", "/health", 405),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/prompts/..%2fwriter/card", 404),
        ("GET", "/v1/prompts/%2e%2e/card", 404),
        ("GET", "/v1/prompts/a%00b/card", 404),
        ("GET", "/..%2fapp.py", 404),
        ("GET", "/page/../app.py", 404),
        ("GET", "/docs.html", 404),
    ],
)
def test_paths_that_are_none(asked, method, path, status):
    check(asked.request(method, path), status)


def test_a_text_is_never_more_than_text(asked):
    """Template marks and special tokens in an input stay what they look like."""
    for text in ("{{input}}", "{{first}}", "</s>", "<pad>", "\x00\x01", "\u202e", "🙂" * 9):
        found = asked.post(COMPLETIONS, json={**OK, "prompt": text})
        assert found.status_code == 200, found.text
    special = asked.post(COMPLETIONS, json={**OK, "prompt": "</s>"}).json()
    assert special["usage"]["prompt_tokens"] > 1


def test_extremes_that_are_allowed(asked):
    for change in (
        {"temperature": 100, "n": 3},
        {"temperature": 0.001},
        {"top_p": 1e-9},
        {"top_k": 2**62},
        {"min_p": 1},
        {"min_p": 1e-9, "frequency_penalty": 2, "presence_penalty": -2},
        {"typical_p": 1e-9},
        {"repetition_penalty": 100},
        {"repetition_penalty": 1e-3},
        {"seed": 2**63 - 1, "n": 2},
        {"stop": ["\n"] * 16},
        {"max_time": 1e-6},
        {"logprobs": 20, "echo": True},
        {"user": "x" * 1000},
        {"top_k": 0, "top_p": None, "n": None, "stop": None, "max_tokens": None, "stream": None},
    ):
        found = asked.post(COMPLETIONS, json={**OK, "max_tokens": 3, **change})
        assert found.status_code == 200, (change, found.text)
        assert json.loads(found.text, parse_constant=pytest.fail)


@pytest.mark.parametrize("examples", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_the_api_keeps_to_its_own_description(base, shared_prompts, examples):
    """schemathesis: requests made from our OpenAPI, right and wrong ones."""
    import schemathesis
    from schemathesis.checks import CHECKS, load_all_checks
    from schemathesis.generation import GenerationMode

    app = app_over(base, shared_prompts, ScriptedBatcher(auto=True), allowed_host=("testserver",))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    load_all_checks()
    # What a schema cannot say (there is no such prompt, it does not fit) is refused as well.
    left_out = [CHECKS.get_one("positive_data_acceptance")]
    chosen = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seen = set()

    def checked(operation, mode):
        @chosen
        @given(case=operation.as_strategy(generation_mode=mode))
        def every(case):
            if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
                for name in ("fields", "labels", "task", "min_tokens", "max_tokens", "temperature"):
                    case.body.pop(name, None)
                case.body.update(ASKABLE.get(case.path, {}))
            response = case.call()
            seen.add((case.path, response.status_code))
            case.validate_response(response, excluded_checks=left_out)

        every()

    for found in schema.get_all_operations():
        operation = found.ok()
        checked(operation, GenerationMode.POSITIVE)
        if operation.method == "post" and operation.body:
            checked(operation, GenerationMode.NEGATIVE)
    for path in (COMPLETIONS, "/v1/classify", "/v1/models"):
        assert (path, 200) in seen
    for path in (COMPLETIONS, "/v1/classify", "/v1/chat/completions"):
        assert (path, 400) in seen
    assert TestClient(app, base_url="http://localhost").post(COMPLETIONS, json=OK).status_code == 200
