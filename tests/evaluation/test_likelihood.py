from __future__ import annotations

import math

import pytest
import torch

from softprompt.data import TokenRow
from softprompt.engine import TargetLogProbs
from softprompt.errors import ConfigError
from softprompt.generation import TargetLikelihood, classify_rows, target_likelihood
from softprompt.prompts import Prompt
from softprompt.world import world


class ByHand:
    """An engine whose token log-probability is -token / 10, minus 1 behind a prompt."""

    name = "by hand"
    processes = world()

    def __init__(self):
        self.sizes = []

    def target_log_probs(self, rows):
        self.sizes.append(len(rows))
        values, index = [], []
        for i, row in enumerate(rows):
            extra = 0.0 if row.prompt is None else float(row.prompt.input.sum())
            values += [-token / 10 - extra for token in row.target]
            index += [i] * len(row.target)
        return TargetLogProbs(torch.tensor(values), torch.tensor(index))


def row(source, target=()):
    return TokenRow(tuple(source), tuple(target), False, False)


ROWS = [row([1, 2, 3], [5, 1]), row([1], [2]), row([4, 4], [9, 9, 1])]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_perplexity_by_hand(batch_size):
    expected = (5 + 1 + 2 + 9 + 9 + 1) / 10
    found = target_likelihood(ByHand(), ROWS, None, batch_size=batch_size)
    assert found.log_prob == pytest.approx(-expected)
    assert found.tokens == 6
    assert found.loss == pytest.approx(expected / 6)
    assert found.perplexity == pytest.approx(math.exp(expected / 6))


def test_the_prompt_is_behind_the_rows_only_when_asked_for():
    prompt = Prompt(torch.full((2, 1), 0.5))
    with_prompt = target_likelihood(ByHand(), ROWS, prompt)
    assert with_prompt.loss == pytest.approx(2.7 / 6 + 1)


def test_a_pass_holds_at_most_the_rows_asked_for():
    engine = ByHand()
    target_likelihood(engine, ROWS, None, batch_size=2)
    assert engine.sizes == [2, 1]
    with pytest.raises(ConfigError, match="at least 1 row"):
        target_likelihood(engine, ROWS, None, batch_size=0)


def test_a_perplexity_out_of_range_is_infinite():
    assert TargetLikelihood(-8000.0, 8).perplexity == math.inf


def test_the_best_label_is_taken_raw_or_per_token():
    labels = [(3,), (2, 2)]
    raw = classify_rows(ByHand(), ROWS, labels, None)
    assert raw.predicted == (0, 0, 0)
    assert torch.allclose(raw.scores, torch.tensor([[-0.3, -0.4]] * 3))
    normalised = classify_rows(ByHand(), ROWS, labels, None, normalize=True)
    assert normalised.predicted == (1, 1, 1)
    assert torch.equal(normalised.scores, raw.scores)


def test_the_likelihood_of_gold_labels_passes_over_unknown_ones():
    found = classify_rows(ByHand(), ROWS, [(3,), (2, 2)], None)
    likelihood = found.likelihood([0, None, 1])
    assert likelihood.log_prob == pytest.approx(-0.7)
    assert likelihood.tokens == 3
