"""The choice of a label among the others: against its equation, row by row, over a real base."""

import pytest
import torch

import softprompt
from oracles.slow import only
from softprompt.engine import EngineRow, PlainEngine
from softprompt.errors import ConfigError
from softprompt.prompts import Prompt
from softprompt.training import objectives
from softprompt.training.objectives import LabelChoice, Likelihood

LABELS = ((5, 1), (6, 7, 1), (8, 1))


@pytest.fixture(scope="module")
def engine(bases):
    from softprompt.backbone import freeze, load_base

    base = load_base(str(bases / "llama"))
    freeze(base.model)
    return PlainEngine(base, trusted=True)


def rows_behind(prompt):
    return [EngineRow((10, 11), LABELS[1], prompt), EngineRow((12,), LABELS[0], prompt)]


def test_the_loss_is_that_of_the_label_and_of_its_choice(engine):
    start = 0.2 * torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    leaf = start.clone().requires_grad_()
    scored = LabelChoice(engine, LABELS, 2.0)(rows_behind(Prompt(leaf)), [0, 0])
    scored.loss.backward()
    own = start.clone().requires_grad_()
    prompt, wanted = Prompt(own), torch.tensor(0.0)
    for row in rows_behind(prompt):
        sums = [engine.target_log_probs([EngineRow(row.source, ids, prompt)]).values.sum() for ids in LABELS]
        right = sums[LABELS.index(row.target)]
        wanted = wanted - right - 2.0 * (right - torch.logsumexp(torch.stack(sums), dim=0))
    wanted.backward()
    torch.testing.assert_close(scored.loss, wanted)
    torch.testing.assert_close(leaf.grad, own.grad)
    likelihood = Likelihood(engine)(rows_behind(Prompt(start)), [0, 0])
    torch.testing.assert_close(scored.values, likelihood.values)
    assert scored.row_index.tolist() == likelihood.row_index.tolist() == [0, 0, 0, 1, 1]


def test_of_many_labels_a_row_gets_some_whatever_the_batch(engine, monkeypatch):
    monkeypatch.setattr(objectives, "OFFERED_LABELS", 2)
    rows = rows_behind(Prompt(torch.zeros(2, 16)))
    choice = LabelChoice(engine, LABELS, 1.0)
    alone = sum(choice([row], [0]).loss for row in rows)
    torch.testing.assert_close(choice(rows, [0, 0]).loss, alone)
    assert choice.other_tokens == 3


RECORDS = [
    {"input": text, "output": label} for text in ("the film", "a report", "was it") for label in ("good", "bad")
]


@pytest.mark.parametrize("base", only(["llama"], ["llama", "bart"]))
def test_tune_trains_it_for_labels(bases, base):
    def learnt(**options):
        settings = {"num_epochs": 1, "batch_size": 3, "silence_progress_bars": True, "task": "classification"}
        prompt = softprompt.tune(str(bases / base), RECORDS, **settings | options)
        return prompt.module.materialize().detach()

    chosen, likelihood = learnt(choice_weight=1.0), learnt(choice_weight=0)
    assert not torch.equal(chosen, likelihood)
    torch.testing.assert_close(learnt(choice_weight=1.0, max_tokens_per_batch=24), chosen)
    assert torch.equal(learnt(), chosen)  # the default for labels
    assert torch.equal(learnt(task="generation"), learnt(task="generation", choice_weight=0))


@pytest.mark.parametrize("other", [{"task": "generation"}, {"method": "cpt"}])
def test_a_weight_that_would_be_ignored_is_refused(bases, other):
    with pytest.raises(ConfigError, match="choice_weight would be ignored"):
        softprompt.tune(str(bases / "llama"), RECORDS, choice_weight=1.0, dry_run=True, **other)
