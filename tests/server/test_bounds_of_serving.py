"""Connections are bounded for all but probes, and a scorer that stops leaves nobody waiting."""

import http.client
import socket
import threading
import time
from collections import deque
from contextlib import ExitStack
from types import SimpleNamespace

import openai
import pytest

from oracles.serving import ScriptedBatcher, app_over, running, until
from oracles.slow import only
from softprompt.engine import ResidentPrompts
from softprompt.errors import NotServingError
from softprompt.generation import Bounds, Scorer
from softprompt.server.middleware import Connections

BODY = {"model": "writer", "prompt": "hello", "max_tokens": 3}


@pytest.fixture
def narrow(base, shared_prompts):
    """A server that takes two connections."""
    app = app_over(base, shared_prompts, ScriptedBatcher(auto=True), max_connections=2)
    with running(app) as server:
        yield server


def connected(server, count):
    return lambda: len(server.uvicorn.server_state.connections) == count


def asking(server):
    """Return a connection whose request has begun and does not end."""
    found = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    found.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n")
    own, opened = found.getsockname(), server.uvicorn.server_state.connections
    until(lambda: any(each.cycle for each in list(opened) if each.client == own))
    return found


def test_a_silent_connection_makes_room_for_a_request_with_a_key(base, shared_prompts, tmp_path):
    (tmp_path / "keys").write_text("one\n")
    app = app_over(
        base, shared_prompts, ScriptedBatcher(auto=True), max_connections=2, api_key_file=str(tmp_path / "keys")
    )
    with running(app) as server, ExitStack() as stack:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        silent = [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(2)]
        until(connected(server, 2))
        with server.client() as client:
            assert client.post("/v1/completions", json=BODY).status_code == 503
        until(connected(server, 2))
        with server.client(headers={"Authorization": "Bearer one"}) as client:
            assert client.post("/v1/completions", json=BODY).status_code == 200
            until(connected(server, 2))
        for each in silent:
            each.setblocking(False)
        assert [_is_closed(each) for each in silent].count(True) == 1


def _is_closed(sock):
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False


def test_connections_are_bounded_and_probes_are_answered(narrow):
    with ExitStack() as stack:
        client = stack.enter_context(narrow.client())
        stack.enter_context(asking(narrow))
        assert client.post("/v1/completions", json=BODY).status_code == 200
        stack.enter_context(asking(narrow))
        until(connected(narrow, 2))  # the client's was idle, and made room
        found = client.post("/v1/completions", json=BODY)
        assert found.status_code == 503
        assert found.headers["retry-after"] == "1"
        assert found.headers["content-type"] == "application/json"
        error = found.json()["error"]
        assert (error["code"], error["type"]) == ("unavailable", "server_error")
        assert "2 connections" in error["message"]
        until(connected(narrow, 2))  # the one that was refused is closed, the others stay
        for path in ("/health", "/ready", "/metrics"):
            assert client.get(path).status_code == 200, path
        assert 'requests_refused_total{code="503"} 1.0' in client.get("/metrics").text
        with pytest.raises(openai.InternalServerError, match="connections open"):
            narrow.openai().completions.create(**BODY)
    until(connected(narrow, 0))
    with narrow.client() as client:
        assert client.post("/v1/completions", json=BODY).status_code == 200


def test_openais_client_waits_and_comes_again(narrow):
    port = int(narrow.url.rpartition(":")[2])
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
    until(connected(narrow, 2))
    closing = threading.Timer(0.3, lambda: [each.close() for each in held])
    closing.start()
    found = narrow.openai(max_retries=2).completions.create(**BODY)
    assert found.choices[0].text == " 5 6 7"
    closing.join()


