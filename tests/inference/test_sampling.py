from __future__ import annotations

import torch

from softprompt.inference.options import GenerationOptions
from softprompt.inference.sampling import (
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
    )
    names = [type(each).__name__ for each in row_processors(options, [(1,)], [5])]
    assert names == [
        "RowRepetitionPenalty",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
        "RowSampler",
    ]
    assert len(row_processors(GenerationOptions(), [(1,)], [None])) == 0
