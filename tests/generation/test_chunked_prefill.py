"""Inputs are read in parts beside running answers, and no answer depends on the parts."""

from __future__ import annotations

import pytest
import torch

from oracles.served import served
from softprompt.engine import DecodeForest
from softprompt.errors import ConfigError
from softprompt.generation import Batcher, Bounds, EchoEvent, GenerationOptions, TokenEvent, run_requests

LONG = GenerationOptions(max_new_tokens=30, min_new_tokens=30)
SHORT = GenerationOptions(max_new_tokens=6)
IDS = (1, *range(40, 60))
WHOLE = 64
CHUNKS = (1, 3, 7, WHOLE)


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral", "gemma2"])
def base(request):
    return served(request.param, kinds=("plain", "suffix", "after_bos", "prefix"))


@pytest.fixture(scope="module")
def llama():
    return served("llama", kinds=("plain", "suffix", "after_bos", "prefix"))


@pytest.fixture
def passes(monkeypatch):
    """The passes that are run, each with the numbers of tokens of its rows."""
    seen = []
    step = DecodeForest.step

    def noted(self, news):
        seen.append([(new.lane, len(new.ids), new.lane.length) for new in news])
        return step(self, news)

    monkeypatch.setattr(DecodeForest, "step", noted)
    return seen


def beside(base, chunk, requests):
    """The tickets of requests that arrive while one answer runs, with so many tokens of input a pass."""
    bounds = Bounds(max_batch_rows=2, max_mixed_step_tokens=1 + chunk)
    batcher = Batcher(base.base, bounds)
    try:
        running = batcher.submit(base.request(None, (1, 50), options=LONG))
        next(iter(running))
        tickets = [batcher.submit(request) for request in requests]
        for ticket in (running, *tickets):
            ticket.result(60)
    finally:
        batcher.stop()
    assert running.result()[0].text == base.alone(None, (1, 50), LONG).text
    return tickets


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_parts_of_an_input_change_no_answer(base, chunk):
    asked = [(name, IDS[: 21 - 2 * i]) for i, name in enumerate((None, *base.prompts, "plain"))]
    requests = [base.request(name, ids, options=SHORT, logprobs=0) for name, ids in asked]
    for (name, ids), request, ticket in zip(asked, requests, beside(base, chunk, requests), strict=True):
        (end,) = ticket.result()
        assert end.text == base.alone(name, ids, SHORT).text
        expected = torch.tensor(base.log_probs(request, end.tokens))
        found = torch.tensor([event.logprob for event in ticket if isinstance(event, TokenEvent)])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_an_inputs_own_scores_are_those_of_one_pass(llama, chunk):
    names = (None, *llama.prompts)
    requests = [llama.request(name, IDS, options=SHORT, logprobs=2, echo=True, generate=False) for name in names]
    for request, ticket in zip(requests, beside(llama, chunk, requests), strict=True):
        (echo,) = [event for event in ticket if isinstance(event, EchoEvent)]
        again = llama.request(None, IDS)  # an input token is predicted by what stands before it
        assert echo.token_ids == again.ids and echo.logprobs[0] is None
        whole = beside(llama, WHOLE, [request])[0]
        (expected,) = [event for event in whole if isinstance(event, EchoEvent)]
        torch.testing.assert_close(
            torch.tensor(echo.logprobs[1:]), torch.tensor(expected.logprobs[1:]), atol=1e-5, rtol=1e-5
        )
        if request.at == 0:
            scores = llama.log_probs(
                llama.request(None, IDS[:1]) if request.prompt is None else request_at(request), IDS[1:]
            )
            assert list(echo.logprobs[1:]) == pytest.approx(scores, abs=1e-5)


def request_at(request):
    """The same request with the first token of its input alone."""
    return type(request)(request.ids[:1], request.prompt, 0)


