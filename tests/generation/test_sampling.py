from __future__ import annotations

import pytest
import torch
from transformers import ExponentialDecayLengthPenalty

from softprompt.generation import GenerationOptions, Request
from softprompt.generation.answer import Answer, AnswerRules
from softprompt.generation.sampling import GumbelNoise, processors_of, seeds_of


def answer_to(text, end_ids=(), **settings):
    """An answer that has no tokens yet, to an input of these tokens."""
    rules = AnswerRules(str, frozenset(end_ids), True)
    request = Request(tuple(text), options=GenerationOptions(**settings))
    return Answer(request, 0, None, rules, float("inf"))


def test_draws_follow_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, float("-inf")])
    count = 20_000
    noise = GumbelNoise(0)
    drawn = noise(torch.zeros(count, 0), logits.expand(count, -1)).argmax(1)
    shares = torch.bincount(drawn, minlength=4) / count
    # Three standard deviations of a share are at most 0.011.
    assert torch.allclose(shares, logits.softmax(0), atol=0.011)


def test_a_seed_gives_the_same_noise_again():
    scores = torch.zeros(1, 7)
    first, again, other = GumbelNoise(12), GumbelNoise(12), GumbelNoise(13)
    for _ in range(3):
        noisy = first(None, scores)
        assert torch.equal(noisy, again(None, scores))
        assert not torch.equal(noisy, other(None, scores))


def test_seeds_are_asked_for_or_drawn_and_none_when_nothing_is_drawn():
    assert seeds_of(GenerationOptions(), 2) == [None, None]
    sampling = {"decoding_method": "SAMPLING"}
    assert seeds_of(GenerationOptions(seed=4, **sampling), 2) == [4, 5]
    drawn = seeds_of(GenerationOptions(**sampling), 3)
    assert len(set(drawn)) == 3


def test_the_penalty_counts_an_answers_own_text_and_tokens_only():
    scores = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    none = torch.zeros(1, 0, dtype=torch.long)
    first, second = (answer_to([token], repetition_penalty=2.0) for token in (1, 2))
    assert first.processed(none, scores).tolist() == [[1.0, 0.5, -1.0, -1.0]]
    assert second.processed(none, scores).tolist() == [[1.0, 1.0, -2.0, -1.0]]
    longer = torch.tensor([[3]])
    assert first.processed(longer, scores).tolist() == [[1.0, 0.5, -1.0, -2.0]]
    assert second.processed(longer - 3, scores).tolist() == [[0.5, 1.0, -2.0, -1.0]]


def test_the_beams_of_a_row_share_its_text():
    scores = torch.ones(2, 3)
    none = torch.zeros(2, 0, dtype=torch.long)
    for token, penalised in ((1, [1.0, 0.5, 1.0]), (2, [1.0, 1.0, 0.5])):
        answer = answer_to([token], repetition_penalty=2.0)
        assert answer.processed(none, scores).tolist() == [penalised, penalised]


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
    names = [type(each).__name__ for each in processors_of(options, 5, [2], 1)]
    assert names == [
        "RepetitionPenaltyLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
        "GumbelNoise",
    ]
    assert len(processors_of(GenerationOptions(), None, [2], 1)) == 0


@pytest.mark.parametrize("factor", [1.5, 0.5])
def test_length_penalty_is_transformers_own(factor):
    theirs = ExponentialDecayLengthPenalty((2, factor), eos_token_id=[1, 3], input_ids_seq_length=4)
    ours = answer_to([0] * 4, [3, 1], exponential_decay_length_penalty=(2, factor))
    ids = torch.zeros(2, 4, dtype=torch.long)
    scores = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        torch.testing.assert_close(ours.processed(ids[:, 4:], scores), theirs(ids, scores.clone()))
        ids = torch.cat([ids, torch.zeros(2, 1, dtype=torch.long)], dim=1)


def test_length_penalty_leaves_a_barred_end_barred():
    ours = answer_to([0], [1], min_new_tokens=9, max_new_tokens=9, exponential_decay_length_penalty=(0, 1.5))
    scores = torch.tensor([[0.5, -torch.inf]])
    assert ours.processed(torch.zeros(1, 2, dtype=torch.long), scores).tolist() == scores.tolist()
