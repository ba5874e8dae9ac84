"""Prompts over vLLM: what is sent, answers that are ours, what failures become. tests/vllm has the real server."""

import asyncio
import base64
import io
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from oracles.fake_vllm import faked, over
from oracles.serving import command_serving, until, write_prefix, write_prompt
from oracles.slow import only
from softprompt.backbone import load_base
from softprompt.errors import ConfigError, NotServingError, UsageError
from softprompt.generation import Bounds
from softprompt.inference import convert
from softprompt.server.settings import ServeSettings
from softprompt.server.upstream.fleet import Fleet
from softprompt.server.upstream.serving import alike

TEXTS = ["the parcel  is late", "Größe é 7", "a <prompt_embeds> b"]
BODY = {"model": "writer", "prompt": TEXTS[0], "max_tokens": 6, "temperature": 0}
WAYS = {"parts": {}, "embeds": {"through": False}, "ids": {"embeds": False}}


@pytest.fixture(scope="module")
def export(tmp_path_factory, base, shared_prompts):
    folder = tmp_path_factory.mktemp("export") / "exported"
    convert(shared_prompts / "writer", folder, to="extended-vocab", add={"c": shared_prompts / "complaints"})
    return folder


@pytest.fixture(scope="module", params=only(["parts", "ids"], WAYS))
def way(request, base, export, shared_prompts):
    """A front over one fake, for each way in which prompts are put: (way, fake, client)."""
    exported = request.param == "ids"
    behind = load_base(export) if exported else base
    with (
        faked(behind, **WAYS[request.param]) as fake,
        over([fake], shared_prompts, export if exported else "demo") as server,
        server.client() as client,
    ):
        yield request.param, fake, client


