"""Many requests at once: each answer is the one its request gets alone."""

from __future__ import annotations

import random
import time

import pytest

from oracles.served import drawn, served
from oracles.slow import only
from softprompt.generation import Batcher, Bounds, TokenEvent

NAMES = ["llama", "gpt2", "mistral", "gemma2", "qwen3", "gpt_neox"]
SMALL = Bounds(
    max_batch_rows=6,
    max_step_tokens=16,
    max_cached_tokens=512,
    max_queue=200,
    max_prompts_resident=2,
    max_prompt_tokens=16,
)


SIMPLE = {
    "bloom": ("plain", "other", "suffix"),
    "gpt_neo": ("plain", "other", "prefix"),
    "t5": ("plain", "other"),
    "bart": ("plain", "other", "prefix"),
}


@pytest.fixture(scope="module", params=only(["llama", "t5"], [*NAMES, *SIMPLE]))
def base(request):
    kinds = SIMPLE.get(request.param, ("plain", "other", "suffix", "prefix"))
    return served(request.param, kinds=kinds)


def same(finish, generation):
    assert finish.ended_by == generation.finish_reason
    assert (finish.text, len(finish.tokens)) == (generation.text, generation.generated_tokens)


def test_the_runner_is_the_best_that_runs_the_model(base):
    batcher = Batcher(base.base, SMALL)
    batcher.stop()
    model_type = base.model.config.model_type
    assert batcher.engine == ("simple" if model_type in SIMPLE else "forest")
    assert bool(batcher.reason) == (model_type in SIMPLE)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_answer_is_its_solo_answer(base, seed):
    rng = random.Random(seed)
    asked = [drawn(rng, [*base.prompts, None]) for _ in range(24)]
    batcher = Batcher(base.base, SMALL)
    try:
        tickets = []
        for name, ids, options in asked:
            tickets.append(batcher.submit(base.request(name, ids, options=options, logprobs=0)))
            if rng.random() < 0.3:
                time.sleep(0.01)
            if rng.random() < 0.2:
                rng.choice(tickets).cancel()
        ends = [ticket.result(60)[0] for ticket in tickets]
        assert batcher.stats.cached_tokens <= SMALL.max_cached_tokens
        assert batcher.stats.resident_prompts <= 2 and batcher.stats.resident_tokens <= 16
    finally:
        batcher.stop()
    for ticket, end, (name, ids, options) in zip(tickets, ends, asked, strict=True):
        if end.reason == "cancelled":
            assert ticket.is_cancelled
            continue
        same(end, base.alone(name, ids, options))
        events = [event for event in ticket if isinstance(event, TokenEvent)]
        assert "".join(event.text for event in events) == end.text
        if base.model.config.is_encoder_decoder and name == "prefix":
            continue
        expected = base.log_probs(ticket.request, end.tokens)
        assert [event.logprob for event in events] == pytest.approx(expected, abs=1e-4)
    assert sum(end.reason != "cancelled" for end in ends) > 12
