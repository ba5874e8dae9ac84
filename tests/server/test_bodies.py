"""Bodies are read in a thread, one at a time, and the event loop answers others meanwhile; collections are short."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from softprompt.server import app, bodies

PATHS = ("completions", "chat/completions", "responses", "classify", "embeddings")


@pytest.mark.parametrize("path", PATHS)
def test_health_answers_while_a_body_is_read(client, monkeypatch, path):
    reading, go_on, threads = threading.Event(), threading.Event(), []
    checked = bodies._checked

    def held(body, kind):
        threads.append(threading.current_thread())
        reading.set()
        assert go_on.wait(20)
        return checked(body, kind)

    monkeypatch.setattr(bodies, "_checked", held)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(client.post, f"/v1/{path}", json={"model": "no such"}) for _ in range(2)]
        assert reading.wait(20)
        time.sleep(0.05)
        assert client.get("/health").status_code == 200
        assert len(threads) == 1
        go_on.set()
        assert {each.result(20).status_code for each in answers} <= {400, 404}
    assert len(threads) == 2


def test_while_the_server_runs_collections_look_through_nothing_loaded_before(monkeypatch):
    walked = []

    def note():
        walked.append(len(gc.get_objects()))

    server = SimpleNamespace(run=lambda sockets: note(), force_exit=False)
    monkeypatch.setattr(app, "config_of", lambda *_: None)
    monkeypatch.setattr(app, "server_of", lambda *_: server)
    gc.unfreeze()  # what tests/conftest.py has frozen
    try:
        note()
        app._run(None, None, None)
        note()
    finally:
        gc.freeze()
    before, running, behind = walked
    assert before > 100_000
    assert running < before / 20
    assert behind > before / 2
