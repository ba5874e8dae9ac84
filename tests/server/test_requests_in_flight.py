"""Clients that vanish, stall or wait, and a batcher that is full, slow or broken."""

import json
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import openai
import pytest

from oracles.serving import ScriptedBatcher, app_over, running, until

BODY = {"model": "writer", "prompt": "hello", "max_tokens": 8}


@pytest.fixture
def scripted(base, shared_prompts):
    """A server over a batcher that waits to be told, with short times."""
    batcher = ScriptedBatcher()
    app = app_over(
        base,
        shared_prompts,
        batcher,
        request_seconds=30.0,
        body_seconds=0.3,
        stall_seconds=0.5,
        max_body_bytes=100_000,
    )
    with running(app) as server:
        yield server, batcher
        for ticket in batcher.tickets:
            ticket.push(last=True)


def raw(server, text, **more):
    """Open a connection and send bytes on it."""
    host, port = server.url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=20)
    sock.sendall(text)
    return sock


def posted(body, path="/v1/completions", host="127.0.0.1"):
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def status_of(sock):
    head = b""
    while b"\r\n\r\n" not in head:
        piece = sock.recv(65536)
        if not piece:
            break
        head += piece
    head, _, rest = head.partition(b"\r\n\r\n")
    while b"connection: close" in head.lower() and (piece := sock.recv(65536)):
        rest += piece
    return int(head.split()[1]), rest


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_is_cancelled(scripted, stream):
    server, batcher = scripted
    sock = raw(server, posted({**BODY, "stream": stream, "prompt": ["a", "b"]}))
    until(lambda: len(batcher.tickets) == 2)
    batcher.tickets[0].push(batcher.token(5))
    if stream:
        assert status_of(sock)[0] == 200
    assert batcher.cancelled == 0
    sock.close()
    until(lambda: all(ticket.is_cancelled for ticket in batcher.tickets))


def test_a_client_that_vanishes_is_not_scored_for(scripted):
    server, _ = scripted
    waiting = Future()
    server.service.scorer.submit = lambda *_: waiting
    asked = {"model": "complaints", "input": ["a", "b"]}
    sock = raw(server, posted(asked, "/v1/classify"))
    time.sleep(0.1)
    sock.close()
    until(waiting.cancelled)
    counted = 'request_success_total{finished_reason="abort",model_name="complaints"} 2.0'
    until(lambda: counted in server.service.metrics.page().decode())


def test_a_finished_request_is_not_cancelled(scripted):
    server, batcher = scripted
    batcher.auto = True
    with server.client() as client:
        assert client.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == " 5 6 7"
    assert batcher.cancelled == 0


def test_tokens_come_one_by_one(scripted):
    server, batcher = scripted
    stream = server.openai().completions.create(**BODY, stream=True)
    chunks = iter(stream)
    until(lambda: batcher.tickets)
    for token in (5, 6):
        batcher.tickets[0].push(batcher.token(token))
        assert next(chunks).choices[0].text == f" {token}"
    batcher.finish(batcher.tickets[0], "time")
    assert next(chunks).choices[0].finish_reason == "time"
    assert list(chunks) == []


def test_a_reader_that_stalls_is_hung_up_on(scripted):
    server, batcher = scripted
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = server.url.removeprefix("http://").split(":")
    sock.connect((host, int(port)))
    sock.sendall(posted({**BODY, "stream": True}))
    until(lambda: batcher.tickets)
    ticket = batcher.tickets[0]
    long = batcher.token(5)
    object.__setattr__(long, "text", "x" * 100_000)
    for _ in range(100):
        ticket.push(long)
    until(lambda: ticket.is_cancelled, 20)
    batcher.auto = True
    with server.client() as client:
        assert client.post("/v1/completions", json=BODY).status_code == 200
    sock.close()


def test_a_full_queue(scripted):
    server, batcher = scripted
    batcher.full = True
    with server.client() as client:
        found = client.post("/v1/completions", json=BODY)
    assert found.status_code == 429
    assert found.headers["retry-after"] == "3"
    assert found.json()["error"] == {
        "message": "the queue is full; try again in 3 s",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }
    with pytest.raises(openai.RateLimitError):
        server.openai().completions.create(**BODY)


def test_all_of_a_request_or_none(scripted):
    server, batcher = scripted
    own = batcher.submit
    batcher.submit = lambda request: own(request) if len(batcher.tickets) < 2 else full()

    def full():
        batcher.full = True
        return own(None)

    with server.client() as client:
        found = client.post("/v1/completions", json={**BODY, "prompt": ["a", "b", "c"]})
    assert found.status_code == 429
    assert [ticket.is_cancelled for ticket in batcher.tickets] == [True, True]


@pytest.mark.slow
def test_the_client_retries_by_itself(scripted):
    server, batcher = scripted
    batcher.full, batcher.auto = True, True
    calls = []
    own = batcher.submit

    def later(request):
        calls.append(time.monotonic())
        batcher.full = len(calls) < 2
        return own(request)

    batcher.submit = later
    found = server.openai(max_retries=1).completions.create(**BODY)
    assert found.choices[0].text == " 5 6 7"
    assert calls[1] - calls[0] > 2


