"""Prompt files replaced, truncated and deleted while they are served."""

import logging
import shutil
import threading

import pytest

from oracles.serving import ScriptedBatcher, app_over, running, until, write_prompt
from softprompt import load

WEIGHTS = "adapter_model.safetensors"
TEXT = "Where is my parcel"


def ask(client, name="writer", **more):
    body = {"model": name, "prompt": TEXT, "max_tokens": 8, "temperature": 0, **more}
    return client.post("/v1/completions", json=body)


def alone(directory, base):
    tuned = load(directory, base.model, tokenizer=base.tokenizer)
    return tuned.generate([TEXT], max_new_tokens=8)[0].text


@pytest.fixture
def own_server(prompts, base):
    with running(app_over(base, prompts, poll_seconds=0.05)) as server, server.client() as client:
        yield server, client


def test_a_prompt_replaced_answers_anew(own_server, prompts, base):
    _, client = own_server
    first = ask(client).json()
    assert first["choices"][0]["text"] == alone(prompts / "writer", base)
    write_prompt(prompts / "writer", base, seed=21, task="generation", labels=None, template="{{input}}")
    second = ask(client).json()
    assert second["choices"][0]["text"] == alone(prompts / "writer", base)
    assert second["system_fingerprint"] != first["system_fingerprint"]


def test_damaged_and_deleted_prompts_fail_alone(own_server, prompts, base):
    server, client = own_server
    assert ask(client).status_code == 200
    path = prompts / "writer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:100])
    found = ask(client)
    assert found.status_code == 500
    assert found.json()["error"]["code"] == "prompt_unusable"
    assert "truncated or damaged" in found.json()["error"]["message"]
    assert str(prompts) not in found.text
    assert ask(client, "complaints").status_code == 200
    shutil.rmtree(prompts / "writer")
    found = ask(client)
    assert found.status_code == 404
    assert found.json()["error"]["code"] == "model_not_found"
    assert ask(client, "complaints").status_code == 200
    until(lambda: not server.service.registry.is_resident("writer"))
    (prompts / "pairs" / "softprompt.json").write_text("{")
    assert "pairs" not in [each["id"] for each in client.get("/v1/models").json()["data"]]
    assert client.get("/v1/models/pairs").status_code == 500


def test_a_folder_without_weights_is_not_listed(own_server, prompts):
    _, client = own_server
    (prompts / "writer" / WEIGHTS).unlink()
    assert "writer" not in [each["id"] for each in client.get("/v1/models").json()["data"]]
    for found in (client.get("/v1/models/writer"), ask(client)):
        assert found.status_code == 500
        assert f"expected {WEIGHTS} in writer" in found.json()["error"]["message"]


def test_replicas_over_one_folder_answer_alike(prompts, base):
    with (
        running(app_over(base, prompts)) as one,
        running(app_over(base, prompts)) as two,
        one.client() as first,
        two.client() as second,
    ):
        seen = []
        for seed in (31, 32):
            own = {"task": "generation", "labels": None, "template": "{{input}}"}
            write_prompt(prompts / "writer", base, seed=seed, **own)
            for more in ({}, {"temperature": 1, "seed": 5, "n": 2}):
                a, b = (ask(each, **more).json() for each in (first, second))
                assert a["choices"] == b["choices"]
                assert a["system_fingerprint"] == b["system_fingerprint"]
            seen.append(a["system_fingerprint"])
        assert seen[0] != seen[1]


def test_requests_keep_the_version_they_began_with(prompts, base):
    batcher = ScriptedBatcher()
    with running(app_over(base, prompts, batcher)) as server, server.client() as client:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(ask(client))) for _ in range(2)]
        threads[0].start()
        until(lambda: len(batcher.tickets) == 1)
        write_prompt(prompts / "writer", base, seed=22, task="generation", labels=None)
        threads[1].start()
        until(lambda: len(batcher.tickets) == 2)
        shutil.rmtree(prompts / "writer")
        old, new = (ticket.request.prompt for ticket in batcher.tickets)
        assert old.key != new.key
        for ticket in batcher.tickets:
            batcher.answer(ticket)
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert len({answer.json()["system_fingerprint"] for answer in answers}) == 2
        assert ask(client).status_code == 404


@pytest.mark.slow
def test_prompts_replaced_under_load(own_server, prompts, base, tmp_path):
    """Whatever a client sees is one of the versions, or an error that says the files were changing."""
    _, client = own_server
    versions = [
        write_prompt(
            tmp_path / f"v{i}",
            base,
            seed=30 + i,
            task="generation",
            labels=None,
            template="{{input}}",
        )
        for i in range(2)
    ]
    texts = {alone(directory, base) for directory in versions}
    assert len(texts) == 2
    for file in versions[0].iterdir():
        shutil.copy(file, prompts / "writer" / file.name)
    stop, found = threading.Event(), []

    def asking():
        while not stop.is_set():
            found.append((ask(client), ask(client, "complaints")))

    threads = [threading.Thread(target=asking) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(12):
        for file in versions[turn % 2].iterdir():  # file by file, as rsync would
            shutil.copy(file, prompts / "writer" / file.name)
        stop.wait(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(found) >= 6
    for writer, complaints in found:
        assert complaints.status_code == 200
        if writer.status_code == 200:
            assert writer.json()["choices"][0]["text"] in texts
        else:
            assert writer.json()["error"]["code"] == "prompt_unusable"
    assert ask(client).status_code == 200


def test_the_folder_goes_away_and_comes_back(own_server, prompts):
    _, client = own_server
    prompts.rename(prompts.with_name("away"))
    for away in (client.get("/ready"), client.get("/v1/models"), ask(client)):
        assert away.status_code == 503
        assert away.json()["error"]["code"] == "unavailable"
    assert ask(client, "demo").status_code == 200
    prompts.with_name("away").rename(prompts)
    assert client.get("/ready").status_code == 200
    assert ask(client).status_code == 200


def test_a_folder_that_goes_away_is_said_and_taken_up_when_it_is_back(own_server, prompts, caplog):
    _, client = own_server
    assert ask(client).status_code == 200
    with caplog.at_level(logging.WARNING, logger="softprompt"):
        prompts.rename(prompts.with_name("away"))
        until(lambda: "the folder of prompts cannot be read: " in caplog.text)
    assert client.get("/ready").status_code == 503
    prompts.with_name("away").rename(prompts)
    assert ask(client).status_code == 200


def test_what_is_kept_of_cards_is_bounded(client, server, monkeypatch):
    monkeypatch.setattr("softprompt.server.service._CARDS", 2)
    names = ("complaints", "writer", "pairs")
    cards = [client.get(f"/v1/prompts/{name}/card").json() for name in names * 2]
    assert cards[:3] == cards[3:]
    assert [each["name"] for each in cards[:3]] == list(names)
    assert len(server.service._cards) == 2
