"""Bounds hold, and a batcher stops as it was asked to."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from oracles.served import served
from softprompt.engine import ResidentPrompts
from softprompt.errors import ConfigError, NotServingError, QueueFullError, ServingError
from softprompt.generation import Batcher, Bounds, GenerationOptions, Request
from softprompt.prompts import Prompt

IDS = (1, 40, 41, 42, 43)
LONG = GenerationOptions(max_new_tokens=30)


@pytest.fixture(scope="module")
def base():
    return served("llama")


@pytest.fixture
def made(base):
    started = []

    def make(**bounds):
        settings = {"max_batch_rows": 4, "max_step_tokens": 8, **bounds}
        started.append(Batcher(base.base, Bounds(**settings)))
        return started[-1]

    yield make
    for batcher in started:
        batcher.stop()


def test_a_full_queue_says_when_to_come_back(base, made):
    batcher = made(max_queue=3)
    with base.base.lock:
        tickets = []
        with pytest.raises(QueueFullError, match="max_queue; try again in") as caught:
            for _ in range(20):
                tickets.append(batcher.submit(base.request("plain", IDS, options=LONG)))
        assert 1 <= caught.value.retry_after <= 60
        assert len(tickets) <= 4 + 3
    assert all(ticket.result(30) for ticket in tickets)


def test_waiting_for_room_in_the_queue(base, made):
    batcher = made(max_queue=1, max_batch_rows=1)
    tickets = [batcher.submit(base.request("plain", IDS), wait=True) for _ in range(6)]
    assert len({ticket.result(30)[0].text for ticket in tickets}) == 1


def test_tokens_of_running_rows_are_bounded(base, made):
    batcher = made(max_cached_tokens=96, max_batch_rows=8)
    tickets = [
        batcher.submit(base.request("plain", IDS * n, options=GenerationOptions(max_new_tokens=m)))
        for n, m in [(1, 2), (5, 20), (2, 9), (1, 3), (4, 30), (1, 20), (3, 4)]
    ]
    most = 0
    while not all(ticket.is_done for ticket in tickets):
        most = max(most, batcher.stats.cached_tokens)
        time.sleep(0.001)
    assert 0 < most <= 96
    for ticket in tickets:
        request = ticket.request
        assert ticket.result()[0].text == base.alone("plain", request.ids, request.options).text
    with pytest.raises(ServingError, match="max_cached_tokens"):
        batcher.submit(base.request("plain", IDS * 10, options=GenerationOptions(max_new_tokens=2), n=2))


def test_resident_prompts_are_bounded_and_dropping_one_changes_no_answer(base, made):
    batcher = made(max_prompts_resident=2, max_prompt_tokens=7)
    values = [Prompt(torch.randn(3, 32)) for _ in range(6)]
    asked = [Request(IDS, values[i % 6], options=LONG) for i in range(18)]
    tickets = [batcher.submit(request) for request in asked]
    texts = [ticket.result(60)[0].text for ticket in tickets]
    assert batcher.stats.resident_prompts <= 2 and batcher.stats.resident_tokens <= 7
    assert [text == texts[i % 6] for i, text in enumerate(texts)] == [True] * 18
    again = [batcher.submit(request).result(60)[0].text for request in asked[:6]]
    assert again == texts[:6]
    assert batcher.stats.prompt_misses >= 6


def test_a_prompt_is_computed_once_for_all_that_wait_for_it(base, made):
    batcher = made()
    with base.base.lock:
        tickets = [batcher.submit(base.request("plain", IDS)) for _ in range(9)]
    for ticket in tickets:
        ticket.result(30)
    assert (batcher.stats.prompt_misses, batcher.stats.prompt_hits) == (1, 8)


def test_least_recently_used_goes_first():
    kept = ResidentPrompts(2, 100)
    one, two, three = (("k" + str(i), ()) for i in range(3))
    value = torch.zeros(1, 2, 1, 5, 4)
    kept.keep(one, value)
    kept.keep(two, value)
    assert kept.find(one) is value
    kept.keep(three, value)
    assert kept.find(two) is None and kept.find(one) is value
    kept.keep(("big", ()), torch.zeros(1, 2, 1, 101, 4))
    assert len(kept) == 2 and kept.tokens == 10


def test_draining_finishes_what_is_here_and_takes_no_more(base, made):
    batcher = made()
    tickets = [batcher.submit(base.request("plain", IDS, options=LONG)) for _ in range(8)]
    with base.base.lock:
        assert not batcher.drain(0.01)
        with pytest.raises(NotServingError, match="stopping"):
            batcher.submit(base.request("plain", IDS))
    assert batcher.drain(60)
    assert {ticket.result(0.1)[0].reason for ticket in tickets} <= {"length", "stop"}


def test_stopping_cancels_and_ends_the_thread(base, made):
    batcher = made()
    with base.base.lock:
        tickets = [batcher.submit(base.request("plain", IDS, options=LONG)) for _ in range(8)]
        stopper = threading.Thread(target=batcher.stop)
        stopper.start()
        time.sleep(0.05)
    stopper.join(30)
    assert "cancelled" in {ticket.result(30)[0].reason for ticket in tickets}
    assert not batcher.healthy
    with pytest.raises(NotServingError):
        batcher.submit(base.request("plain", IDS))


def test_a_thread_that_fails_tells_everyone(base, made, monkeypatch, caplog):
    batcher = made()

    def broken():
        raise RuntimeError("out of luck")

    with base.base.lock:
        tickets = [batcher.submit(base.request("plain", IDS, options=LONG)) for _ in range(6)]
        monkeypatch.setattr(batcher._runner, "step", broken)
    for ticket in tickets:
        with pytest.raises(NotServingError, match=r"\(RuntimeError\); start it again") as told:
            ticket.result(30)
        assert str(told.value.__cause__) == "out of luck"
    assert not batcher.healthy and "out of luck" in str(batcher.failure)
    with pytest.raises(NotServingError, match=r"\(RuntimeError\); start it again"):
        batcher.submit(base.request("plain", IDS))
    assert "serving has failed" in caplog.text


def test_a_pass_that_fails_is_run_row_by_row(base, made, monkeypatch):
    batcher = made()
    forest = batcher._runner.forest
    real = forest.step
    poison = 99

    def step(news):
        if any(poison in new.ids for new in news):
            raise RuntimeError("a row that breaks the model")
        return real(news)

    monkeypatch.setattr(forest, "step", step)
    with base.base.lock:
        good = [batcher.submit(base.request("plain", IDS, options=LONG)) for _ in range(3)]
        bad = batcher.submit(base.request("other", (1, poison), options=LONG))
    with pytest.raises(ServingError, match="a row that breaks the model"):
        bad.result(30)
    for ticket in good:
        assert ticket.result(30)[0].text == base.alone("plain", IDS, LONG).text
    assert batcher.healthy


@pytest.mark.parametrize(
    "settings",
    [{"max_queue": 0}, {"max_batch_rows": 1.5}, {"max_step_tokens": 4, "max_batch_rows": 5}],
)
def test_bounds_are_checked(settings):
    with pytest.raises(ConfigError):
        Bounds(**settings)
