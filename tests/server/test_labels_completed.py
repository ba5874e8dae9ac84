"""``/v1/completions`` for a classifier: its likeliest label where nothing else is asked, and text where it is."""

import openai
import pytest

from softprompt import load

TEXTS = ["My parcel is late", "Thank you", "The phone does not work, what now?"]


@pytest.fixture(scope="module")
def tuned(shared_prompts, base):
    return load(shared_prompts / "complaints", base.model, tokenizer=base.tokenizer)


@pytest.fixture(scope="module")
def expected(tuned):
    return [each.label for each in tuned.classify(TEXTS)]


@pytest.fixture
def completed(client):
    def call(model="complaints", prompt=TEXTS, **body):
        found = client.post("/v1/completions", json={"model": model, "prompt": prompt, **body})
        assert found.status_code == 200, found.text
        return found.json()

    return call


def texts_of(found):
    return [choice["text"] for choice in found["choices"]]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_tokens": 8},
        {"temperature": None, "top_p": 1, "n": 1, "echo": False},
        {"frequency_penalty": 0, "seed": None},
    ],
)
def test_a_label_is_the_default(completed, tuned, expected, more):
    found = completed(**more)
    assert texts_of(found) == expected
    assert {choice["finish_reason"] for choice in found["choices"]} == {"stop"}
    assert found["usage"]["virtual_tokens"] == 12
    assert found["usage"]["completion_tokens"] == sum(map(len, (tuned.label_ids([label])[0] for label in expected)))


def test_the_openai_client_streams_a_label(server, expected):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    usage = {"include_usage": True}
    chunks = list(client.completions.create(model="complaints", prompt=TEXTS, stream=True, stream_options=usage))
    said = {chunk.choices[0].index: "" for chunk in chunks if chunk.choices}
    for chunk in chunks[:-1]:
        said[chunk.choices[0].index] += chunk.choices[0].text
    assert list(said.values()) == expected
    assert chunks[-1].usage.prompt_tokens > 0


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0},
        {"temperature": 1, "seed": 3},
        {"echo": True},
        {"logprobs": 1},
        {"raw": True},
        {"stop": ["x"]},
        {"n": 2},
    ],
)
def test_what_asks_for_text_gets_text(server, completed, monkeypatch, more):
    scored = []
    monkeypatch.setattr(server.service.scorer, "submit", scored.append)
    completed(prompt=TEXTS[0], **more)
    completed(prompt=[5, 6, 7])
    completed(model="writer", prompt="x")
    assert scored == []


def test_limits_hold_for_labels_too(client, completed, server):
    (choice,) = completed(prompt=TEXTS[0], max_tokens=1)["choices"]
    assert choice["finish_reason"] == "length"
    assert len(choice["text"]) < len("complaint") + 1
    most = server.service.settings.max_request_rows
    refused = client.post("/v1/completions", json={"model": "complaints", "prompt": ["x"] * (most + 1)})
    assert (refused.status_code, f"this server allows {most}" in refused.text) == (400, True)
    long = client.post("/v1/completions", json={"model": "complaints", "prompt": "word " * 900})
    assert (long.status_code, "truncate_input" in long.text) == (400, True)


def test_metrics_count_it_as_classified(client, completed):
    def count():
        lines = client.get("/metrics").text.splitlines()
        own = [line for line in lines if "classified" in line and 'model_name="complaints"' in line]
        return sum(float(line.rpartition(" ")[2]) for line in own)

    before = count()
    completed()
    assert count() == before + len(TEXTS)
