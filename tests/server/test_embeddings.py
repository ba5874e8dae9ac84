"""``/v1/embeddings``: the vectors of PEFT's interface, with OpenAI's own client."""

import base64
import json
import math
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from oracles.serving import app_over, running, until, write_prompt
from softprompt import PeftModel
from softprompt.server import embeddings

TEXTS = ["Where is my parcel, it is two weeks late", "Thank you", "When do you open on Sunday?"]


@pytest.fixture(scope="module")
def root(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("embedding")
    write_prompt(root / "vectors", base, length=5, manifest=False)
    file = root / "vectors" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": "FEATURE_EXTRACTION"}))
    write_prompt(root / "writer", base, task="generation", labels=None, template="{{input}}")
    return root


@pytest.fixture(scope="module")
def served(base, root):
    with running(app_over(base, root, max_request_rows=8, max_step_tokens=32)) as server:
        yield server


@pytest.fixture(scope="module")
def ai(served):
    return served.openai()


@pytest.fixture(scope="module")
def expected(base, root, served):
    """The vectors of the same folder attached to the base's body by PEFT's interface."""
    import copy

    body = copy.deepcopy(base.model.base_model)
    model = PeftModel.from_pretrained(body, root / "vectors").eval()
    found = []
    for text in TEXTS:
        ids = torch.tensor([served.service.registry.get("vectors").of_fields(text).ids])
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        found.append(states[-ids.shape[1] :])
    return found


def unit(vector):
    return (vector / vector.norm()).tolist()


def test_vectors_are_those_of_pefts_interface(ai, expected):
    found = ai.embeddings.create(model="vectors", input=TEXTS)
    assert [each.index for each in found.data] == [0, 1, 2]
    for each, states in zip(found.data, expected, strict=True):
        assert each.embedding == pytest.approx(unit(states.mean(0)), abs=1e-5)
        assert math.hypot(*each.embedding) == pytest.approx(1, abs=1e-5)
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(len(states) for states in expected)
    assert found.usage.virtual_tokens == 15
    one = ai.embeddings.create(model="vectors", input=TEXTS[1], encoding_format="float")
    assert one.data[0].embedding == pytest.approx(found.data[1].embedding, abs=1e-6)


def test_pooling_length_and_encoding(ai, served, expected):
    more = {"pooling": "last", "normalize": False}
    found = ai.embeddings.create(model="vectors", input=TEXTS[0], extra_body=more, encoding_format="float")
    assert found.data[0].embedding == pytest.approx(expected[0][-1].tolist(), abs=1e-4)
    with served.client() as client:
        body = {"model": "vectors", "input": TEXTS[0], "encoding_format": "base64", **more}
        data = client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    raw = base64.b64decode(data)
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(found.data[0].embedding)


def test_token_ids_are_taken_as_they_are(ai, served):
    ids = [list(served.service.registry.get("vectors").of_fields(text).ids) for text in TEXTS]
    texts = [each.embedding for each in ai.embeddings.create(model="vectors", input=TEXTS).data]
    assert [each.embedding for each in ai.embeddings.create(model="vectors", input=ids).data] == texts
    assert ai.embeddings.create(model="vectors", input=ids[0]).data[0].embedding == pytest.approx(
        texts[0], abs=1e-6
    )


def test_the_base_alone_has_vectors_too(ai, base):
    found = ai.embeddings.create(model="demo", input=TEXTS[1])
    with torch.no_grad():
        states = base.model.base_model(**base.tokenizer(TEXTS[1], return_tensors="pt")).last_hidden_state[0]
    assert found.data[0].embedding == pytest.approx(unit(states.mean(0)), abs=1e-5)
    assert found.usage.virtual_tokens == 0
    width = len(found.data[0].embedding)
    assert ai.embeddings.create(model="demo", input="x", dimensions=width).data[0].embedding


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"model": "writer"}, "the prompt 'writer' is for CAUSAL_LM; ask for an answer"),
        ({"dimensions": 8}, "dimensions; leave dimensions out"),
        ({"encoding_format": "hex"}, "encoding_format takes"),
        ({"input": []}, "input takes a text, token ids from 0 up, or a list of up to 2,048 texts"),
        ({"input": ["x"] * 9}, "9 texts, this server takes 8"),
        ({"input": ""}, "no tokens"),
        ({"input": "word " * 3000}, "truncate_input=true"),
        ({"input": [5] * 5000}, "exceed"),
        ({"pooling": "max"}, "pooling takes"),
        ({"temperature": 1}, "temperature is not known here"),
        ({"model": "nope"}, "no prompt 'nope'"),
    ],
)
def test_what_is_wrong_is_refused(served, more, told):
    with served.client() as client:
        reply = client.post("/v1/embeddings", json={"model": "vectors", "input": "x", **more})
    assert reply.status_code in (400, 404)
    assert told in reply.json()["error"]["message"]