def asked(client, path="/v1/completions", **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def same(found, expected):
    """Compare bodies: all that is no log-probability exactly, those to 1e-4."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if key not in ("id", "created"):
                same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4)
    else:
        assert found == expected


@pytest.mark.parametrize("more", [{"logprobs": 2}, {"stop": [" e", "a"], "n": 2, "min_tokens": 2}])
def test_answers_are_those_of_our_own_engine(way, client, more):
    front = way[2]
    for model in ("writer", "demo"):
        for text in TEXTS:
            body = {**BODY, "model": model, "prompt": text, **more}
            same(asked(front, **body), asked(client, **body))
    assert front.get("/v1/models").json()["data"][0]["engine"] == "vllm"


def test_streams_have_our_shapes(way, server):
    body = {**BODY, "stream": True, "logprobs": 1, "stream_options": {"include_usage": True}}
    with server.client() as own:
        streams = [client.post("/v1/completions", json=body).text for client in (way[2], own)]
    found, expected = (
        [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")] for text in streams
    )
    same(found, expected)
    assert streams[0].endswith("data: [DONE]\n\n")
    assert expected[-1]["usage"]["completion_tokens"] == 6


def test_label_scores_are_those_of_our_own_engine(way, client):
    body = {"model": "complaints", "input": TEXTS, "labels": ["complaint", "no complaint", "no", "other"]}
    same(asked(way[2], "/v1/classify", **body), asked(client, "/v1/classify", **body))


def test_the_scores_of_an_input_are_those_of_our_own_engine(way, client):
    body = {**BODY, "echo": True, "logprobs": 2}
    same(asked(way[2], **{**body, "model": "demo"}), asked(client, **{**body, "model": "demo"}))
    if way[0] == "ids":
        same(asked(way[2], **body), asked(client, **body))
    else:
        refused = way[2].post("/v1/completions", json=body)
        assert refused.status_code == 400
        assert "echo looks at the input's tokens" in refused.text


def test_what_is_sent(way):
    name, fake, front = way
    for text in TEXTS[:1] * 2:
        asked(front, **{**BODY, "prompt": text})
    asked(front, **{**BODY, "prompt": TEXTS[2]})
    first, second, last = fake.bodies[-3:]
    assert first == second
    paths = fake.paths[-3:]
    if name == "parts":  # the text beside P virtual tokens; what vLLM keeps for itself goes embedded
        virtual, text = first["messages"][0]["content"]
        assert text == {"type": "text", "text": TEXTS[0]}
        assert torch.load(io.BytesIO(base64.b64decode(virtual["data"]))).shape == (3, 256)
        assert paths == ["/v1/chat/completions"] * 2 + ["/v1/completions"]
        assert "prompt_embeds" in last
    else:
        assert paths == ["/v1/completions"] * 3
        assert ("prompt_embeds" in first) == (name == "embeds")
    if name == "ids":
        assert first["prompt"][:3] == sorted(first["prompt"][:3]) == [4096, 4097, 4098]
        assert set(map(int, first["logit_bias"])) == set(range(4096, 4103))


def test_settings_are_passed_on(front, fake):
    _, client = front
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3}
    penalties = {"frequency_penalty": 0.5, "presence_penalty": -0.5}
    asked(client, **{**BODY, **sampling, **penalties, "n": 2})
    sent = sorted(fake.bodies[-2:], key=lambda body: body["seed"])
    assert [body["seed"] for body in sent] == [3, 4]
    assert {**sampling, **penalties}.items() <= sent[0].items()
    asked(client, **{**BODY, "guided_choice": ["yes", "no"]})
    assert fake.bodies[-1]["structured_outputs"] == {"choice": ["yes", "no"]}
    asked(client, **{**BODY, "model": "demo", "repetition_penalty": 1.2})
    assert fake.bodies[-1]["repetition_penalty"] == 1.2
    for name, value in (
        ("typical_p", 0.5),
        ("exponential_decay_length_penalty", [2, 1.1]),
        ("repetition_penalty", 2),
    ):
        refused = client.post("/v1/completions", json={**BODY, "temperature": 1, name: value})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith(name)


def test_what_does_not_fit_the_server_is_refused_before_it_is_sent(front, fake):
    before = len(fake.bodies)
    refused = front[1].post("/v1/completions", json={**BODY, "max_tokens": 197})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert len(fake.bodies) == before


def test_a_prompt_that_changes_is_sent_anew(fake, base, tmp_path):
    write_prompt(tmp_path / "writer", base, seed=7, task="generation", labels=None, template="{{input}}")
    with over([fake], tmp_path) as server, server.client() as client:
        asked(client, **BODY)
        before = fake.bodies[-1]["messages"][0]["content"][0]
        write_prompt(tmp_path / "writer", base, seed=8, task="generation", labels=None, template="{{input}}")
        asked(client, **BODY)
        assert fake.bodies[-1]["messages"][0]["content"][0] != before


def test_what_vllm_cannot_do_for_a_prompt_is_said_where_prompts_are_listed(fake, base, tmp_path):
    write_prompt(tmp_path / "writer", base)
    write_prefix(tmp_path / "prefix", base)
    file = write_prompt(tmp_path / "vectors", base, manifest=False) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": "FEATURE_EXTRACTION"}))
    with over([fake], tmp_path) as server, server.client() as client:
        unusable = {each["id"]: each["problem"] for each in client.get("/v1/models").json()["unusable"]}
        assert "keys and values, which vLLM does not take; serve it with --engine own" in unusable["prefix"]
        assert (
            "vectors, which vLLM does not give behind a prompt; serve it with --engine own" in unusable["vectors"]
        )
        answer = client.post("/v1/completions", json={**BODY, "model": "prefix"})
        assert answer.json()["error"]["code"] == "prompt_unusable"
        vectors = client.post("/v1/embeddings", json={"model": "demo", "input": "a"})
        assert "vectors are not served with --engine vllm" in vectors.text


def test_a_server_without_embeddings_serves_no_prompt_that_is_no_vocabulary(base, shared_prompts):
    with faked(base, embeds=False) as fake, over([fake], shared_prompts) as server, server.client() as client:
        listed = client.get("/v1/models").json()
        assert [each["id"] for each in listed["data"]] == ["demo"]
        assert all("start it with --enable-prompt-embeds" in each["problem"] for each in listed["unusable"])
        assert asked(client, **{**BODY, "model": "demo"})["choices"][0]["text"]


@pytest.mark.slow
def test_an_export_whose_prompt_has_changed_since_is_not_taken_for_it(base, export, tmp_path):
    write_prompt(tmp_path / "writer", base, seed=9, task="generation", labels=None, template="{{input}}")
    behind = load_base(export)
    with faked(behind, embeds=False) as fake, over([fake], tmp_path, export) as server, server.client() as client:
        assert "takes no embeddings" in client.post("/v1/completions", json=BODY).text
    with faked(behind) as fake, over([fake], tmp_path, export) as server, server.client() as client:
        asked(client, **BODY)
        assert "messages" in fake.bodies[-1]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"upstream": ()}, "go together"),
        ({"upstream": ("http://a",), "engine": "own"}, "go together"),
        ({"upstream": ("http://host:99999",)}, "such as"),
        ({"upstream": ("http://[::1",)}, "such as"),
        ({"upstream": ("http://name:word@host",)}, "such as"),
        ({"upstream": ("host:8000",)}, "such as http://host:8000, got 'host:8000'"),
        ({"base_model": ""}, "base_model must not be empty"),
        ({"prompts": ""}, "prompts must not be empty"),
        ({"host": ""}, "host must not be empty"),
        ({"served_model_name": ("a", "")}, "served_model_name must not be empty"),
    ],
)
def test_settings_that_name_nothing_are_refused(changed, problem):
    with pytest.raises(ConfigError, match=problem):
        ServeSettings(**{"base_model": "demo", "prompts": "p", "engine": "vllm", **changed})


def test_a_start_without_a_server_says_what_to_do(shared_prompts):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UsageError, match=f"no vLLM server can be used \\({url}: .*; start vLLM first"):
        with command_serving("demo", shared_prompts, engine="vllm", upstream=(url,)):
            pass


def test_a_server_with_another_model_is_found_out(base, shared_prompts):
    other = load_base("demo")
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.5)
    with faked(other) as fake, pytest.raises(UsageError, match="another model than demo"):
        with over([fake], shared_prompts):
            pass


@pytest.mark.parametrize(
    ("given", "status", "ready"),
    [(500, 502, 200), (503, 503, 503), (502, 502, 503), (429, 429, 200), (400, 400, 200), (404, 502, 503)],
)
def test_what_a_server_refuses_keeps_our_shape(front, fake, given, status, ready):
    server, client = front
    fake.behaviour = given
    answer = client.post("/v1/completions", json=BODY)
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert f"it is {given}" in answer.json()["error"]["message"]
    assert fake.url not in answer.text
    assert client.get("/ready").status_code == ready
    echo = client.post("/v1/completions", json={**BODY, "model": "demo", "echo": True, "logprobs": 1})
    assert (echo.status_code, f"it is {given}" in echo.text) == (status, True)


@pytest.mark.parametrize("how", ["break", "error", "short"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_breaks_off_is_an_error(front, fake, how, stream):
    fake.behaviour = how
    answer = front[1].post("/v1/completions", json={**BODY, "stream": stream})
    assert answer.status_code == (200 if stream else 502)
    last = [line for line in answer.text.splitlines() if line.startswith(("data: {", "{"))][-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == "upstream_failed"
    told = {"error": "EngineCore died", "break": "broke off", "short": "ended an answer early; try again"}
    assert told[how] in error["message"]
    counted = {"error": '"status"', "break": '"broken"', "short": ""}
    assert counted[how] in front[1].get("/metrics").text


def test_an_answer_that_vllm_ends_by_itself_has_stopped(front, fake, monkeypatch):
    """As one of a form ends, whose last token is none that ends an answer here."""
    piece = fake.piece

    def formed(body, scores, token):
        found = piece(body, scores, token)
        return {**found, "finish_reason": "stop"}

    whole = asked(front[1], **{**BODY, "max_tokens": 1})["choices"][0]
    monkeypatch.setattr(fake, "piece", formed)
    choice = asked(front[1], **BODY)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole["text"], "stop")


def test_a_server_that_says_nothing_is_not_asked_twice(front, fake, monkeypatch):
    client = front[1]
    asked(client, **BODY)
    monkeypatch.setattr(front[0].service.batcher._fleet._client, "timeout", httpx.Timeout(0.5))
    before = len(fake.bodies)
    fake.behaviour = "hang"
    answer = client.post("/v1/completions", json=BODY)
    assert answer.status_code == 502
    assert "did not answer in time" in answer.text
    assert len(fake.bodies) == before + 1
    until(lambda: fake.running == 0)  # and was hung up on
    line = f'softprompt_upstream_errors_total{{error="timeout",upstream="{fake.url}"}} 1.0'
    assert line in client.get("/metrics").text


def test_servers_take_turns_and_one_that_cannot_be_reached_is_passed_over(base, shared_prompts):
    with faked(base) as first:
        with faked(base) as second, over([first, second], shared_prompts) as server, server.client() as client:
            for _ in range(4):
                asked(client, **BODY)
            assert [sum(each["max_tokens"] == 6 for each in fake.bodies) for fake in (first, second)] == [2, 2]
            second_url = second.url
            servers = server.service.batcher._fleet.servers
            servers[1].address = "http://127.0.0.1:1"  # as if the second one had gone
            for _ in range(4):
                asked(client, **BODY)
            assert sum(each["max_tokens"] == 6 for each in first.bodies) == 6
            assert 'error="connect",upstream="http://127.0.0.1:1"} 1.0' in client.get("/metrics").text
            assert client.get("/ready").status_code == 200
            servers[0].address = "http://127.0.0.1:1"
            gone = client.post("/v1/completions", json=BODY)
            assert (gone.status_code, gone.json()["error"]["code"]) == (502, "upstream_failed")
            unready = client.get("/ready")
            assert (unready.status_code, "behind this one can be used" in unready.text) == (503, True)
            servers[1].address = second_url  # it is back: the one set aside longest ago is tried first
            asked(client, **BODY)


@pytest.mark.parametrize(
    ("version", "named"),
    [
        (404, "vLLM (version unknown)"),
        pytest.param(405, "vLLM (version unknown)", marks=pytest.mark.slow),
        pytest.param("1.2", "vLLM 1.2", marks=pytest.mark.slow),
    ],
)
def test_a_router_that_does_not_say_the_version_is_served_over(base, shared_prompts, version, named):
    with faked(base) as fake:
        fake.version = version
        with over([fake], shared_prompts) as server, server.client() as client:
            (reason,) = {each["engine_reason"] for each in client.get("/v1/models").json()["data"]}
            assert reason == f"{named}, prompts as embeddings beside text"
            asked(client, **BODY)


def test_a_server_that_fails_when_asked_for_its_version_is_refused(base, shared_prompts):
    with faked(base) as fake, pytest.raises(UsageError, match="status 500"):
        fake.version = 500
        with over([fake], shared_prompts):
            pass


def test_a_client_that_hangs_up_is_hung_up_on_there(front, fake):
    server, client = front
    fake.slow = 0.05
    with client.stream("POST", "/v1/completions", json={**BODY, "stream": True, "max_tokens": 100}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert fake.running == 1
    until(lambda: fake.running == 0)
    until(lambda: server.service.batcher.stats.running == 0)
    fake.behaviour = "hang"
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=BODY, timeout=0.2)
    until(lambda: fake.running == 0)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/classify", json={"model": "complaints", "input": "a"}, timeout=0.2)
    until(lambda: fake.running == 0)


def test_time_is_kept_here(front, fake):
    fake.slow = 0.05
    (choice,) = asked(front[1], **{**BODY, "max_tokens": 100, "min_tokens": 100, "max_time": 1.0})["choices"]
    assert choice["finish_reason"] == "time"
    assert choice["text"]
    until(lambda: fake.running == 0)


def test_a_stop_ends_what_is_open(fake, shared_prompts):
    fake.slow = 0.05
    with over([fake], shared_prompts, drain_seconds=0.1) as server:
        answers = []

        def ask():
            with server.client() as client:
                answers.append(client.post("/v1/completions", json={**BODY, "max_tokens": 150}))

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: fake.running == 1)
        server.uvicorn.should_exit = True
        thread.join(10)
        assert answers[0].status_code == 503
        until(lambda: fake.running == 0)
    fake.slow = 0.0


def test_keys_go_to_the_servers_and_no_further(base, shared_prompts, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    with faked(base, key="secret") as fake:
        with (
            over([fake], shared_prompts, upstream_key_file=str(tmp_path / "key")) as server,
            server.client() as client,
        ):
            asked(client, **BODY)
            fake.key = "another"
            answer = client.post("/v1/completions", json=BODY)
            assert answer.status_code == 502
            assert "--upstream-key-file" in answer.text
            assert "secret" not in answer.text


def test_a_full_queue_is_refused(front, fake):
    fake.slow = 0.05
    server, client = front
    bounds = server.service.batcher.bounds
    object.__setattr__(bounds, "max_queue", 1)
    body = {**BODY, "stream": True, "max_tokens": 50, "min_tokens": 50}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert client.post("/v1/completions", json=BODY).status_code == 429
    object.__setattr__(bounds, "max_queue", 0)
    labels = client.post("/v1/classify", json={"model": "complaints", "input": "a"})
    assert (labels.status_code, labels.json()["error"]["message"]) == (
        429,
        "0 requests wait already; try again later",
    )
    object.__setattr__(bounds, "max_queue", 256)


def test_a_server_that_stops_takes_no_more(base, shared_prompts):
    with faked(base) as fake, over([fake], shared_prompts) as server, server.client() as client:
        server.service.batcher.drain()
        answer = client.post("/v1/completions", json=BODY)
        assert answer.status_code == 503
        assert (
            answer.json()["error"]["message"]
            == "serving is stopping and takes no more requests; ask another server"
        )


@pytest.mark.slow
def test_a_server_that_cannot_be_used_now_leaves_requests_to_the_others(base, shared_prompts):
    with (
        faked(base) as first,
        faked(base, embeds=False) as second,
        over([first, second], shared_prompts) as server,
        server.client() as client,
    ):
        for _ in range(4):  # the second takes no embeddings
            asked(client, **BODY)
        assert [sum(each["max_tokens"] == 6 for each in fake.bodies) for fake in (first, second)] == [4, 0]
        servers = server.service.batcher._fleet.servers
        servers[1].known, second.behaviour = False, 500  # asked again, it fails before anything is sent
        for _ in range(2):
            asked(client, **BODY)
        assert 'error="status"' in client.get("/metrics").text


def test_answers_that_are_no_answers_are_the_servers_fault(front, fake, monkeypatch):
    client = front[1]
    body = {"model": "complaints", "input": "a"}
    monkeypatch.setattr(fake, "whole", lambda body: {"choices": [{}], "prompt_token_ids": [1]})
    answer = client.post("/v1/classify", json=body)
    assert (answer.status_code, "reads other tokens than were meant" in answer.text) == (502, True)
    monkeypatch.undo()
    plain = fake.piece

    def unlisted(body, scores, token):
        return plain({**body, "logprob_token_ids": None}, scores, token)

    monkeypatch.setattr(fake, "piece", unlisted)
    answer = client.post("/v1/classify", json=body)
    assert (answer.status_code, "of listed tokens" in answer.text) == (502, True)


def test_the_labels_of_one_request_are_bounded(front):
    labels = [f"{number} {'a b ' * 20}" for number in range(100)]
    answer = front[1].post("/v1/classify", json={"model": "demo", "input": ["a"] * 64, "labels": labels})
    assert answer.status_code == 400
    assert "at most 100,000; send fewer texts at a time" in answer.text


def test_callers_of_the_scorer_take_turns(base, shared_prompts):
    long = {"model": "demo", "input": [f"text {i}" for i in range(4)], "labels": [f"{i} b" for i in range(10)]}
    bounds = Bounds(max_batch_rows=2)
    with faked(base) as fake, over([fake], shared_prompts, bounds=bounds) as server, ThreadPoolExecutor(1) as pool:
        with server.client() as client, server.client() as other:
            answer = pool.submit(client.post, "/v1/classify", json=long)
            until(lambda: len(fake.bodies) > 5)
            asked(other, "/v1/classify", model="complaints", input="a")
            assert not answer.done()
            assert len(answer.result(60).json()["data"]) == 4


def test_one_input_has_like_scores_however_it_is_put():
    assert alike({1: -1.0, 2: -2.0}, {1: -1.01, 3: -1.98})
    assert not alike({1: -1.0, 2: -2.0}, {1: -1.2, 2: -2.0})
    assert not alike({1: -1.0, 2: -2.0}, {3: -2.5, 4: -3.0})  # none of them alike, and none listed twice


@pytest.mark.parametrize("text", ["", "sk-1\nsk-2\n", "Schlüssel\n", "sk-3\tsk-4\x07\n"])
def test_a_file_that_holds_no_one_key_is_refused_without_showing_it(fake, shared_prompts, tmp_path, text):
    (tmp_path / "key").write_text(text)
    with (
        pytest.raises(UsageError) as refused,
        over([fake], shared_prompts, upstream_key_file=str(tmp_path / "key")),
    ):
        pass
    assert not any(word in str(refused.value) for word in text.split())


def test_a_server_that_is_no_vllm_is_refused_in_one_line(base, shared_prompts, monkeypatch):
    with faked(base) as fake:
        monkeypatch.setattr(fake, "whole", lambda body: {"choices": []})
        with pytest.raises(UsageError, match="does not answer as vLLM does"), over([fake], shared_prompts):
            pass


def test_what_breaks_while_the_servers_thread_ends_is_not_examined():
    fleet, begun = Fleet(["http://127.0.0.1:1"], None, seconds=1.0), threading.Event()
    (server,) = fleet.servers

    async def broken():
        with fleet._failing(server):
            try:
                begun.set()
                await asyncio.sleep(60)
            finally:
                raise httpx.ReadError("closed")

    ended = fleet.run(broken())
    assert begun.wait(20)
    fleet.stop()
    assert ended.done()
    assert (fleet.errors[server.address, "broken"], server.examined) == (1, None)


def test_limits_that_do_nothing_are_no_metrics(fake, shared_prompts):
    with over([fake], shared_prompts, bounds={"max_mixed_step_tokens": 64}) as server, server.client() as client:
        assert "step_tokens" not in client.get("/metrics").text


def test_what_comes_while_the_servers_thread_ends_is_refused():
    async def nothing():
        pass

    fleet = Fleet(["http://127.0.0.1:1"], None, seconds=1.0)
    fleet.stop()
    with pytest.raises(NotServingError, match="serving has stopped"):
        fleet.run(nothing())
    fleet.stop()
