"""Connections are bounded, probes may ask with HEAD, and a scorer that stops leaves nobody waiting."""

import socket
import threading
import time

import pytest

from oracles.serving import ScriptedBatcher, app_over, running, until
from softprompt.errors import NotServingError
from softprompt.inference.continuous.scorer import Scorer


def test_connections_are_bounded(base, shared_prompts):
    app = app_over(base, shared_prompts, ScriptedBatcher(), max_connections=1)
    with running(app) as server:
        port = int(server.url.rpartition(":")[2])
        with server.client() as client:
            assert client.head("/health").status_code == 200
            with socket.create_connection(("127.0.0.1", port)):
                until(lambda: len(server.uvicorn.server_state.connections) == 2)
                assert client.get("/health").status_code == 503
            until(lambda: len(server.uvicorn.server_state.connections) < 2)
        until(lambda: not server.uvicorn.server_state.connections)
        with server.client() as client:
            assert client.get("/health").status_code == 200


def test_a_request_in_the_middle_of_a_stop_is_refused(base, monkeypatch):
    scorer = Scorer(base.model, max_rows=4, max_waiting=4)
    stopping = threading.Thread(target=scorer.stop)
    put = scorer._waiting.put_nowait

    def late(item):
        stopping.start()
        time.sleep(0.05)
        put(item)

    monkeypatch.setattr(scorer._waiting, "put_nowait", late)
    answer = scorer.submit(None, ())
    stopping.join(5)
    with pytest.raises(NotServingError):
        answer.result(1)
    with pytest.raises(NotServingError):
        scorer.submit(None, ())