def test_a_request_that_fails_fails_alone(scripted):
    server, batcher = scripted
    answers = {}

    def ask(name, stream):
        with server.client() as client:
            answers[name] = client.post("/v1/completions", json={**BODY, "stream": stream})

    threads = [
        threading.Thread(target=ask, args=(name, stream))
        for name, stream in (("bad", False), ("bad stream", True), ("good", False))
    ]
    for count, thread in enumerate(threads, start=1):
        thread.start()
        until(lambda count=count: len(batcher.tickets) == count)
    batcher.tickets[1].push(batcher.token(5))
    for ticket in batcher.tickets[:2]:
        ticket.push(error=RuntimeError("secret detail"))
    batcher.answer(batcher.tickets[2])
    for thread in threads:
        thread.join()
    assert answers["bad"].status_code == 500
    assert "secret" not in answers["bad"].text + answers["bad stream"].text
    assert answers["bad"].json()["error"]["type"] == "server_error"
    events = answers["bad stream"].text.strip().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert events[-1] == "data: [DONE]"
    assert answers["good"].status_code == 200
    with pytest.raises(openai.APIError, match="failed on this request"):
        failing = server.openai().completions.create(**BODY, stream=True)
        until(lambda: len(batcher.tickets) == 4)
        batcher.tickets[3].push(error=RuntimeError("secret"))
        list(failing)


def test_time_is_over(base, shared_prompts):
    batcher = ScriptedBatcher()
    app = app_over(base, shared_prompts, batcher, request_seconds=0.1)
    with running(app) as server, server.client() as client:
        found = client.post("/v1/completions", json=BODY)
        assert found.status_code == 503
        assert "no answer within 0.1 s" in found.json()["error"]["message"]
        assert batcher.tickets[0].is_cancelled
        assert batcher.tickets[0].request.options.max_time == 0.1


def test_a_body_that_is_too_large(scripted):
    server, batcher = scripted
    with server.client() as client:
        found = client.post("/v1/completions", json={**BODY, "prompt": "x" * 10_000_000})
        assert found.status_code == 413
        assert found.json()["error"]["code"] == "request_too_large"
        pieces = (b"x" * 50_000 for _ in range(10))
        found = client.post("/v1/completions", content=pieces, headers={"content-type": "application/json"})
        assert found.status_code == 413
        assert client.get("/health").status_code == 200
    assert batcher.tickets == []


def test_a_length_that_lies(scripted):
    server, _ = scripted
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for length in (b"-1", b"99999999999999999999", b"x"):
        with raw(server, head + b"Content-Length: " + length + b"\r\n\r\n{}") as sock:
            assert status_of(sock)[0] in (400, 413)


def test_a_body_that_does_not_come(scripted):
    server, batcher = scripted
    started = time.monotonic()
    with raw(server, posted(BODY)[:-5]) as sock:
        status, body = status_of(sock)
    assert status == 408
    assert json.loads(body)["error"]["code"] == "request_timeout"
    assert time.monotonic() - started < 5
    assert batcher.tickets == []


def test_not_ready_when_the_engine_is_gone(scripted):
    server, batcher = scripted
    with server.client() as client:
        assert client.get("/ready").json() == {"status": "ready"}
        batcher.healthy = False
        found = client.get("/ready")
        assert found.status_code == 503
        assert found.json()["error"]["code"] == "unavailable"
        assert client.get("/health").json() == {"status": "ok"}
        batcher.closing = True
        found = client.post("/v1/completions", json=BODY)
        assert found.status_code == 503


def test_running_answers_finish_when_the_server_stops(base, shared_prompts):
    batcher = ScriptedBatcher()
    with running(app_over(base, shared_prompts, batcher)) as server:
        stream = server.openai().completions.create(**BODY, stream=True)
        until(lambda: batcher.tickets)
        ticket = batcher.tickets[0]
        ticket.push(batcher.token(5))
        chunks = iter(stream)
        assert next(chunks).choices[0].text == " 5"
        server.uvicorn.should_exit = True
        until(lambda: not server.uvicorn.servers or not server.uvicorn.servers[0].is_serving())
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=1)
        ticket.push(batcher.token(6))
        assert next(chunks).choices[0].text == " 6"
        batcher.finish(ticket)
        assert next(chunks).choices[0].finish_reason == "stop"
        assert list(chunks) == []
    assert batcher.closing
    assert server.service.draining


def test_a_server_that_stops_is_not_ready(client, server, monkeypatch):
    monkeypatch.setattr(server.service, "draining", True)
    found = client.get("/ready")
    assert (found.status_code, found.json()["error"]["message"]) == (503, "the server is stopping")
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_are_ended_by_the_server_say_so(base, shared_prompts, stream):
    app = app_over(base, shared_prompts, drain_seconds=0.1)
    with running(app) as server, ThreadPoolExecutor(1) as threads:
        service = server.service
        body = {**BODY, "max_tokens": 400, "min_tokens": 400, "n": 16, "stream": stream}
        with server.client() as client:
            asked = threads.submit(client.post, "/v1/completions", json=body)
            until(lambda: service.batcher.stats.running)
            server.uvicorn.should_exit = True
            found = asked.result()
        if stream:
            *_, last, done = found.text.split("\n\n")[:-1]
            assert (found.status_code, done) == (200, "data: [DONE]")
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            assert found.status_code == 503
            error = found.json()["error"]
        assert error["code"] == "unavailable"
        assert "the server stopped" in error["message"]
        assert "cancelled" not in service.metrics.page().decode()


def test_answers_that_take_too_long_end_with_the_server(base, shared_prompts):
    batcher = ScriptedBatcher()
    with running(app_over(base, shared_prompts, batcher), grace=1) as server:
        sock = raw(server, posted({**BODY, "stream": True}))
        until(lambda: batcher.tickets)
        started = time.monotonic()
    assert time.monotonic() - started < 8
    assert batcher.tickets[0].is_cancelled
    sock.close()