@pytest.mark.parametrize("chunk", CHUNKS[:-1])
def test_a_pass_beside_answers_reads_no_more_than_its_part(llama, passes, chunk):
    beside(llama, chunk, [llama.request("plain", IDS, options=SHORT), llama.request(None, IDS, options=SHORT)])
    assert max(sum(count for _, count, _ in each) for each in passes) == 1 + chunk
    mixed = [each for each in passes if len(each) == 2]
    # The answer that runs gets its token in every pass: no pass is an input's alone.
    assert sum(len(each) == 1 and each[0][1] > 2 for each in passes) == 0 and len(mixed) > 2 * (21 // chunk)


def test_inputs_are_read_whole_where_no_answer_waits(llama, passes):
    bounds = Bounds(max_batch_rows=2, max_mixed_step_tokens=2)
    batcher = Batcher(llama.base, bounds)
    batcher.submit(llama.request(None, IDS, options=SHORT)).result(30)
    batcher.stop()
    assert [count for _, count, _ in passes[0]] == [len(IDS)]
    passes.clear()
    run_requests(
        llama.base, [llama.request(None, IDS[:n], options=SHORT) for n in (3, 21)], Bounds(max_batch_rows=2)
    )
    assert [count for _, count, _ in passes[0]] == [3, 21]


def test_a_request_that_is_cancelled_while_it_is_read_leaves_others_right(llama, passes):
    batcher = Batcher(llama.base, Bounds(max_batch_rows=4, max_mixed_step_tokens=4, max_cached_tokens=1024))
    try:
        running = batcher.submit(llama.request(None, (1, 50), options=LONG))
        next(iter(running))
        reading = batcher.submit(llama.request("plain", IDS, options=SHORT))
        same_prompt = batcher.submit(llama.request("plain", IDS[:9], options=SHORT))
        while not any(len(each) == 2 and each[1][1] > 1 for each in list(passes)):
            assert not running.is_done
        reading.cancel()
        (end,) = reading.result(30)
        assert end.reason == "cancelled" and not end.tokens
        assert same_prompt.result(30)[0].text == llama.alone("plain", IDS[:9], SHORT).text
        assert running.result(30)[0].text == llama.alone(None, (1, 50), LONG).text
        after = batcher.submit(llama.request("plain", IDS, options=SHORT)).result(30)
        assert after[0].text == llama.alone("plain", IDS, SHORT).text
        assert batcher.drain(30) and batcher.stats.running == 0
    finally:
        batcher.stop()


def test_a_prompt_that_was_read_in_parts_is_computed_once(llama, passes):
    batcher = Batcher(llama.base, Bounds(max_batch_rows=4, max_mixed_step_tokens=4))
    try:
        running = batcher.submit(llama.request(None, (1, 50), options=LONG))
        next(iter(running))
        tickets = [batcher.submit(llama.request("plain", IDS[:n], options=SHORT)) for n in (9, 7, 5)]
        assert all(ticket.result(30) for ticket in tickets)
        stats = batcher.stats
    finally:
        batcher.stop()
    assert (stats.prompt_misses, stats.prompt_hits) == (1, 2)
    begun = [length for each in passes for _, count, length in each if length in (0, 5)]
    assert begun.count(0) == 2  # the answer without a prompt, and the first of those with it


def test_the_bound_is_settled_by_the_device_and_checked():
    assert Bounds().settled("cpu").max_mixed_step_tokens == 64
    assert Bounds(max_batch_rows=100).settled("cpu").max_mixed_step_tokens == 200
    assert Bounds(max_step_tokens=40).settled("cpu").max_mixed_step_tokens == 40
    assert Bounds().settled("cuda").max_mixed_step_tokens == Bounds().max_step_tokens
    assert Bounds().settled("cpu", offline=True).max_mixed_step_tokens == Bounds().max_step_tokens
    assert Bounds(max_mixed_step_tokens=48).settled("cuda", offline=True).max_mixed_step_tokens == 48
    with pytest.raises(ConfigError, match="max_mixed_step_tokens 31 is below max_batch_rows 32"):
        Bounds(max_mixed_step_tokens=31)
