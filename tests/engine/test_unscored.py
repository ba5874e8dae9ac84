"""Rows with several answers: what stands between them is read and not scored, as labels of -100 are."""

from __future__ import annotations

import pytest
import torch

from oracles.families import causal, seq2seq
from oracles.slow import only
from softprompt.backbone import Base, freeze, input_embedding
from softprompt.engine import EngineRow, build_engine
from softprompt.errors import ConfigError
from softprompt.prompts import Prompt

CASES = [
    ((5, 6, 7), (20, 21, 9, 10, 11, 22, 23), (2, 3, 4)),
    ((5, 6, 8, 9), (20, 12, 24), (1,)),
    ((14,), (25, 26), ()),
]
"""Source, target, and the target tokens that are no answer."""


def rows_behind(prompt, at=0):
    return [EngineRow(source, target, prompt, at, frozenset(unscored)) for source, target, unscored in CASES]


def loss_of_transformers(model, virtual, at):
    """Return the summed loss of plain transformers, row by row, with labels of -100 where nothing is answered."""
    table, total = input_embedding(model), torch.zeros(())
    for source, target, unscored in CASES:
        ids = torch.tensor(source + target)
        embeds = table(ids)
        whole = torch.cat([embeds[:at], virtual, embeds[at:]]).unsqueeze(0)
        labels = [-100 if i in unscored else token for i, token in enumerate(target)]
        labels = torch.tensor([[-100] * (len(source) + len(virtual)) + labels])
        total = total + model(inputs_embeds=whole, labels=labels).loss * (labels != -100).sum()
    return total


@pytest.mark.parametrize("at", only([1], [0, 1]))
@pytest.mark.parametrize("engine", ["plain", "expand", "forest"])
@pytest.mark.parametrize("name", only(["llama"], ["gpt2", "llama"]))
def test_loss_and_gradient_are_those_of_transformers(name, engine, at):
    model = causal(name)
    freeze(model)
    width = input_embedding(model).weight.shape[1]
    virtual = torch.randn(4, width, generator=torch.Generator().manual_seed(5)).mul(0.3).requires_grad_()
    rows = rows_behind(Prompt(virtual), at)
    scores = build_engine(Base(model), engine).target_log_probs(rows)
    counts = [len(target) - len(unscored) for _, target, unscored in CASES]
    assert scores.row_index.tolist() == [row for row, count in enumerate(counts) for _ in range(count)]
    expected = loss_of_transformers(model, virtual, at)
    torch.testing.assert_close(-scores.values.sum(), expected, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(loss, virtual)[0] for loss in (-scores.values.sum(), expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    outputs = build_engine(Base(model), engine).target_outputs(rows)
    assert len(outputs.logits) == sum(counts)


def test_a_decoder_that_reads_its_labels_refuses_them():
    model = seq2seq("t5")
    freeze(model)
    with pytest.raises(ConfigError, match="row 0 has target tokens that are not scored"):
        build_engine(Base(model), "plain").target_log_probs(rows_behind(None))
