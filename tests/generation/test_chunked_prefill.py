"""Inputs are read in parts beside running answers, and no answer depends on the parts."""

from __future__ import annotations

import pytest
import torch

from oracles.served import served
from oracles.slow import only
from softprompt.engine import DecodeForest, why_undecodable
from softprompt.errors import ConfigError
from softprompt.generation import (
    Batcher,
    Bounds,
    Decoder,
    EchoEvent,
    GenerationOptions,
    Request,
    Ticket,
    TokenEvent,
)

KINDS = ("plain", "suffix", "after_bos", "prefix")
LONG = GenerationOptions(max_new_tokens=40, min_new_tokens=40)
SHORT = GenerationOptions(max_new_tokens=4)
IDS = (1, *range(40, 60))
CHUNKS = (1, 3, 7, 64)


@pytest.fixture(scope="module")
def llama():
    base = served("llama", kinds=KINDS)
    assert not why_undecodable(base.base)  # probed now, before passes are counted
    return base


@pytest.fixture
def passes(llama, monkeypatch):
    """The passes that are run: of each row what it held and how many tokens it read."""
    seen = []
    step = DecodeForest.step

    def noted(self, news):
        seen.append([(new.lane.length, len(new.ids)) for new in news])
        return step(self, news)

    monkeypatch.setattr(DecodeForest, "step", noted)
    return seen


class Arrivals:
    """Requests that arrive right behind a given pass of one long answer, so always beside it."""

    def __init__(self, base, chunk, rows=2):
        self.base, self.tickets = base, list[Ticket]()
        self.batcher = Batcher(base.base, Bounds(max_batch_rows=rows, max_mixed_step_tokens=rows - 1 + chunk))
        self.runner = self.batcher._runner
        self.step, self.runner.step = self.runner.step, self.counted
        self.at: dict[int, object] = {}
        self.count = 0

    def counted(self):
        self.step()
        self.count += 1
        if action := self.at.pop(self.count, None):
            action()

    def run(self, requests):
        """Return the long answer's ticket and those of the requests, all ended."""
        self.at[1] = lambda: self.tickets.extend(map(self.batcher.submit, requests))
        running = self.batcher.submit(self.base.request(None, (1, 50), options=LONG))
        try:
            (end,) = running.result(120)
            assert self.batcher.drain(120)
        finally:
            self.batcher.stop()
        assert end.text == self.base.alone(None, (1, 50), LONG).text
        return self.tickets


def logprobs_of(ticket):
    return torch.tensor([event.logprob for event in ticket if isinstance(event, TokenEvent)])


