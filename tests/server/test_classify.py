"""Label scores over HTTP are the library's, all texts and labels in one pass."""

import threading

import pytest
import torch

from oracles.serving import app_over, running, until, write_prefix, write_prompt
from softprompt import load

TEXTS = ["My parcel is late", "Thank you", "The phone does not work, what now?"]


@pytest.fixture(scope="module")
def tuned(shared_prompts, base):
    return load(shared_prompts / "complaints", base.model, tokenizer=base.tokenizer)


def asked(client, **body):
    found = client.post("/v1/classify", json={"model": "complaints", **body})
    assert found.status_code == 200, found.text
    return found.json()


@pytest.mark.parametrize("normalize", [False, True])
def test_scores_are_the_librarys(client, tuned, normalize):
    expected = tuned.classify(TEXTS, normalize=normalize)
    found = asked(client, input=TEXTS, normalize=normalize)
    assert [row["index"] for row in found["data"]] == [0, 1, 2]
    for row, own in zip(found["data"], expected, strict=True):
        assert row["label"] == own.label
        assert row["scores"] == pytest.approx(dict(own.scores), abs=1e-4)
        assert row["probabilities"] == pytest.approx(dict(own.probabilities), abs=1e-4)
    ids, _ = tuned.sources(TEXTS)
    assert found["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert found["usage"]["virtual_tokens"] == 12


def test_fields_are_the_texts_they_hold(client):
    fields = [{"input": text} for text in TEXTS]
    assert asked(client, fields=fields)["data"] == asked(client, input=TEXTS)["data"]
    assert asked(client, fields=fields[0])["data"] == asked(client, input=TEXTS[0])["data"]


def test_one_text_and_given_labels(client, tuned):
    labels = ["good", "bad", "neither of them"]
    (expected,) = tuned.classify([TEXTS[0]], labels)
    (row,) = asked(client, input=TEXTS[0], labels=labels)["data"]
    assert row["scores"] == pytest.approx(dict(expected.scores), abs=1e-4)


def test_one_pass_for_all(client, server, monkeypatch):
    engine = server.service.scorer._engine
    calls = []
    run = type(engine).target_log_probs
    monkeypatch.setattr(type(engine), "target_log_probs", lambda s, r: calls.append(len(r)) or run(s, r))
    asked(client, input=TEXTS)
    assert calls == [6]


def test_callers_share_a_pass_and_fail_alone(server, monkeypatch):
    scorer = server.service.scorer
    engine = scorer._engine
    gate, calls = threading.Event(), []
    run = type(engine).target_log_probs

    def held(self, rows):
        calls.append((len(rows), len({row.prompt for row in rows})))
        gate.wait(10)
        if any(row.target == (1, 2, 3) for row in rows):
            raise RuntimeError("no such target")
        return run(self, rows)

    monkeypatch.setattr(type(engine), "target_log_probs", held)
    from softprompt.engine import EngineRow

    first, second = (server.service.registry.get(name).prompt for name in ("complaints", "writer"))

    def rows(prompt):
        return [EngineRow((5, 6), (7,), prompt), EngineRow((5, 6), (8,), prompt)]

    held_up = scorer.submit(rows(first)[:1])
    until(lambda: calls)
    waiting = [
        scorer.submit(rows(first)),
        scorer.submit(rows(second)),
        scorer.submit([EngineRow((5,), (1, 2, 3), second)]),
    ]
    gate.set()
    alone = held_up.result(10)
    assert waiting[0].result(10)[0] == pytest.approx(float(alone[0]), abs=1e-5)
    assert not waiting[1].result(10).equal(waiting[0].result(10))
    with pytest.raises(RuntimeError, match="no such target"):
        waiting[2].result(10)
    assert calls[:2] == [(1, 1), (5, 2)]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "either input, or the template's fields"),
        ({"input": "x", "fields": {"input": "x"}}, "either input"),
        ({"input": []}, "input"),
        ({"input": "x", "model": "writer"}, "no labels of its own; send labels"),
        ({"input": "x", "model": "demo"}, "no labels of its own; send labels"),
        ({"input": "x", "labels": ["a", "a"]}, "same tokens"),
        ({"input": "x", "labels": ["word " * 30]}, "max_target_length"),
        ({"input": ["x"] * 65}, "this server takes 64"),
        ({"input": "word " * 300}, "truncate_input=true"),
    ],
)
def test_what_cannot_be_scored(client, body, words):
    found = client.post("/v1/classify", json={"model": "complaints", **body})
    assert found.status_code == 400, found.text
    assert words in found.json()["error"]["message"]


def test_an_empty_text_needs_rows_of_the_prompts_own(base, tmp_path):
    write_prefix(tmp_path / "prefix", base, template="{{input}}")
    write_prompt(tmp_path / "rows", base, template="{{input}}")
    with running(app_over(base, tmp_path)) as server, server.client() as client:
        for name, who in (("prefix", "a prefix-tuning prompt"), ("demo", "the base model")):
            body = {"model": name, "input": ["x", ""], "labels": ["a", "b"]}
            found = client.post("/v1/classify", json=body)
            assert found.status_code == 400
            assert found.json()["error"]["message"] == (
                f"text 2 is empty, and {who} has no token of its own to go on from; send some text"
            )
            body["input"] = "x"
            assert client.post("/v1/classify", json=body).status_code == 200
        body = {"model": "rows", "input": ""}
        assert client.post("/v1/classify", json=body).status_code == 200


def test_a_cut_input_says_so(client):
    (row,) = asked(client, input="word " * 300, truncate_input=True)["data"]
    assert row["input_cut"] is True


def test_the_base_scores_given_labels(client, base):
    body = {"model": "demo", "input": "Text : It broke . Label :", "labels": ["complaint", "none"]}
    found = client.post("/v1/classify", json=body).json()
    source = base.tokenizer(body["input"])["input_ids"]
    for label in body["labels"]:
        target = base.tokenizer(f" {label}", add_special_tokens=False)["input_ids"]
        target.append(base.tokenizer.eos_token_id)
        logits = base.model(input_ids=torch.tensor([[*source, *target]])).logits[0].log_softmax(-1)
        end = len(source) - 1
        score = sum(float(logits[end + i, token]) for i, token in enumerate(target))
        assert found["data"][0]["scores"][label] == pytest.approx(score, abs=1e-4)
    assert found["usage"]["virtual_tokens"] == 0
