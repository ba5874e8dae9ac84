from __future__ import annotations

import pytest
import torch
from transformers import ExponentialDecayLengthPenalty

from softprompt.inference import GenerationOptions
from softprompt.inference.sampling import (
    RowLengthPenalty,
    RowRepetitionPenalty,
    RowSampler,
    row_processors,
    row_seeds,
)


def test_draws_follow_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, float("-inf")])
    count = 20_000
    sampler = RowSampler(range(count))
    drawn = sampler(torch.zeros(count, 0), logits.expand(count, -1)).argmax(1)
    shares = torch.bincount(drawn, minlength=4) / count
    # Three standard deviations of a share are at most 0.011.
    assert torch.allclose(shares, logits.softmax(0), atol=0.011)


def test_a_row_draws_the_same_noise_alone_and_in_a_batch():
    scores = torch.zeros(3, 7)
    batch = RowSampler([11, 12, 13])
    alone = RowSampler([12])
    for _ in range(3):
        assert torch.equal(batch(None, scores)[1], alone(None, scores[1:2])[0])


def test_seeds_are_asked_for_or_drawn_and_none_when_nothing_is_drawn():
    assert row_seeds(GenerationOptions(), 2) == [None, None]
    sampling = {"decoding_method": "SAMPLING"}
    assert row_seeds(GenerationOptions(seed=4, **sampling), 2) == [4, 4]
    drawn = row_seeds(GenerationOptions(**sampling), 3)
    assert len(set(drawn)) == 3


def test_the_penalty_counts_a_rows_own_text_and_answer_only():
    penalty = RowRepetitionPenalty(2.0, [(1,), (2,)], beams=1)
    scores = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])
    prompt = torch.tensor([[0, 1], [0, 2]])  # 0 is padding in the second row
    assert penalty(prompt, scores).tolist() == [[1.0, 0.5, -1.0, -1.0], [1.0, 1.0, -2.0, -1.0]]
    longer = torch.tensor([[0, 1, 3], [0, 2, 0]])
    assert penalty(longer, scores).tolist() == [[1.0, 0.5, -1.0, -2.0], [0.5, 1.0, -2.0, -1.0]]


def test_the_beams_of_a_row_share_its_text():
    penalty = RowRepetitionPenalty(2.0, [(1,), (2,)], beams=2)
    scores = torch.ones(4, 3)
    assert penalty(torch.zeros(4, 1, dtype=torch.long), scores).tolist() == [
        [1.0, 0.5, 1.0],
        [1.0, 0.5, 1.0],
        [1.0, 1.0, 0.5],
        [1.0, 1.0, 0.5],
    ]


def test_filters_come_in_transformers_order_and_the_draw_last():
    options = GenerationOptions(
        decoding_method="SAMPLING",
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        typical_p=0.9,
        repetition_penalty=1.2,
        exponential_decay_length_penalty=(4, 1.1),
    )
    names = [type(each).__name__ for each in row_processors(options, [(1,)], [5], [2])]
    assert names == [
        "RowRepetitionPenalty",
        "RowLengthPenalty",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
        "RowSampler",
    ]
    assert len(row_processors(GenerationOptions(), [(1,)], [None], [2])) == 0


@pytest.mark.parametrize("factor", [1.5, 0.5])
def test_length_penalty_is_transformers_own(factor):
    theirs = ExponentialDecayLengthPenalty((2, factor), eos_token_id=[1, 3], input_ids_seq_length=4)
    ours = RowLengthPenalty(2, factor, [3, 1])
    ids = torch.zeros(2, 4, dtype=torch.long)
    scores = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        torch.testing.assert_close(ours(ids, scores), theirs(ids, scores.clone()))
        ids = torch.cat([ids, torch.zeros(2, 1, dtype=torch.long)], dim=1)


def test_length_penalty_leaves_a_barred_end_barred():
    ours = RowLengthPenalty(0, 1.5, [1])
    scores = torch.tensor([[0.5, -torch.inf]])
    ours(torch.zeros(1, 1, dtype=torch.long), scores)
    assert ours(torch.zeros(1, 3, dtype=torch.long), scores).tolist() == scores.tolist()