@pytest.mark.parametrize(
    ("family", "chunk"),
    only([("llama", 7), ("gemma2", 3)], [*(("llama", chunk) for chunk in CHUNKS), ("gpt2", 3), ("gemma2", 3)]),
)
def test_the_parts_of_an_input_change_no_answer(llama, family, chunk):
    base = llama if family == "llama" else served(family, kinds=KINDS)
    asked = [(name, IDS[: 21 - 3 * i]) for i, name in enumerate((None, *KINDS, "plain"))]
    requests = [base.request(name, ids, options=SHORT, logprobs=0) for name, ids in asked]
    tickets = Arrivals(base, chunk).run(requests)
    for (name, ids), request, ticket in zip(asked, requests, tickets, strict=True):
        (end,) = ticket.result()
        assert end.text == base.alone(name, ids, SHORT).text
        expected = torch.tensor(base.log_probs(request, end.tokens))
        torch.testing.assert_close(logprobs_of(ticket), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def scores_of(base, request):
    """Log p of every input token but the first, from one pass over all of the request's tokens."""
    prompt, ids = request.prompt, request.ids
    if prompt is None or prompt.input is None:
        return base.log_probs(Request(ids[:1], prompt), ids[1:])
    rows = base.model.get_input_embeddings()(torch.tensor(ids))
    rows = torch.cat([rows[: request.at], prompt.input, rows[request.at :]])
    logs = base.model(inputs_embeds=rows.unsqueeze(0)).logits[0].log_softmax(-1)
    before = [i - 1 + (len(prompt.input) if i >= request.at else 0) for i in range(1, len(ids))]
    return [float(logs[place, token]) for place, token in zip(before, ids[1:], strict=True)]


@pytest.mark.parametrize("chunk", only([1, 7], CHUNKS))
def test_an_inputs_own_scores_are_those_of_one_pass(llama, chunk):
    more = {"options": SHORT, "logprobs": 2, "echo": True, "generate": False}
    requests = [llama.request(name, IDS, **more) for name in (None, *KINDS)]
    for request, ticket in zip(requests, Arrivals(llama, chunk).run(requests), strict=True):
        (echo,) = [event for event in ticket if isinstance(event, EchoEvent)]
        assert echo.token_ids == IDS and echo.logprobs[0] is None
        found, expected = torch.tensor(echo.logprobs[1:]), torch.tensor(scores_of(llama, request))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", CHUNKS[:-1])
def test_a_pass_beside_an_answer_reads_no_more_than_its_part(llama, passes, chunk):
    Arrivals(llama, chunk).run([llama.request("plain", IDS, options=SHORT)])
    first, *beside = passes
    assert [count for _, count in first] == [2]
    assert max(sum(count for _, count in rows) for rows in beside) == 1 + chunk
    reading = [rows for rows in beside if len(rows) == 2][: -(-26 // chunk)]
    # The answer that runs gets its token in every pass.
    assert [sum(count for _, count in rows) - 1 for rows in reading[:-1]] == [chunk] * (len(reading) - 1)
    assert len(passes) == 40


def test_inputs_are_read_whole_where_no_answer_waits(llama, passes):
    batcher = Batcher(llama.base, Bounds(max_batch_rows=2, max_mixed_step_tokens=2))
    batcher.submit(llama.request(None, IDS, options=SHORT)).result(30)
    batcher.stop()
    assert passes[0] == [(0, 21)]
    passes.clear()
    Decoder(llama.base).run([llama.request(None, IDS[:n], options=SHORT) for n in (3, 21)])
    assert passes[0] == [(0, 3), (0, 21)]


def test_a_request_that_is_cancelled_while_it_is_read_leaves_others_right(llama):
    asked = [("plain", IDS), ("plain", IDS[:9]), ("plain", IDS[:5])]
    arrivals = Arrivals(llama, 1, rows=4)

    def cancel():  # the first is in its prompt, for whose keys and values the others wait
        arrivals.tickets[0].cancel()

    arrivals.at[2] = cancel
    tickets = arrivals.run([llama.request(name, ids, options=SHORT) for name, ids in asked])
    (cancelled,) = tickets[0].result()
    assert (cancelled.reason, cancelled.tokens) == ("cancelled", ())
    for (name, ids), ticket in zip(asked[1:], tickets[1:], strict=True):
        assert ticket.result()[0].text == llama.alone(name, ids, SHORT).text
    assert arrivals.runner.rows == 0 and arrivals.runner.forest.store.held == 0


def test_a_prompt_that_is_read_in_parts_is_computed_once(llama, passes):
    arrivals = Arrivals(llama, 1, rows=4)
    tickets = arrivals.run([llama.request("plain", IDS[:n], options=SHORT) for n in (9, 7, 5)])
    assert all(ticket.result()[0].tokens for ticket in tickets)
    kept = arrivals.runner.residents
    assert (kept.misses, kept.hits) == (1, 2)
    assert sum(length == 0 for rows in passes for length, _ in rows) == 2  # the long answer, and the first of these


def test_the_bound_is_settled_by_the_device_and_checked():
    assert Bounds().settled("cpu").max_mixed_step_tokens == 64
    assert Bounds(max_batch_rows=100).settled("cpu").max_mixed_step_tokens == 200
    assert Bounds(max_step_tokens=40).settled("cpu").max_mixed_step_tokens == 40
    assert Bounds().settled("cuda").max_mixed_step_tokens == Bounds().max_step_tokens
    assert Bounds().settled("cpu", offline=True).max_mixed_step_tokens == Bounds().max_step_tokens
    assert Bounds(max_mixed_step_tokens=48).settled("cuda", offline=True).max_mixed_step_tokens == 48
    with pytest.raises(ConfigError, match="max_mixed_step_tokens 31 is below max_batch_rows 32"):
        Bounds(max_mixed_step_tokens=31)
    with pytest.raises(ConfigError, match="max_mixed_step_tokens 513 is above max_step_tokens 512, which bounds"):
        Bounds(max_mixed_step_tokens=513)
