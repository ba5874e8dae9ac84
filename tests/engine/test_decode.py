"""The decode forest: rows that come and go have the logits they have alone."""

from __future__ import annotations

import random

import pytest
import torch

from oracles import families
from oracles.families import FOREST, OUTSIDE
from oracles.prefixed import random_prefix, solo_logits_behind
from oracles.slow import only
from softprompt.backbone import Base, KeyValueShape
from softprompt.backbone.attention import implementations_of
from softprompt.engine import DecodeForest, NewTokens, why_undecodable
from softprompt.engine.decode import decode_forest
from softprompt.engine.decode.lanes import KeyValueStore


def expected(model, prompt, ids):
    with torch.no_grad():
        if prompt is None or prompt.dim() == 5:
            return solo_logits_behind(model, prompt, ids)
        rows = torch.cat([prompt, model.get_input_embeddings()(torch.tensor(ids))])
        return model(inputs_embeds=rows.unsqueeze(0)).logits[0, len(prompt) :]


@pytest.mark.parametrize("name", only(["gpt2", "llama", "mixtral", "gemma2"], FOREST))
def test_rows_that_come_and_go_have_their_own_logits(name):
    model = families.causal(name).eval()
    width = model.get_input_embeddings().weight.shape[1]
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    prompts = [
        None,
        torch.randn(4, width, generator=generator) * 0.3,
        random_prefix(model, 5),
        torch.randn(3, width, generator=generator) * 0.3,
    ]
    before = implementations_of(model)
    forest = DecodeForest(Base(model), 2048)
    waiting = [
        (prompts[i % 4], [rng.randrange(3, 64) for _ in range(rng.choice([1, 4, 17, 30]))]) for i in range(12)
    ]
    running = []
    while waiting or running:
        if waiting and len(running) < 5:
            prompt, ids = waiting.pop()
            (lane,) = forest.store.take(len(ids) + 6)
            virtual = []
            if prompt is not None and prompt.dim() == 5:
                forest.store.fill(lane, prompt)
            elif prompt is not None:
                virtual = list(range(64, 64 + len(prompt)))
            running.append((lane, prompt, ids, [*virtual, *ids], []))
        news = []
        chosen = [row for row in running if rng.random() < 0.8]
        for lane, prompt, _, left, _ in chosen:
            count = rng.choice([1, 1, 2, 7])
            own = tuple(left[:count])
            del left[:count]
            news.append(NewTokens(lane, own, prompt if max(own) >= 64 else None, "all"))
        for row, part in zip(chosen, forest.step(news) if news else [], strict=True):
            row[4].append(part)
        for row in [row for row in running if not row[3]]:
            lane, prompt, ids, _, parts = row
            found = torch.cat(parts)[-len(ids) :]
            assert (found - expected(model, prompt, ids)).abs().max() < 1e-4
            forest.store.release(lane)
            running.remove(row)
    assert implementations_of(model) == before


@pytest.mark.parametrize("name", only(["gpt2", "llama", "mistral", "gemma3"], FOREST))
def test_the_probe_trusts_what_is_right(name):
    assert why_undecodable(Base(families.causal(name).eval())) == ""


@pytest.mark.parametrize("name", OUTSIDE)
def test_others_are_declined_with_the_reason(name):
    assert why_undecodable(Base(families.causal(name).eval()))
    assert "position_ids" in why_undecodable(Base(families.seq2seq("t5").eval()))


def test_the_probe_sees_wrong_numbers(monkeypatch):
    model = families.causal("llama").eval()
    real = decode_forest.DecodeForest.step

    def off(self, news):
        return [part + torch.linspace(0, 1, part.shape[1]) for part in real(self, news)]

    monkeypatch.setattr(decode_forest.DecodeForest, "step", off)
    assert "differ by" in why_undecodable(Base(model))


def test_positions_that_change_with_length_are_declined():
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 16,
    }
    model = families.causal("llama", rope_parameters=parameters).eval()
    assert "when a row gets long" in why_undecodable(Base(model))


def store(most=256):
    return KeyValueStore(KeyValueShape(1, 1, 2), torch.empty(0), most)


def test_lanes_stay_dense_and_keep_what_they_hold():
    kept = store()
    lanes = [kept.take(20)[0] for _ in range(5)]
    for i, lane in enumerate(lanes):
        kept.fill(lane, torch.full((1, 2, 1, 3, 2), float(i)))
    kept.release(lanes[1])
    kept.release(lanes[4])
    assert sorted(lane.slot for lane in (lanes[0], lanes[2], lanes[3])) == [0, 1, 2]
    for i in (0, 2, 3):
        assert bool((kept.read(lanes[i], 3) == i).all())


def test_a_tainted_lane_is_wiped():
    kept = store()
    first, second = kept.take(20)[0], kept.take(20)[0]
    kept.fill(second, torch.full((1, 2, 1, 3, 2), torch.nan))
    first.tainted = second.tainted = True
    kept.release(first)  # the second moves into its place
    kept.release(second)
    assert bool(torch.isfinite(kept.groups[32].values).all())


def test_the_budget_holds_and_room_is_given_back():
    kept = store(256)
    small = [kept.take(32)[0] for _ in range(6)]
    assert kept.take(100) is None and kept.allocated <= 256
    for lane in small:
        kept.release(lane)
    big = kept.take(100)
    assert big is not None and kept.allocated <= 256 and big[0].capacity == 128
    assert kept.fits(256) and not kept.fits(257) and not kept.fits(100, 3)
    assert kept.take(200) is None