def test_a_prompt_for_vectors_writes_no_answers(ai, served):
    for ask in (
        lambda: ai.completions.create(model="vectors", prompt="x"),
        lambda: ai.chat.completions.create(model="vectors", messages=[{"role": "user", "content": "x"}]),
        lambda: ai.responses.create(model="vectors", input="x"),
    ):
        with pytest.raises(openai.BadRequestError, match="is for FEATURE_EXTRACTION; ask /v1/embeddings"):
            ask()
    listed = {each.id: each for each in ai.models.list()}
    assert (listed["vectors"].task, listed["writer"].task) == ("embedding", "generation")


def test_they_are_counted(served, ai):
    ai.embeddings.create(model="vectors", input=TEXTS)
    with served.client() as client:
        page = client.get("/metrics").text
    line = 'softprompt_request_success_total{finished_reason="embedded",model_name="vectors"}'
    assert float(page.split(line)[1].split()[0]) >= 3


def test_answers_and_vectors_at_once(ai):
    alone = ai.embeddings.create(model="vectors", input=TEXTS).data
    said = ai.completions.create(model="writer", prompt=TEXTS[0], max_tokens=8, temperature=0).choices[0].text
    with ThreadPoolExecutor(8) as pool:
        vectors = [pool.submit(ai.embeddings.create, model="vectors", input=TEXTS) for _ in range(8)]
        ask = {"model": "writer", "prompt": TEXTS[0], "max_tokens": 8, "temperature": 0}
        answers = [pool.submit(ai.completions.create, **ask) for _ in range(8)]
        assert {each.result().choices[0].text for each in answers} == {said}
        assert all([e.embedding for e in each.result().data] == [e.embedding for e in alone] for each in vectors)


def test_requests_take_turns_and_end_with_their_client(served, monkeypatch):
    passes, go_on, states = [], threading.Event(), embeddings.text_states

    def held(base, rows):
        passes.append(len(rows[0].source))
        assert go_on.wait(60)
        return states(base, rows)

    monkeypatch.setattr(embeddings, "text_states", held)
    long = {"model": "vectors", "input": [" ".join(TEXTS)] * 8}
    turns = served.service.embedding
    with served.client() as client, served.client() as other, ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(client.post, "/v1/embeddings", json=long)
        until(lambda: passes, 60)
        short = pool.submit(other.post, "/v1/embeddings", json={**long, "input": TEXTS[1]})
        until(lambda: turns.statistics().tasks_waiting == 1, 60)
        go_on.set()
        assert len(waiting.result(60).json()["data"]) == 8
        assert len(short.result(60).json()["data"]) == 1
    assert len(passes) == 9
    assert passes[1] == min(passes) < passes[0]
    go_on.clear()
    aborted = served.service.metrics.success.labels("vectors", "abort")
    before, body = aborted._value.get(), json.dumps(long).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as sock:
        sock.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        until(lambda: len(passes) == 10, 60)
    until(lambda: aborted._value.get() == before + 8, 60)
    go_on.set()
    until(lambda: turns.statistics().borrowed_tokens == 0, 60)
    assert len(passes) == 10


def test_vectors_wait_in_bounds_and_not_for_ever(base, root, monkeypatch):
    go_on, begun, states = threading.Event(), threading.Event(), embeddings.text_states

    def held(base, rows):
        begun.set()
        assert go_on.wait(60)
        return states(base, rows)

    monkeypatch.setattr(embeddings, "text_states", held)
    body = {"model": "vectors", "input": TEXTS[1]}
    app = app_over(base, root, max_queue=1, request_seconds=0.5)
    with running(app) as server, server.client() as client, ThreadPoolExecutor(2) as pool:
        pool.submit(client.post, "/v1/embeddings", json=body)
        assert begun.wait(60)
        late = pool.submit(client.post, "/v1/embeddings", json=body)
        until(lambda: server.service.embedding.statistics().tasks_waiting == 1, 60)
        full = client.post("/v1/embeddings", json=body)
        time.sleep(0.6)
        go_on.set()
        late = late.result(60)
    assert (full.status_code, late.status_code) == (429, 503)
    assert full.headers["retry-after"] == "1"
    assert full.json()["error"]["message"] == "1 requests wait already; try again later"
    assert late.json()["error"]["message"] == "no answer within 0.5 s; try again later"