def asked_again(server, head, times=2):
    """Ask on one connection until it is closed; returns how often there was an answer."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        for number in range(times):
            try:
                sock.sendall(head)
                with http.client.HTTPResponse(sock) as answer:  # whole: its head may come before its body
                    answer.begin()
                    answer.read()
            except (OSError, http.client.HTTPException):
                return number
    return times


def test_connections_that_only_probe_make_room_where_it_is_scarce(base, shared_prompts, tmp_path):
    (tmp_path / "keys").write_text("one\n")
    app = app_over(
        base, shared_prompts, ScriptedBatcher(auto=True), max_connections=4, api_key_file=str(tmp_path / "keys")
    )
    head, key = "GET {} HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "Authorization: Bearer one\r\n"
    with running(app) as server, ExitStack() as stack:
        assert asked_again(server, head.format("/health", "").encode()) == 2
        port = int(server.url.rpartition(":")[2])
        for _ in range(2):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        until(connected(server, 2))
        assert asked_again(server, head.format("/health", key).encode()) == 1
        until(connected(server, 2))
        assert asked_again(server, head.format("/v1/models", "").encode()) == 1
        until(connected(server, 2))
        assert asked_again(server, head.format("/v1/models", key).encode()) == 2


def test_a_request_of_two_lengths_is_refused_and_closed(narrow):
    body = b"0\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    both = (b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n")
    for lengths in (both, both[::-1]):
        port = int(narrow.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            sock.sendall(head + b"".join(lengths) + b"\r\n" + body + HEAD + b"\r\n")
            came = b""
            while piece := sock.recv(65536):
                came += piece
        assert came.startswith(b"HTTP/1.1 400")
        assert came.count(b"HTTP/1.1") == 1


HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def impatient(base, shared_prompts):
    """A server that waits half a second for a request to begin."""
    app = app_over(base, shared_prompts, ScriptedBatcher(), body_seconds=0.5, poll_seconds=0.05)
    with running(app) as server:
        yield server


@pytest.mark.parametrize("sent", only([b"", HEAD + b"\r\n" + HEAD], [b"", HEAD[:30], HEAD, HEAD + b"\r\n" + HEAD]))
def test_a_connection_that_does_not_ask_is_closed(impatient, sent):
    port = int(impatient.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(sent)
        came = b""
        while piece := sock.recv(65536):
            came += piece
    assert came.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")
    until(connected(impatient, 0))


class Connection:
    """A connection of uvicorn's as far as we look at it."""

    def __init__(self):
        self.cycle, self.transport, self.closed = None, self, False

    def ask(self, *, answered):
        self.cycle = SimpleNamespace(response_complete=answered)

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed


def test_only_silence_closes_a_connection(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    busy, regular, stopped = (Connection() for _ in range(3))
    state = SimpleNamespace(connections={busy, regular, stopped})
    connections = Connections(SimpleNamespace(server_state=state))
    busy.ask(answered=False)
    stopped.ask(answered=True)
    for _ in range(20):
        # Every look finds this one between two requests, and each time behind another one.
        regular.ask(answered=True)
        connections.close_silent(5)
        now += 1
    assert (busy.closed, regular.closed, stopped.closed) == (False, False, True)
    busy.cycle.response_complete = True
    connections.close_silent(5)
    assert not busy.closed, "its silence has only begun"
    now += 6
    connections.close_silent(5)
    assert busy.closed
    assert connections.count == 3


def test_the_connection_that_is_silent_longest_makes_room(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    busy, first, second = (Connection() for _ in range(3))
    state = SimpleNamespace(connections={busy, first})
    connections = Connections(SimpleNamespace(server_state=state))
    busy.ask(answered=False)
    connections.close_silent(5)
    now += 1
    state.connections.add(second)
    assert connections.make_room()
    assert (busy.closed, first.closed, second.closed) == (False, True, False)
    assert connections.make_room()
    assert second.closed
    assert not connections.make_room(), "nobody is silent any more"
    assert not busy.closed


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_may_ask_with_head(narrow, path):
    with narrow.client() as client:
        found = client.head(path)
        assert (found.status_code, found.content) == (200, b"")
        assert client.head(path).status_code == 200, "the connection goes on"


def test_not_ready_while_anything_has_stopped(base, shared_prompts):
    batcher = ScriptedBatcher(auto=True)
    with running(app_over(base, shared_prompts, batcher)) as server, server.client() as client:
        assert client.get("/ready").status_code == 200
        batcher.healthy, batcher.failure = False, ValueError("a secret")
        found = client.get("/ready")
        assert found.status_code == client.head("/ready").status_code == 503
        assert "ValueError" in found.text
        assert "secret" not in found.text
        batcher.healthy = True
        server.service.scorer.stop()
        found = client.get("/ready")
        assert found.status_code == 503
        assert "label scoring has stopped" in found.json()["error"]["message"]
        assert client.get("/health").status_code == 200


def test_a_scorer_that_breaks_says_so(base, monkeypatch):
    scorer = Scorer(
        base.model,
        Bounds(max_batch_rows=1, max_score_rows=4, max_step_tokens=64, max_queue=4),
        ResidentPrompts(0, 0),
    )
    waiting = scorer.submit(())
    monkeypatch.setattr(scorer, "_turn", lambda: 1 / 0)
    scorer.start()
    with pytest.raises(NotServingError, match="scoring has failed"):
        waiting.result(5)
    until(lambda: not scorer.healthy)
    with pytest.raises(NotServingError, match="takes no more"):
        scorer.submit(())
    scorer.stop()


def test_a_request_in_the_middle_of_a_stop_is_refused(base, monkeypatch):
    scorer = Scorer(
        base.model,
        Bounds(max_batch_rows=1, max_score_rows=4, max_step_tokens=64, max_queue=4),
        ResidentPrompts(0, 0),
    )
    stopping = threading.Thread(target=scorer.stop)

    class Late(deque):
        def append(self, item):
            stopping.start()
            time.sleep(0.05)
            super().append(item)

    monkeypatch.setattr(scorer, "_waiting", Late())
    answer = scorer.submit(())
    stopping.join(5)
    with pytest.raises(NotServingError):
        answer.result(1)
    with pytest.raises(NotServingError):
        scorer.submit(())
