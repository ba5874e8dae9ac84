"""Bodies are read in a thread, one at a time, and the event loop answers meanwhile; collections are short."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from oracles.slow import only
from softprompt.data import special_tokens
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


def asked(path, text):
    """Return a body that asks an endpoint about a text."""
    name = "prompt" if path == "completions" else "input"
    model = {"classify": "complaints", "embeddings": "demo"}.get(path, "writer")
    if path == "chat/completions":
        return {"model": model, "messages": [{"role": "user", "content": text}]}
    return {"model": model, name: text}


@pytest.mark.parametrize("path", only(["completions"], PATHS))
def test_short_texts_are_answered_while_more_long_ones_wait_than_there_are_threads(chat_server, monkeypatch, path):
    tokenised, go_on, held = threading.Event(), threading.Event(), []
    broken = special_tokens.broken

    def waits(text):
        if len(text) > 20_000:
            held.append(threading.current_thread())
            tokenised.set()
            assert go_on.wait(60)
        return broken(text)

    monkeypatch.setattr(special_tokens, "broken", waits)
    count = 45  # anyio has 40 threads
    with chat_server.client() as client, ThreadPoolExecutor(count) as pool:
        long = [pool.submit(client.post, f"/v1/{path}", json=asked(path, "ab " * 7_000)) for _ in range(count)]
        try:
            assert tokenised.wait(20)
            time.sleep(0.2)
            assert client.post(f"/v1/{path}", json=asked(path, "short"), timeout=20).status_code == 200
            assert len(held) == 1
        finally:
            go_on.set()
        assert {each.result(60).status_code for each in long} == {400}
    assert len(held) == count


def test_while_the_server_runs_collections_look_through_nothing_loaded_before(monkeypatch):
    walked = []

    def note():
        walked.append(len(gc.get_objects()))

    server = SimpleNamespace(run=lambda **_: note(), force_exit=False)
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
