"""A scorer keeps to its bounds in each pass, and one that stops is not held up by callers that have gone."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from oracles.served import served
from softprompt.engine import EngineRow, PlainEngine, ResidentPrompts
from softprompt.errors import NotServingError, QueueFullError
from softprompt.generation import Bounds, Scorer


def test_a_caller_that_has_gone_does_not_hold_up_the_end():
    base = served("llama", kinds=("plain",))
    scorer = Scorer(
        base.base,
        Bounds(max_batch_rows=1, max_score_rows=4, max_step_tokens=64, max_queue=4),
        ResidentPrompts(0, 0),
    )
    gone, waiting = (scorer.submit(()) for _ in range(2))
    assert gone.cancel()
    scorer.stop()
    assert gone.cancelled()
    with pytest.raises(NotServingError):
        waiting.result(1)


def test_no_more_callers_wait_than_the_queue_has_room_for():
    base = served("llama", kinds=("plain",))
    scorer = Scorer(base.base, Bounds(max_batch_rows=1, max_score_rows=4, max_queue=2), ResidentPrompts(0, 0))
    waiting = [scorer.submit(()) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait already; try again later") as raised:
        scorer.submit(())
    assert raised.value.retry_after > 0
    scorer.stop()
    for each in waiting:
        with pytest.raises(NotServingError):
            each.result(1)


@pytest.mark.parametrize(("rows", "tokens", "passes"), [(64, 10_000, 1), (64, 40, 4), (4, 10_000, 6)])
def test_a_pass_is_bounded_by_rows_and_tokens(monkeypatch, rows, tokens, passes):
    base = served("llama", kinds=("plain", "other"))
    texts = [tuple(range(5, 5 + 3 * n)) for n in range(1, 5)]
    asked = [
        [EngineRow(text, label, base.values[name]) for text in texts for label in ((7,), (8, 9), (3, 4, 5))]
        for name in ("plain", "other")
    ]
    scorer = Scorer(
        base.base,
        Bounds(max_batch_rows=1, max_score_rows=rows, max_step_tokens=tokens, max_queue=4),
        ResidentPrompts(0, 0),
    )
    seen, own = [], scorer._engine

    class Noting:
        def target_log_probs(self, part):
            seen.append(part)
            return own.target_log_probs(part)

    monkeypatch.setattr(scorer, "_engine", Noting())
    found = [scorer.submit(each) for each in asked]
    scorer.start()
    for each, sums in zip(asked, found, strict=True):
        alone = [own.target_log_probs([row]).row_sums(1).detach() for row in each]
        assert torch.allclose(sums.result(30), torch.cat(alone).float(), atol=1e-5)
    scorer.stop()
    assert len(seen) == passes
    for part in seen:
        sources = sum(map(len, {row.source for row in part}))
        assert len(part) == 1 or sources + sum(len(row.target) for row in part) <= tokens
        assert len(part) <= rows


def test_a_row_beyond_the_bound_has_a_pass_of_its_own():
    base = served("llama", kinds=("plain",))
    scorer = Scorer(
        base.base, Bounds(max_batch_rows=1, max_score_rows=4, max_step_tokens=1, max_queue=4), ResidentPrompts(0, 0)
    )
    scorer.start()
    plain = base.values["plain"]
    sums = scorer.submit([EngineRow((5, 6, 7), (8,), plain), EngineRow((9,), (4,), plain)])
    assert sums.result(30).shape == (2,)
    scorer.stop()


def test_prompts_that_see_the_input_and_others_are_scored_for_one_caller():
    base = served("t5", kinds=("plain",))
    seeing = base.values["plain"]
    prompts = [seeing, replace(seeing, sees_input=False), None] * 2
    rows = [EngineRow((5, 6, 7 + i), (8, 9), prompt) for i, prompt in enumerate(prompts)]
    scorer = Scorer(
        base.base,
        Bounds(max_batch_rows=1, max_score_rows=64, max_step_tokens=999, max_queue=4),
        ResidentPrompts(0, 0),
    )
    scorer.start()
    sums = scorer.submit(rows).result(30)
    alone = [PlainEngine(base.base).target_log_probs([row]).row_sums(1) for row in rows]
    scorer.stop()
    assert torch.allclose(sums, torch.cat(alone).detach(), atol=1e-5)
    assert len({round(float(value), 6) for value in sums}) == len(rows)


class Counting:
    """An engine that takes a while for each pass and notes how many rows each had."""

    def __init__(self, engine, base=None):
        self.engine, self.base, self.seen = engine, base, []

    def target_log_probs(self, part):
        with self.base.lock:
            self.seen.append(len(part))
            time.sleep(0.02)
            return self.engine.target_log_probs(part)


@pytest.fixture
def large(monkeypatch):
    """Return a scorer that runs, its engine, and the rows of a request of fifty passes."""
    base = served("llama", kinds=("plain",))
    scorer = Scorer(
        base.base,
        Bounds(max_batch_rows=1, max_score_rows=8, max_step_tokens=999, max_queue=4),
        ResidentPrompts(0, 0),
    )
    engine = Counting(scorer._engine, base.base)
    monkeypatch.setattr(scorer, "_engine", engine)
    scorer.start()
    yield scorer, engine, [EngineRow((5, 6, number % 50), (7,), base.values["plain"]) for number in range(400)]
    scorer.stop()


def test_a_large_request_holds_up_no_other_for_more_than_a_pass_or_two(large):
    scorer, engine, rows = large
    long = scorer.submit(rows)
    while not engine.seen:
        time.sleep(0.001)
    begun = len(engine.seen)
    scorer.submit(rows[:2]).result(30)
    assert len(engine.seen) - begun <= 3
    assert not long.done()
    alone = engine.engine.target_log_probs(rows[:2]).row_sums(2).detach()
    assert torch.allclose(long.result(60)[:2], alone.float(), atol=1e-5)


def test_a_large_request_whose_caller_has_gone_ends_at_the_next_pass(large):
    scorer, engine, rows = large
    long = scorer.submit(rows)
    while not engine.seen:
        time.sleep(0.001)
    assert long.cancel()
    scorer.submit(rows[:1]).result(30)
    assert len(engine.seen) <= 4


def test_between_the_passes_of_a_large_request_others_get_the_base(large):
    scorer, engine, rows = large
    long = scorer.submit(rows)
    while not engine.seen:
        time.sleep(0.001)
    passes = []
    for _ in range(5):
        with engine.base.lock:
            passes.append(len(engine.seen))
    assert not long.done()
    assert passes[-1] < 25
    long.cancel()
