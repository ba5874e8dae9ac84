"""Numbers for Prometheus, and the routes that say how the server is."""

import json
import math
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from oracles.serving import ScriptedBatcher, app_over, running, until
from softprompt.generation import FinishEvent

BODY = {"model": "writer", "prompt": "hello", "max_tokens": 3, "temperature": 0}


@pytest.fixture
def scripted(base, shared_prompts):
    batcher = ScriptedBatcher(auto=True)
    app = app_over(base, shared_prompts, batcher, max_metric_prompts=2)
    with running(app) as server, server.client() as client:
        yield client


def numbers(client):
    found = client.get("/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(found.text)
        for sample in family.samples
    }


def test_what_is_counted(scripted):
    for name, stream in (("writer", False), ("writer", True), ("complaints", False)):
        scripted.post("/v1/completions", json={**BODY, "model": name, "n": 2, "stream": stream})
    found = numbers(scripted)
    assert found["softprompt_request_success_total", "stop", "writer"] == 4
    assert found["softprompt_generation_tokens_total", "writer"] == 12
    assert found["softprompt_virtual_tokens_total", "writer"] == 6
    assert found["softprompt_prompt_tokens_total", "complaints"] > 0
    assert found["softprompt_time_to_first_token_seconds_count", "writer"] == 4
    assert found["softprompt_inter_token_latency_seconds_count", "writer"] == 8
    assert found["softprompt_e2e_request_latency_seconds_count", "complaints"] == 2
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert (f"softprompt_{name}",) in found
    assert found["softprompt_prompts_resident",] == 2


def test_labels_have_a_cap(scripted):
    for name in ("writer", "complaints", "plain-peft", "demo", "writer"):
        assert scripted.post("/v1/completions", json={**BODY, "model": name}).status_code == 200
    found = numbers(scripted)
    named = {key[-1] for key in found if key[0] == "softprompt_generation_tokens_total"}
    assert named == {"writer", "complaints", "other"}
    assert found["softprompt_generation_tokens_total", "other"] == 6


def test_unknown_names_are_no_labels(scripted):
    for number in range(5):
        scripted.post("/v1/completions", json={**BODY, "model": f"x{number}"})
    assert not [key for key in numbers(scripted) if key[-1].startswith("x")]


def test_refusals_are_counted(scripted):
    scripted.post("/v1/completions", json={**BODY, "model": "nope"})
    scripted.post("/v1/completions", json={})
    scripted.get("/v1/nope")
    found = numbers(scripted)
    assert found["softprompt_requests_refused_total", "404"] == 2
    assert found["softprompt_requests_refused_total", "400"] == 1


def test_what_did_not_end_is_counted_by_answers(base, shared_prompts):
    batcher = ScriptedBatcher()
    app = app_over(base, shared_prompts, batcher, request_seconds=1.0)
    with running(app) as server, server.client() as client, ThreadPoolExecutor(1) as thread:
        body = {**BODY, "prompt": ["a", "b", "c"], "n": 2}
        asked = thread.submit(client.post, "/v1/completions", json=body)
        until(lambda: len(batcher.tickets) == 3)
        batcher.answer(batcher.tickets[0])
        batcher.tickets[1].push(FinishEvent(1, "length", "", (5,), 3, 1))
        assert asked.result().status_code == 503
        with server.client() as other:
            found = numbers(other)
    assert found["softprompt_request_success_total", "stop", "writer"] == 2
    assert found["softprompt_request_success_total", "length", "writer"] == 1
    assert found["softprompt_request_success_total", "abort", "writer"] == 3


def test_texts_that_are_scored_are_counted_each(base, shared_prompts):
    with (
        running(app_over(base, shared_prompts, ScriptedBatcher())) as server,
        server.client() as client,
    ):
        body = {"model": "complaints", "input": ["a", "b", "c"]}
        assert client.post("/v1/classify", json=body).status_code == 200
        server.service.settings = replace(server.service.settings, request_seconds=0.1)
        server.service.scorer.submit = lambda *_: Future()
        found = client.post("/v1/classify", json=body)
        assert found.status_code == 503
        assert "no answer within 0.1 s" in found.json()["error"]["message"]
        found = numbers(client)
    assert found["softprompt_request_success_total", "classified", "complaints"] == 3
    assert found["softprompt_request_success_total", "abort", "complaints"] == 3


def test_numbers_of_the_real_batcher(server, client):
    for _ in range(2):
        client.post("/v1/completions", json=BODY)
    # An answer is out a moment before the batcher notes that it ended.
    until(lambda: numbers(client)["softprompt_num_requests_running",] == 0)
    found = numbers(client)
    assert found["softprompt_prompt_cache_hits_total",] >= 1
    assert found["softprompt_prompt_cache_tokens",] >= 3
    assert found["softprompt_prompt_cache_prompts",] >= 1
    assert found["softprompt_engine_steps_total",] >= 2
    assert 0 <= found["softprompt_kv_cache_usage_perc",] <= 1


def test_health_and_version(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    assert {"softprompt", "torch", "python"} <= set(client.get("/version").json())


def test_the_card(client, shared_prompts):
    found = client.get("/v1/prompts/complaints/card").json()
    assert found["name"] == found["location"] == "complaints"
    assert found["virtual_tokens"] == 4
    assert found["labels"] == ["complaint", "no complaint"]
    assert found["metrics"] == {"accuracy": 0.9}
    assert found["history"] == [{"epoch": 1, "loss": 0.5}]
    assert len(found["geometry"]["norms"]) == 4
    assert len(found["nearest"]) == 4
    assert found["nearest"][0][0]["cosine"] <= 1
    assert str(shared_prompts) not in json.dumps(found)
    assert not math.isnan(found["geometry"]["rms"])
    for name in ("nope", "demo"):
        assert client.get(f"/v1/prompts/{name}/card").status_code == 404


def test_the_page(client):
    found = client.get("/")
    assert found.status_code == 200
    assert found.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in found.headers["content-security-policy"]
    assert found.headers["x-content-type-options"] == "nosniff"
    # Nothing on it comes from elsewhere.
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", found.text)
